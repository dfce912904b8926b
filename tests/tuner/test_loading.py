"""What an adapter goes through while it is loaded is kept in its layers: configs stay the data that they were."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompConfig
from cluscomp_peft.tuner.clustered_layer import ClusCompLinear
from tests.conftest import config_for, load, logits_of
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
def saved(kind, base, tokens, tmp_path):
    """A saved adapter: its model, its folder and its logits."""
    model = get_peft_model(base(), config_for(kind, num_blocks=2, init_weights=False))
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved", logits_of(model, tokens)


def written(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_loading_leaves_the_config_that_was_read_as_it_was(saved, base, tokens):
    _, folder, expected = saved
    config = ClusCompConfig.from_pretrained(folder)
    before = config.to_dict()
    assert config.is_saved and config.fingerprint == written(folder)["fingerprint"]
    for _ in range(2):  # so it serves a second model
        model = PeftModel.from_pretrained(base(), folder, config=config)
        assert torch.equal(logits_of(model, tokens), expected)
        assert {**config.to_dict(), "inference_mode": before["inference_mode"]} == before
        assert not model.peft_config["default"].is_saved


def test_a_refused_adapter_leaves_its_config_as_it_was(saved, kind, dense_dir, compressed_dir):
    _, folder, _ = saved
    config = PeftConfig.from_pretrained(folder)
    before = config.to_dict()
    other = AutoModelForCausalLM.from_pretrained(dense_dir if kind == "compressed" else compressed_dir)
    with pytest.raises(ValueError, match=r"compressed model|carries its own codes|needs dense weights"):
        get_peft_model(other, config)
    theirs = {
        "base_model_name_or_path": before["base_model_name_or_path"]
    }  # PEFT notes the model that it was tried on
    assert {**config.to_dict(), **theirs} == before


def test_saving_writes_facts_into_the_file_and_not_into_the_config(saved):
    model, folder, _ = saved
    config = model.peft_config["default"]
    assert len(written(folder)["fingerprint"]) == 32 and written(folder)["layout"]
    assert (config.fingerprint, config.codebook_fingerprint, config.layout) == (None, None, {})
    assert not config.is_saved and not config.carries_codes


@grid(kind=KINDS, way=["mixin", "state dict"])
def test_loaders_that_call_nobody_end_in_an_adapter_like_any_other(saved, base, way, tokens, tmp_path):
    model, folder, expected = saved
    if way == "mixin":
        loaded = base()
        loaded.load_adapter(str(folder), is_trainable=True)
    else:
        waiting = get_peft_model(base(), PeftConfig.from_pretrained(folder))
        with pytest.raises(RuntimeError, match="weights were not loaded"):
            waiting(tokens)
        loaded = copy.deepcopy(waiting)  # still without numbers
        loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(loaded, tokens), expected)
    loaded.save_pretrained(tmp_path / "again")
    facts = ("layout", "fingerprint", "codebook_fingerprint", "carries_codes")
    again, first = written(tmp_path / "again"), written(folder)
    assert [again[key] for key in facts] == [first[key] for key in facts]
    config = loaded.peft_config["default"]
    loaded.add_adapter(config, "new") if way == "mixin" else loaded.add_adapter("new", config)
    loaded.set_adapter("new")
    assert torch.isfinite(logits_of(loaded, tokens)).all()


@pytest.mark.parametrize("kind", ["compressed", "born"], indirect=True)
def test_digests_that_no_process_can_read_are_those_that_came_with_the_adapter(saved, base, tmp_path, monkeypatch):
    """FSDP2 may spread the codes of a base over processes before anybody has read them as a whole."""
    _, folder, _ = saved
    loaded = base()
    loaded.load_adapter(str(folder))
    monkeypatch.setattr(ClusCompLinear, "fingerprint", lambda layer: None)
    monkeypatch.setattr(ClusCompLinear, "codebook_fingerprint", lambda layer: None)
    loaded.save_pretrained(tmp_path / "again")
    for key in ("fingerprint", "codebook_fingerprint"):
        assert written(tmp_path / "again")[key] == written(folder)[key]
