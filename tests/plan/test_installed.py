"""Defaults of engines: those of what is installed, and others where it is not."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlamaConfig

from cluscomp_peft.plan import Settings, installed, plan
from tests.plan.forecasts import SMALL, saved


@pytest.fixture(autouse=True)
def asked_anew():
    for function in (installed.zero, installed.states_of_8bit, installed.nf4_bits):
        function.cache_clear()
    yield
    for function in (installed.zero, installed.states_of_8bit, installed.nf4_bits):
        function.cache_clear()


def without(monkeypatch, package: str) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)


def test_the_bucket_is_that_of_the_installed_deepspeed(tmp_path, monkeypatch, capsys):
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    capsys.readouterr()

    class Newer:
        reduce_bucket_size, param_persistence_threshold, max_reuse_distance = 1000, 10, 3000

        def __init__(self, stage: int) -> None:
            assert stage == 3

    assert installed.zero().bucket == config.DeepSpeedZeroConfig(stage=3).reduce_bucket_size
    installed.zero.cache_clear()
    monkeypatch.setattr(config, "DeepSpeedZeroConfig", Newer)
    folder = saved(tmp_path, LlamaConfig(**SMALL))
    found = plan(folder, Settings(world_size=2, engine="zero2"))
    assert {part.name: part.bytes for part in found.jobs["finetune"].parts}["DeepSpeed's bucket of gradients"] == 2000
    assert any("reduce_bucket_size of 1e+03 numbers" in note for note in found.notes)
    assert capsys.readouterr().out == ""


def test_without_deepspeed_its_last_known_defaults_count(monkeypatch):
    without(monkeypatch, "deepspeed")
    assert installed.zero() == installed.Zero(500_000_000, 100_000, 1_000_000_000)


def test_gradients_that_lie_in_ddps_buckets_count_once(tmp_path, monkeypatch):
    class Views(torch.nn.Module):
        def __init__(self, module, gradient_as_bucket_view=True) -> None: ...

    folder = saved(tmp_path, LlamaConfig(**SMALL))
    settings = Settings(world_size=2, engine="ddp")
    copied = plan(folder, settings).jobs["finetune"]
    monkeypatch.setattr(installed, "DistributedDataParallel", Views)
    views = plan(folder, settings).jobs["finetune"]
    assert {part.name for part in copied.parts} - {part.name for part in views.parts} == {
        "gradients again, in buckets of DDP"
    }


@pytest.mark.parametrize("numel", [1, 4095, 4096, 4097, 1_000_003])
def test_states_and_nf4_are_those_of_bitsandbytes_and_known_without_it(monkeypatch, numel):
    pytest.importorskip("bitsandbytes")
    states, bits = installed.states_of_8bit(numel), installed.nf4_bits()
    installed.states_of_8bit.cache_clear()
    installed.nf4_bits.cache_clear()
    without(monkeypatch, "bitsandbytes")
    assert installed.states_of_8bit(numel) == states
    assert installed.nf4_bits() == pytest.approx(bits, abs=1e-3)
