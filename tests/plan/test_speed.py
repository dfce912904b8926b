"""How long finetuning takes: the products of a step, and where the rate comes from."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, MixtralConfig

from cluscomp_peft.cli import main
from cluscomp_peft.plan import Settings, plan, speed
from tests.plan.forecasts import saved

LLAMA = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
WEIGHTS = 2 * (4 * 32 * 32 + 3 * 32 * 64)


def test_the_products_of_a_step(tmp_path):
    folder = saved(tmp_path, LlamaConfig(**LLAMA))
    for again, attention in ((False, 3.5), (True, 4.5)):
        settings = Settings(batch=2, seqlen=16, tokens=1000, gradient_checkpointing=again, flops=1e9)
        time = plan(folder, settings).time
        linear = (8 if again else 6) * WEIGHTS * 32
        assert time.step_flops == linear + 4 * 96 * 32 * 32 + attention * 2 * 32 * 16 * 32 * 2
        assert (time.source, time.step) == ("given", pytest.approx(time.step_flops / 1e9))
        assert time.total == pytest.approx(32 * time.step)  # 1000 tokens are 31.25 steps of 32
    shared = plan(folder, Settings(batch=2, seqlen=16, tokens=1000, flops=1e9, world_size=4)).time
    assert shared.total == pytest.approx(8 * shared.step)


def test_of_experts_those_count_that_a_token_meets(tmp_path):
    sizes = {**LLAMA, "num_key_value_heads": 4}
    both, two = (
        plan(
            saved(tmp_path / str(count), MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=count)),
            Settings(seqlen=16, flops=1e9),
        ).time.step_flops
        for count in (4, 2)
    )
    assert both - two == 8 * 16 * 2 * (2 * 3 * 32 * 64)  # 2 experts of 4 in 2 blocks


def test_an_h100_takes_what_it_took(tmp_path):
    """recipes/benchmarks/README.md: 1024 tokens in 0.70 s."""
    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    time = plan(saved(tmp_path, llama), Settings(seqlen=1024)).time
    assert time.source == "assumed" and time.step == pytest.approx(0.70, rel=0.03)


def test_the_command_measures_where_the_device_is_here(tmp_path, compressed_dir, capsys):
    arguments = ["plan", compressed_dir, "--device", "cpu", "--dtype", "float32", "--seqlen", "32", "--tokens", "320"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["time"]
    assert found["source"] == "measured" and "measured here with 32 tokens through 52 x 32" in found["why"]
    assert found["total"] == pytest.approx(10 * found["step"]) and 1e6 < found["flops_per_second"] < 1e12
    assert main([*arguments, "--flops", "2G"]) == 0
    out = capsys.readouterr().out
    assert "finetuning on 320 tokens: about" in out and "at 2.0 GFLOP/s: as given" in out
    assert plan(compressed_dir, Settings(device="cpu")).time is None  # nothing says how fast it is


def test_without_a_gpu_it_says_what_it_assumes(compressed_dir, capsys, monkeypatch):
    monkeypatch.setattr(speed, "is_here", lambda device: False)
    assert main(["plan", compressed_dir]) == 0
    assert "at 86.0 TFLOP/s: what an H100 did with Llama-3-8B; --flops says yours" in capsys.readouterr().out


@pytest.mark.parametrize("rate", ["86", "T", "-1T", "86 TB"])
def test_a_rate_has_its_unit(rate, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "x", f"--flops={rate}"])
    assert "no rate such as 86T" in capsys.readouterr().err
