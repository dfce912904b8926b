"""Whoever copies an adapter's numbers gets what it computes, to the last bit, or an error: any loader, any base."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from tests.conftest import config_for, load, logits_of, train_briefly
from tests.grids import grid

KINDS = ["compressed", "born", "dense"]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def base(kind, dense_dir, compressed_dir):
    """A function that loads a fresh base model."""
    folder = compressed_dir if kind == "compressed" else dense_dir
    return lambda: load(folder)


@pytest.fixture
def trained(kind, base):
    return get_peft_model(base(), config_for(kind, num_blocks=2, init_weights=False))


# Who takes the numbers up: an adapter made from the saved config, still without weights, and one that has other units.
RECEIVERS = {
    "saved config": lambda base, kind, folder: get_peft_model(base(), saved_config(folder)),
    "other units": lambda base, kind, folder: get_peft_model(base(), config_for(kind, num_blocks=2, delta_scale=8.0)),
}


def saved_config(folder):
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def plain(model, receiver, folder):
    receiver.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})


def assigned(model, receiver, folder):
    receiver.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def pickled(model, receiver, folder):
    torch.save(model.state_dict(), folder / "state.pt")
    receiver.load_state_dict(torch.load(folder / "state.pt"))


def safetensors(model, receiver, folder):
    save_model(model, str(folder / "state.safetensors"))
    load_model(receiver, folder / "state.safetensors")


def accelerated(model, receiver, folder):
    saving, loading = Accelerator(cpu=True), Accelerator(cpu=True)
    saving.prepare(model)
    saving.save_state(str(folder / "state"))
    saving.free_memory()
    loading.prepare(receiver)
    loading.load_state(str(folder / "state"))


def distributed(model, receiver, folder):
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "dcp", no_dist=True)
    state = get_model_state_dict(receiver)
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    set_model_state_dict(receiver, state)


def in_place(model, receiver, folder):
    """What distributed checkpoints do where nobody calls `load_state_dict` after them."""
    dcp.save(model.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)
    dcp.load(receiver.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)


def by_hand(model, receiver, folder):
    state = receiver.state_dict()
    for name, value in model.named_parameters():
        state[name].copy_(value.detach())


LOADERS = [plain, assigned, pickled, safetensors, accelerated, distributed, in_place, by_hand]


@pytest.mark.filterwarnings("ignore")
@grid(loader=LOADERS, receiver=RECEIVERS, kind=KINDS)
def test_a_full_state_dict(trained, base, kind, receiver, loader, tokens, tmp_path):
    expected = logits_of(trained, tokens)
    trained.save_pretrained(tmp_path)
    model = receiver(base, kind, tmp_path)
    loader(trained, model, tmp_path)
    assert torch.equal(logits_of(model, tokens), expected)
    model.train()  # may bring the adapter to other units
    assert torch.equal(logits_of(model, tokens), expected)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": lambda model: reload(model),
}


def reload(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@grid(make=COPIES, kind=KINDS)
def test_copies(trained, tokens, make):
    expected, copied = logits_of(trained, tokens), make(trained)
    assert torch.equal(logits_of(copied, tokens), expected)
    assert train_briefly(copied, tokens) == train_briefly(trained, tokens)


@grid(kind=KINDS, merged=[False, True])
def test_an_adapter_continues_in_the_units_of_the_state_it_was_given(trained, base, kind, tokens, tmp_path, merged):
    """With an optimiser's state beside it, as `accelerator.load_state` brings it."""
    trained.save_pretrained(tmp_path)
    model = get_peft_model(base(), PeftConfig.from_pretrained(tmp_path))
    trained.merge_adapter() if merged else None
    model.load_state_dict(trained.state_dict())
    trained.unmerge_adapter() if merged else None
    model.train()
    for (name, one), two in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(one, two), name


def without_units(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What version 0.1 wrote."""
    kept = {name: value for name, value in tensors.items() if "cluscomp_units" not in name}
    assert len(kept) == len(tensors) - 14
    return kept


@grid(kind=KINDS, receiver=RECEIVERS, strict=[False, True])
def test_numbers_without_their_units_are_refused(trained, base, kind, receiver, tmp_path, strict):
    trained.save_pretrained(tmp_path)
    model = receiver(base, kind, tmp_path)
    with pytest.raises(RuntimeError, match="says what its numbers mean"):
        model.load_state_dict(without_units(trained.state_dict()), strict=strict)


@grid(way=["peft", "low memory", "mixin", "resume"], version=["older", "present"], kind=KINDS, pairs=True)
def test_adapter_files(trained, base, kind, tokens, tmp_path, way, version):
    expected = logits_of(trained, tokens)
    trained.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if version == "older":
        save_file(without_units(load_file(file)), file, metadata={"format": "pt"})
    if way == "mixin":
        model = base()
        model.load_adapter(str(tmp_path), is_trainable=True)
    elif way == "resume":
        model = get_peft_model(base(), config_for(kind, num_blocks=2, delta_scale=8.0))
        model.load_adapter(tmp_path, "default", is_trainable=True)
    else:
        model = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=way == "low memory", is_trainable=True)
    assert torch.equal(logits_of(model, tokens), expected)
    trainable = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.requires_grad}
    assert trainable == {"codebook", "scale_in", "scale_out"}
    assert all("cluscomp_delta" in name for name, value in model.named_parameters() if value.requires_grad)
    if way != "resume":
        assert train_briefly(model, tokens) == train_briefly(trained, tokens)


@grid(kind=KINDS, receiver=["saved config", "other units"])
def test_an_adapter_file_set_by_hand(trained, base, kind, receiver, tokens, tmp_path):
    """Past every hook: the file's tensors, renamed to the model's keys."""
    expected = logits_of(trained, tokens)
    trained.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    if receiver == "other units":
        config = config_for(kind, num_blocks=2, delta_scale=8.0)
    model = inject_adapter_in_model(config, base())
    tensors = {}
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.")
        for part in ("cluscomp_delta", "cluscomp_units", "cluscomp_code_digest"):
            name = name.replace(f".{part}", f".{part}.default")
        tensors[name] = value
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    assert torch.equal(logits_of(model, tokens), expected)


def test_units_are_never_trained(trained, kind, base, tokens, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    for model in (trained, loaded):
        model.disable_adapter_layers()
        model.enable_adapter_layers()
        model.set_adapter("default")
        units = {name: value for name, value in model.named_parameters() if "cluscomp_units" in name}
        before = {name: value.clone() for name, value in units.items()}
        assert len(units) == 14 and not any(value.requires_grad for value in units.values())
        train_briefly(model, tokens)
        assert all(torch.equal(value, before[name]) for name, value in units.items())
