"""Clustered experts of a mixture, exported: decoded into the tensors that the dense checkpoint has, or refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.cli import main
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from tests.conftest import logits_of, train_briefly
from tests.grids import grid, quick
from tests.mixtures import FAMILIES, tiny_mixture

LAYOUTS = ("mixtral", "llama4", "gpt_oss", "jetmoe")
SETTINGS = dict(group_size=2, num_clusters=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a dense mixture, and of it compressed, by family."""
    folders: dict[str, tuple[str, str]] = {}

    def make(family: str) -> tuple[str, str]:
        if family not in folders:
            dense, out = str(tmp_path_factory.mktemp(family)), str(tmp_path_factory.mktemp(family) / "out")
            tiny_mixture(family).save_pretrained(dense)
            compress_checkpoint(dense, out, ClusCompQuantizationConfig(**SETTINGS), calibration="none")
            folders[family] = dense, out
        return folders[family]

    return make


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def export(source, target, *arguments: str) -> int:
    return main(["export", str(source), str(target), "--to", "dense", *arguments])


@grid(family=quick(list(FAMILIES), *LAYOUTS), way=["command", "on the fly"])
def test_weights_are_those_that_dequantize_gives_in_the_pieces_of_the_dense_file(family, way, made, tmp_path, tokens):
    dense, source = made(family)
    if way == "on the fly":
        source = tmp_path / "source"
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=ClusCompQuantizationConfig(**SETTINGS))
        model.save_pretrained(source, max_shard_size="40KB")
    assert export(source, tmp_path / "out") == 0
    expected, found = load(source).dequantize(), load(tmp_path / "out")
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    assert torch.equal(logits_of(found, tokens), logits_of(expected, tokens))
    files = load_file(tmp_path / "out" / "model.safetensors"), load_file(f"{dense}/model.safetensors")
    assert {key: value.shape for key, value in files[0].items()} == {
        key: value.shape for key, value in files[1].items()
    }


@grid(family=LAYOUTS[:3], base=["compressed", "born", "dense"])
def test_an_adapter_is_merged_on_the_way(family, base, made, tmp_path, tokens):
    dense, compressed = made(family)
    folder = compressed if base == "compressed" else dense
    settings = {"compressed": {}, "born": SETTINGS, "dense": {**SETTINGS, "base": "dense"}}[base]
    model = get_peft_model(load(folder), ClusCompConfig(**settings, num_blocks=1))
    train_briefly(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert export(folder, tmp_path / "out", "--adapter", str(tmp_path / "adapter")) == 0
    merged = model.merge_and_unload()
    expected = (merged.dequantize() if base == "compressed" else merged).state_dict()
    found = load(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_stack_beside_one_that_stays_dense(made, tmp_path):
    dense, _ = made("mixtral")
    config = ClusCompQuantizationConfig(**SETTINGS, exclude_modules=["experts.down_proj"])
    compress_checkpoint(dense, str(tmp_path / "made"), config, calibration="none")
    assert export(tmp_path / "made", tmp_path / "out") == 0
    expected, found = load(tmp_path / "made").dequantize().state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_damage_of_one_expert_is_found(made, tmp_path, capsys):
    _, source = made("mixtral")
    load(source).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("experts.2.down_proj.codes"))
    tensors[key] = tensors[key] ^ 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert export(tmp_path / "source", tmp_path / "out") == 1
    assert "not the ones it was saved with" in capsys.readouterr().err
    del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})
    assert export(tmp_path / "source", tmp_path / "out", "--overwrite") == 1
    assert "experts.2.down_proj.codes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gguf_says_that_it_has_no_form_for_a_mixture(made, tmp_path, capsys):
    pytest.importorskip("gguf")
    assert main(["export", made("mixtral")[1], str(tmp_path / "model.gguf"), "--to", "gguf"]) == 1
    error = capsys.readouterr().err
    assert "MixtralForCausalLM has no form in GGUF here" in error and "Export it --to dense" in error
