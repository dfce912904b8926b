"""A checkpoint whose tensors and config do not belong together is refused, whatever transformers would make of it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from cluscomp_peft.hf.reading import inspect_checkpoint
from tests.conftest import logits_of
from tests.hf.test_device_map import MAP

UP = "model.layers.1.mlp.up_proj."


@pytest.fixture
def damaged(compressed_dir, tmp_path):
    """A function that copies the checkpoint and changes its tensors and its quantization config."""

    def make(change=None, config=None) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(compressed_dir, folder)
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            settings = json.loads((folder / "config.json").read_text())
            config(settings["quantization_config"])
            (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


def layout_without(key: str):
    def change(config):
        for entry in config["layout"].values():
            entry.pop(key)

    return change


def entry(**fields):
    def change(config):
        config["layout"][UP.removesuffix(".")] = {**next(iter(config["layout"].values())), **fields}

    return change


def only(*names: str):
    """A layout that names some of the layers that are clustered."""

    def change(config):
        config["layout"] = {key: value for key, value in config["layout"].items() if key.endswith(names)}
        config["fingerprint"] = None

    return change


CONFIGS = {
    "no input scales": layout_without("scale_in"),
    "no output scales": layout_without("scale_out"),
    "no input scales of one layer": entry(scale_in=False),
    "more blocks": entry(num_blocks=2),
    "fewer clusters": entry(num_clusters=11),
    "another group size": entry(group_size=4),
    "another dtype": lambda config: config.update(codebook_dtype="float32"),
    "bf16": lambda config: config.update(codebook_dtype="bfloat16"),
    "some layers are dense": only("up_proj", "q_proj"),
}


def cast(tensors):
    tensors[UP + "codebook"] = tensors[UP + "codebook"].float()


def leftover_weight(tensors):
    tensors[UP + "weight"] = torch.zeros(52, 32)


def leftover_codes(tensors):
    tensors["lm_head.codes"] = torch.zeros(32, 3, dtype=torch.uint8)


def number(key: str, value: float):
    def change(tensors):
        tensors[UP + key].view(-1)[2] = value

    return change


def short(tensors):
    tensors[UP + "codes"] = tensors[UP + "codes"][:, :-1].contiguous()


TENSORS = {
    "a codebook of another dtype": cast,
    "a dense weight beside codes": leftover_weight,
    "codes of a layer that is dense": leftover_codes,
    "codes too short": short,
}
VALUES = {
    "NaN in a codebook": number("codebook", float("nan")),
    "infinity in a scale": number("scale_in", float("inf")),
    "NaN in a scale": number("scale_out", float("nan")),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_says_something_else(damaged, config):
    folder = damaged(config=config)
    for load in (AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained, lambda path: inspect(path)):
        with pytest.raises(ValueError, match="do not belong together"):
            load(folder)


def inspect(path):
    return inspect_checkpoint(str(path))


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_of_which_the_config_says_nothing(damaged, change):
    folder = damaged(change)
    for load in (AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained, inspect):
        with pytest.raises(ValueError, match="do not belong together"):
            load(folder)


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, MAP], ids=["memory", "cpu", "disk"])
@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
def test_numbers_that_are_none(damaged, change, device_map):
    with pytest.raises(ValueError, match=r"up_proj\.\w+ has NaN or infinite values"):
        AutoModelForCausalLM.from_pretrained(damaged(change), device_map=device_map)


def test_sound_checkpoints_pass_under_every_head(compressed_dir, tmp_path, tokens):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    model.model.save_pretrained(tmp_path / "body")
    for folder in (compressed_dir, tmp_path / "body", tmp_path / "shards"):
        for kind in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
            kind.from_pretrained(folder)


def test_bits_flipped_at_random(compressed_dir, tokens, tmp_path):
    """An error, or a model that differs in a codebook's, a scale's or a dense weight's number alone."""
    generator = random.Random(11)
    original = (Path(compressed_dir) / "model.safetensors").read_bytes()
    length = int.from_bytes(original[:8], "little")
    sound = AutoModelForCausalLM.from_pretrained(compressed_dir).state_dict()
    refused = 0
    for index in range(60):
        folder = tmp_path / str(index)
        shutil.copytree(compressed_dir, folder)
        data = bytearray(original)
        where = generator.randrange(8, 8 + length) if index % 2 else generator.randrange(8 + length, len(data))
        data[where] ^= 1 << generator.randrange(8)
        (folder / "model.safetensors").write_bytes(bytes(data))
        try:
            state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        except Exception as error:  # transformers has several kinds
            assert not isinstance(error, MemoryError | RecursionError), error
            refused += 1
            continue
        assert state.keys() == sound.keys()
        for name, value in state.items():
            if not torch.equal(value, sound[name]):
                assert value.shape == sound[name].shape and value.dtype == sound[name].dtype
                assert not name.endswith(".codes"), name
        shutil.rmtree(folder)
    assert refused >= 20
