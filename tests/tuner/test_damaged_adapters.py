"""A damaged adapter is refused before the model is touched, or loads to the very same numbers: nothing in between."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import config_for, load, logits_of
from tests.grids import grid, quick
from tests.tuner.test_bad_input import assert_untouched

KINDS = ["compressed", "born", "dense"]
UP = "base_model.model.model.layers.1.mlp.up_proj."
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, dense_dir, compressed_dir) -> dict[str, Path]:
    """A saved adapter of every kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(compressed_dir if kind == "compressed" else dense_dir)
        get_peft_model(model, config_for(kind, init_weights=False, num_blocks=2)).save_pretrained(folder)
    return folders


@pytest.fixture
def adapter(saved, tmp_path):
    """A function that copies the adapter of a kind and applies a change to its tensors and its config."""

    def make(kind: str, change=None, config=None) -> Path:
        folder = tmp_path / kind
        shutil.copytree(saved[kind], folder)
        if change is not None:
            tensors = load_file(folder / FILE)
            change(tensors)
            save_file(tensors, folder / FILE, metadata={"format": "pt"})
        if config is not None:
            settings = json.loads((folder / CONFIG).read_text())
            settings.update(config)
            (folder / CONFIG).write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture
def base(dense_dir, compressed_dir):
    return lambda kind: load(compressed_dir if kind == "compressed" else dense_dir)


def replace(key: str, change):
    def apply(tensors):
        tensors[UP + key] = change(tensors[UP + key])

    return apply


def drop(key: str):
    return lambda tensors: tensors.pop(UP + key)


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(torch.uint8).view(-1)[5] ^= 4
    return tensor


def wider(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:1]])


def other_digest(tensors):
    """Codes and the digest beside them changed alike: only the config's fingerprint knows."""
    from cluscomp_peft.codes import ClusterSpec, fingerprint
    from cluscomp_peft.tuner.loading import digest_bytes

    key = UP + ("base_layer.codes" if UP + "base_layer.codes" in tensors else "codes")
    codes = tensors[key].clone()
    codes[0, 0] ^= 1
    tensors[key] = codes
    tensors[UP + "cluscomp_code_digest"] = digest_bytes(fingerprint(codes, 52, ClusterSpec(3, 12)))


ALL = [
    ("a scale is missing", drop("cluscomp_delta.scale_in")),
    ("a codebook is missing", drop("cluscomp_delta.codebook")),
    ("a codebook is larger", replace("cluscomp_delta.codebook", wider)),
    ("a scale is larger", replace("cluscomp_delta.scale_out", wider)),
    ("whole numbers", replace("cluscomp_delta.codebook", torch.Tensor.int)),
    ("units of another shape", replace("cluscomp_units.values", wider)),
    ("units that are no numbers", replace("cluscomp_units.values", lambda tensor: tensor * float("nan"))),
    ("units without end", replace("cluscomp_units.values", lambda tensor: tensor / 0)),
    ("numbers for a layer that is not there", lambda tensors: tensors.update(stranger(tensors))),
]
CODES = [
    ("codes of the wrong type", "codes", torch.Tensor.int),
    ("codes flipped", "codes", flipped),
    ("codes short", "codes", lambda tensor: tensor[:-1]),
]
BORN = [
    ("no codebook", drop("base_layer.codebook")),
    ("no scales", drop("base_layer.scale_in")),
    ("codebook flipped", replace("base_layer.codebook", flipped)),
    ("scale flipped", replace("base_layer.scale_out", flipped)),
    ("codebook cut", replace("base_layer.codebook", lambda tensor: tensor[:, :-1].contiguous())),
]


def stranger(tensors):
    return {
        name.replace("layers.1", "layers.2"): value.clone()
        for name, value in tensors.items()
        if name.startswith(UP + "cluscomp_delta")
    }


CASES = [(kind, name, change) for kind in KINDS for name, change in ALL]
CASES += [("born", name, replace(f"base_layer.{key}", change)) for name, key, change in CODES]
CASES += [("dense", name, replace(key, change)) for name, key, change in CODES]
CASES += [("born", name, change) for name, change in BORN]
CASES += [(kind, "codes and digest", other_digest) for kind in ("born", "dense")]
CASES += [(kind, "digest", replace("cluscomp_code_digest", flipped)) for kind in KINDS]
CASES += [("compressed", "codes of its own", lambda tensors: tensors.update({UP + "codes": torch.zeros(3, 3).byte()}))]


@grid(case={f"{kind}-{name}": (kind, name, change) for kind, name, change in CASES}, way=["peft", "mixin"])
def test_damage_is_found_before_the_model_is_touched(adapter, base, case, way, tokens):
    kind, _, change = case
    model = base(kind)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match=r"damaged|has no|belongs to another|would not be loaded|NaN or infinite"):
        if way == "peft":
            PeftModel.from_pretrained(model, adapter(kind, change))
        else:
            model.load_adapter(str(adapter(kind, change)))
    assert_untouched(model, expected, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_a_pickled_file(adapter, base, kind, tokens):
    folder = adapter(kind)
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    intact = logits_of(PeftModel.from_pretrained(base(kind), folder), tokens)
    assert torch.equal(intact, logits_of(PeftModel.from_pretrained(base(kind), adapter_of(folder, tensors)), tokens))
    del tensors[UP + "cluscomp_delta.scale_in"]
    torch.save(tensors, folder / "adapter_model.bin")
    model = base(kind)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="has no"):
        PeftModel.from_pretrained(model, folder)
    assert_untouched(model, expected, tokens)


def adapter_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    other = folder.parent / "other"
    other.mkdir()
    shutil.copy(folder / CONFIG, other)
    save_file(tensors, other / FILE, metadata={"format": "pt"})
    return other


@grid(kind=KINDS, config=[{"num_blocks": 3}, {"train_scales": False}, {"num_blocks": None, "rank": 2}])
def test_a_config_of_another_adapter(adapter, base, kind, config, tokens):
    model = base(kind)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match=r"damaged|says nothing"):
        PeftModel.from_pretrained(model, adapter(kind, config=config))
    assert_untouched(model, expected, tokens)


@grid(kind=KINDS, change=[drop("cluscomp_delta.scale_in"), replace("cluscomp_delta.codebook", wider)])
def test_an_adapter_that_is_there_is_not_half_overwritten(adapter, base, kind, change, tokens):
    """What a Trainer does when it resumes: PEFT reads no config then."""
    model = get_peft_model(base(kind), config_for(kind, init_weights=False, num_blocks=2))
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match="belongs to another one"):
        model.load_adapter(adapter(kind, change), "default")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loader_loads_the_digests(saved, base, kind, tokens):
    model = base(kind)
    model.load_adapter(str(saved[kind]))
    digests = [value for name, value in model.named_parameters() if "code_digest" in name]
    assert len(digests) == 14 and all(value.any() for value in digests)
    assert torch.isfinite(logits_of(model, tokens)).all()


def from_tensors(model, folder):
    """By a loader that never shows a file: only what arrives can be held against the config."""
    config = PeftConfig.from_pretrained(folder)
    tensors = {key.removeprefix("base_model.model."): value for key, value in load_file(folder / FILE).items()}
    model.load_adapter(peft_config=replaced(config), adapter_state_dict=tensors)


def replaced(config):
    """The same config, as if it had been read by somebody else."""
    return dataclasses.replace(config)


@pytest.mark.parametrize(("kind", "key"), [("born", "base_layer.codes"), ("dense", "codes")])
def test_codes_that_arrive_and_are_not_those_of_the_digest(adapter, base, kind, key, tokens):
    model = base(kind)
    from_tensors(model, adapter(kind, replace(key, flipped)))
    with pytest.raises(ValueError, match="the codes that came with adapter 'default' have fingerprint"):
        model(tokens)


@pytest.mark.parametrize("kind", ["born", "dense"])
def test_tensors_of_another_adapter_that_arrive(adapter, base, kind, tokens):
    """Whose codes and digests are right, and not those of the config."""
    model = base(kind)
    from_tensors(model, adapter(kind, other_digest))
    with pytest.raises(ValueError, match="the two belong to different adapters"):
        model(tokens)


def test_other_codebooks_that_arrive_are_a_warning(adapter, base, tokens):
    model = base("born")
    from_tensors(model, adapter("born", replace("base_layer.codebook", flipped)))
    with pytest.warns(UserWarning, match="other codebooks or scales than its adapter_config"):
        model(tokens)
    model(tokens)


@grid(kind=KINDS, value=[float("nan"), float("inf")])
def test_units_that_are_no_numbers_when_they_arrive(saved, base, kind, value, tokens):
    model = get_peft_model(base(kind), replaced(PeftConfig.from_pretrained(saved[kind])))
    state = PeftModel.from_pretrained(base(kind), saved[kind]).state_dict()
    state[next(key for key in state if key.endswith("up_proj.cluscomp_units.default.values"))].fill_(value)
    model.load_state_dict(state)
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in .*cluscomp_units\.values"):
        model(tokens)


@grid(kind=KINDS, value=[float("nan"), float("inf")])
def test_numbers_that_are_none(adapter, base, kind, value, tokens):
    def change(tensors):
        tensors[UP + "cluscomp_delta.scale_in"][3] = value

    folder, model = adapter(kind, change), base(kind)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match=r"up_proj\.cluscomp_delta\.scale_in has NaN or infinite numbers"):
        PeftModel.from_pretrained(model, folder)
    assert_untouched(model, expected, tokens)
    from_tensors(model, folder)
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in .*up_proj\.cluscomp_delta\.scale_in"):
        model(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_file_calls_the_digest_differently(saved, adapter, base, kind, tokens):
    def rename(tensors):
        for name in [name for name in tensors if name.endswith("cluscomp_code_digest")]:
            tensors[name.replace("cluscomp_code_digest", "code_digest")] = tensors.pop(name)

    expected = logits_of(PeftModel.from_pretrained(base(kind), saved[kind]), tokens)
    folder = adapter(kind, rename)
    loaded = PeftModel.from_pretrained(base(kind), folder)
    assert torch.equal(logits_of(loaded, tokens), expected)
    assert all(value.any() for name, value in loaded.named_parameters() if "code_digest" in name)


HUGE = {"group_size": 64, "num_clusters": 65536}


@pytest.mark.parametrize("way", ["config", "mixin", "peft"])
def test_a_small_config_does_not_make_much_memory_be_allocated(adapter, base, way, tokens):
    layout = {f"model.layers.{i}.mlp.{name}_proj": HUGE for i in (0, 1) for name in ("up", "down", "gate")}
    folder = adapter("born", config={"layout": layout, "target_modules": ["up_proj", "down_proj", "gate_proj"]})
    model = base("born")
    expected = logits_of(model, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"damaged|belongs to another model"):
        if way == "config":
            get_peft_model(model, PeftConfig.from_pretrained(folder))
        elif way == "mixin":
            model.load_adapter(str(folder))
        else:
            PeftModel.from_pretrained(model, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB
    assert_untouched(model, expected, tokens)


def test_files_of_a_repository_are_checked_too(saved, adapter, base, tokens, tmp_path):
    """Through the hub's cache, laid out by hand."""
    for name, kind, change in (("good", "born", None), ("bad", "dense", drop("cluscomp_delta.scale_in"))):
        folder = adapter(kind, change)
        snapshot = tmp_path / "hub" / f"models--someone--{name}" / "snapshots" / ("0" * 40)
        shutil.copytree(folder, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    cache = {"cache_dir": str(tmp_path / "hub")}
    model = PeftModel.from_pretrained(base("born"), "someone/good", **cache)
    expected = PeftModel.from_pretrained(base("born"), saved["born"])
    assert torch.equal(logits_of(model, tokens), logits_of(expected, tokens))
    model = base("dense")
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="has no"):
        PeftModel.from_pretrained(model, "someone/bad", **cache)
    assert_untouched(model, expected, tokens)


@grid(kind=quick(KINDS, "born"))  # whose file holds most
def test_headers_and_bytes_mutated_at_random(saved, base, kind, tokens, tmp_path):
    """Either an error, or a model that computes with numbers of the shapes that were saved."""
    generator = random.Random(7)
    original = (saved[kind] / FILE).read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    model = base(kind)
    expected = logits_of(model, tokens)
    refused = 0
    for index in range(25):
        folder = tmp_path / str(index)
        shutil.copytree(saved[kind], folder)
        data = bytearray(original)
        where = generator.randrange(8, 8 + length) if index % 2 else generator.randrange(8 + length, len(data))
        data[where] ^= 1 << generator.randrange(8)
        (folder / FILE).write_bytes(bytes(data))
        try:
            loaded = PeftModel.from_pretrained(model, folder)
        except ValueError:
            refused += 1
            assert_untouched(model, expected, tokens)
            continue
        # Deltas have no digest: a bit of one of their numbers may differ, and of nothing else.
        intact = PeftModel.from_pretrained(base(kind), saved[kind])
        for (name, one), two in zip(loaded.named_parameters(), intact.parameters(), strict=True):
            assert one.shape == two.shape, name
            assert torch.equal(one, two) or "cluscomp_" in name, name
        model = base(kind)
    assert refused >= 10  # of 12 headers; a change in its metadata or padding means nothing
