"""Shards become files of the hub's usual size: no tensor changes, and a run that is killed meanwhile goes on."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.stream import joined
from cluscomp_peft.compress.stream.headers import read_header
from tests.conftest import logits_of


@pytest.fixture
def shards(tmp_path):
    """Four files of 1000 to 1003 bytes, whose odd numbers of bytes would misplace the floats of the next."""
    made = {}
    for number in range(4):
        tensors = {
            f"{number}.codes": torch.randint(0, 255, (601 + number,), dtype=torch.uint8),
            f"{number}.codebook": torch.randn(3, 33, dtype=torch.float64).half(),
            f"{number}.norm": torch.randn(50),
            f"{number}.steps": torch.tensor(number, dtype=torch.uint8),
        }
        name = f"model-{number + 1:05d}-of-00004.safetensors"
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
        made[name] = {key: tensor.nbytes for key, tensor in tensors.items()}
    return made


def contents(folder) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_one_file_is_what_the_library_writes(tmp_path, shards):
    before = contents(tmp_path)
    assert joined.join_shards(str(tmp_path), shards).keys() == {"model.safetensors"}
    assert os.listdir(tmp_path) == ["model.safetensors"]
    save_file(before, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("most", "counts"), [(2100, [2, 2]), (3100, [3, 1]), (999, [1, 1, 1, 1])])
def test_neighbours_share_a_file_up_to_its_size(tmp_path, shards, monkeypatch, most, counts):
    monkeypatch.setattr(joined, "_MOST", most)
    before = contents(tmp_path)
    files = joined.join_shards(str(tmp_path), shards)
    assert sorted(files) == sorted(os.listdir(tmp_path))
    assert [len(keys) // 4 for keys in files.values()] == counts
    assert list(files)[-1] == f"model-{len(counts):05d}-of-{len(counts):05d}.safetensors"
    for name, keys in files.items():
        found = load_file(tmp_path / name)
        assert {key: value.nbytes for key, value in found.items()} == keys
        assert len(keys) == 4 or sum(keys.values()) <= most
        for header in read_header(str(tmp_path / name)).values():
            assert header.begin % joined.DTYPES[header.dtype].itemsize == 0
    after = contents(tmp_path)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("survived", range(4))
def test_it_goes_on_where_it_was_killed(tmp_path, shards, monkeypatch, survived):
    """Killed before its n-th change of a name or removal of a file."""
    monkeypatch.setattr(joined, "_MOST", 2100)
    before, replace, remove, left = contents(tmp_path), os.replace, os.remove, [survived]

    def counted(change):
        def work(*paths):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            change(*paths)

        return work

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", counted(replace))
        patch.setattr(os, "remove", counted(remove))
        joined.join_shards(str(tmp_path), shards)
    for path in tmp_path.glob("*.tmp"):
        path.unlink()  # as the journal does when the run goes on
    files = joined.join_shards(str(tmp_path), shards)
    assert sorted(files) == sorted(os.listdir(tmp_path)) and len(files) == 2
    after = contents(tmp_path)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_no_more_than_a_piece_is_read_at_once(tmp_path, shards, monkeypatch):
    read, sizes = joined._copy, []
    monkeypatch.setattr(joined, "_PIECE", 100)

    class Watched:
        def __init__(self, file):
            self.file, self.name = file, file.name

        def read(self, count):
            sizes.append(count)
            return self.file.read(count)

    monkeypatch.setattr(joined, "_copy", lambda source, target, count: read(Watched(source), target, count))
    joined.join_shards(str(tmp_path), shards)
    assert max(sizes) == 100 and sum(sizes) == sum(map(sum, (keys.values() for keys in shards.values())))


def test_a_disk_that_is_full_meanwhile(tmp_path, dense_dir, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config, target = ClusCompQuantizationConfig(bits=6), str(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="is full; make room there"):
        patch.setattr(joined, "_copy", full)
        compress_checkpoint(dense_dir, target, config, calibration="none")
    compress_checkpoint(dense_dir, target, config, calibration="none")
    assert os.listdir(tmp_path) == ["out"] and load_file(f"{target}/model.safetensors")


def test_a_checkpoint_of_several_files_is_the_same_model(tmp_path, dense_dir, tokens, monkeypatch):
    config = ClusCompQuantizationConfig(bits=4)
    models = []
    for name, most in (("one", joined._MOST), ("several", 30_000), ("blocks", 0)):
        monkeypatch.setattr(joined, "_MOST", most)
        compress_checkpoint(dense_dir, str(tmp_path / name), config, calibration="none")
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    assert [len(list((tmp_path / name).glob("*.safetensors"))) for name in ("one", "several", "blocks")] == [1, 2, 3]
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    for name in ("several", "blocks"):
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / name).glob("*.safetensors")}
    assert all(torch.equal(logits_of(model, tokens), logits_of(models[0], tokens)) for model in models)
