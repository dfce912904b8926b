"""`cluscomp plan` for several devices: what each holds, against what torch's engines cut and gather."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GPT2Config, LlamaConfig

from cluscomp_peft.cli import main
from cluscomp_peft.plan.installed import zero
from tests.grids import grid, quick
from tests.plan.forecasts import ENGINES, GIB, LLAMA_70B, SMALL, forecast, part, parts, saved, trainable

DENSE = "embeddings, head, norms, biases"
HELD = ("codes", "codebooks and scales", DENSE, "deltas, fp32", "gradients of deltas, fp32")


def spread(capsys, folder: str, devices: int, engine: str, *flags: str) -> dict:
    return forecast(capsys, folder, *flags, "--world-size", str(devices), "--engine", engine)


@pytest.mark.slow
def test_one_device_is_what_it_was(tmp_path, capsys):
    folder = saved(tmp_path, LlamaConfig(**SMALL))
    for flags in ([], ["--gpu-memory", "1GiB"]):
        plain, one = [], []
        for arguments, lines in ((flags, plain), ([*flags, "--world-size", "1"], one)):
            assert main(["plan", folder, *arguments]) == 0
            lines += capsys.readouterr().out.splitlines()
        assert plain == one
        assert not any(word in line for line in one for word in ("devices", "world-size", *ENGINES))


def test_ddp_adds_its_buckets(tmp_path, capsys):
    folder = saved(tmp_path, LlamaConfig(**SMALL))
    alone, many = forecast(capsys, folder), spread(capsys, folder, 4, "ddp")
    extra = parts(many, "finetune").items() - parts(alone, "finetune").items()
    trained = parts(alone, "finetune")["deltas, fp32"]
    assert ("gradients again, in buckets of DDP", trained) in extra
    assert {name for name, _ in extra} == {"gradients again, in buckets of DDP", "fragmentation, 5%"}
    assert many["jobs"]["finetune"]["total"] >= alone["jobs"]["finetune"]["total"] + trained
    assert many["jobs"]["finetune_alone"] == alone["jobs"]["finetune"]
    assert forecast(capsys, folder, "--world-size", "4") == many  # the default
    more = forecast(capsys, folder, "--world-size", "64")
    assert more["jobs"]["finetune"]["total"] == many["jobs"]["finetune"]["total"]


@pytest.mark.slow
def test_70_billion_parameters_on_8_devices_of_24_gib(large, capsys):
    flags = ["--bits", "2", "--optimizer", "adamw_8bit"]
    alone = forecast(capsys, large, *flags)
    whole = parts(alone, "finetune")
    report = spread(capsys, large, 8, "fsdp2", *flags, "--gpu-memory", "24GiB")
    found = parts(report, "finetune")
    assert found["codes"] == whole["codes"] / 8  # 8192 and 28672 rows
    assert found[DENSE] == whole[DENSE] / 8
    # A codebook is one block of clusters here, which cannot be cut.
    assert 0.8 < found["codebooks and scales"] / whole["codebooks and scales"] < 1
    assert found["deltas, fp32"] == pytest.approx(whole["deltas, fp32"] / 8, rel=1e-3)
    block = whole["codes"] / 80
    assert 2 * block < part(report, "finetune", "the block at work gathered") < 3 * 2 * block
    assert part(report, "finetune", "norm and head gathered") > 2 * 2 * 32000 * 8192 + block
    assert report["jobs"]["finetune"]["total"] < 8 * GIB
    assert report["longest"] == 4096 and report["spread"] == {}
    for job in ("serve", "compress", "compress_calibrated", "qlora", "full"):
        assert report["jobs"][job] == alone["jobs"][job]
    report = spread(capsys, large, 8, "zero3", *flags)
    assert parts(report, "finetune")["codes"] == whole["codes"] / 8
    assert parts(report, "finetune")["gradients of deltas, fp32"] == pytest.approx(
        whole["gradients of deltas, fp32"] / 8, abs=4
    )
    report = spread(capsys, large, 8, "zero2", *flags)
    found = parts(report, "finetune")
    assert found["codes"] == whole["codes"]
    assert found["states of adamw_8bit"] == pytest.approx(whole["states of adamw_8bit"] / 8, rel=0.1)
    assert found["deltas in bfloat16, for blocks"] == whole["deltas, fp32"] / 2
    assert found["DeepSpeed's bucket of gradients"] == 2 * zero().bucket


@grid(engine=quick(ENGINES, "fsdp2", "zero2"))
def test_more_devices_never_hold_more_each(tmp_path, capsys, engine):
    folder = saved(tmp_path, LlamaConfig(**{**LLAMA_70B, "num_hidden_layers": 8}))
    reports = [spread(capsys, folder, devices, engine, "--bits", "2") for devices in (2, 3, 4, 8)]
    for few, many in pairwise(reports):
        for name in HELD:
            assert parts(many, "finetune")[name] <= parts(few, "finetune")[name]
        assert many["jobs"]["finetune"]["total"] <= few["jobs"]["finetune"]["total"]


@contextmanager
def fully_sharded(model: torch.nn.Module, devices: int) -> Iterator[None]:
    """Rank 0 of so many, with units as accelerate makes them. Nothing is sent: numbers are wrong, sizes are right."""
    base = model.get_base_model()
    torch.distributed.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (devices,))
        for unit in (*base.model.layers, base.model.embed_tokens, [base.model.norm, base.lm_head], model):
            fully_shard(unit, mesh=mesh)
        yield
    finally:
        torch.distributed.destroy_process_group()


@grid(split=quick([(2, 1), (8, 3), (8, 8), (5, 4)], (2, 1), (5, 4)))
def test_shares_of_fsdp2_are_those_of_torch(tmp_path, capsys, split):
    devices, blocks = split
    config = LlamaConfig(**SMALL)
    flags = ["--bits", "4", "--num-blocks", str(blocks)]
    found = parts(spread(capsys, saved(tmp_path, config), devices, "fsdp2", *flags), "finetune")
    model = trainable(config, torch.bfloat16, bits=4, num_blocks=blocks, codebook_dtype="float16")
    kinds = dict.fromkeys(("codes", "codebooks and scales", DENSE, "deltas, fp32"), 0)
    with fully_sharded(model, devices):
        for name, parameter in model.named_parameters():
            if "code_digest" in name or "cluscomp_units" in name:
                continue
            kind = "deltas, fp32" if parameter.requires_grad else DENSE
            if name.endswith(".codes"):
                kind = "codes"
            elif name.endswith((".codebook", ".scale_in", ".scale_out")) and not parameter.requires_grad:
                kind = "codebooks and scales"
            kinds[kind] += parameter.to_local().nbytes
    assert {kind: found[kind] for kind in kinds} == kinds


def peak_of_a_step(model: torch.nn.Module) -> int:
    """Bytes that a training step allocates at its peak, beyond what there was before."""
    tokens = torch.ones(1, 8, dtype=torch.int64)
    for _ in range(2):  # only the second finds gradients
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=False)
    events = profiler.profiler.kineto_results.events()
    sizes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in sizes))


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [160, 4000])
def test_what_fsdp2_gathers_is_what_torch_allocates(tmp_path, capsys, vocabulary):
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=3, vocab_size=vocabulary, head_dim=64)
    config = LlamaConfig(**{**SMALL, **sizes})
    adapter = dict(bits=6, num_blocks=1, codebook_dtype="float16")
    alone = peak_of_a_step(trainable(config, torch.float32, **adapter))
    flags = ["--bits", "6", "--num-blocks", "1", "--dtype", "float32", "--device", "cpu", "--seqlen", "8"]
    for devices in (2, 8):
        report = spread(capsys, saved(tmp_path, config), devices, "fsdp2", *flags, "--no-gradient-checkpointing")
        model = trainable(config, torch.float32, **adapter)
        with fully_sharded(model, devices):
            peak = peak_of_a_step(model)
        if vocabulary == 160:  # the peak is in a block, alone and together
            gathered = part(report, "finetune", "the block at work gathered") + part(
                report, "finetune", "its gradients"
            )
            assert peak - alone == pytest.approx(gathered, rel=0.15)
        else:  # where the head arrives, before there are logits
            kept = part(report, "finetune", "what 3 blocks keep")
            assert peak == pytest.approx(part(report, "finetune", "norm and head gathered") + kept, rel=0.1)


def test_a_tied_head_stays_gathered(tmp_path, capsys):
    for tied in (False, True):
        config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
        report = spread(capsys, saved(tmp_path / str(tied), config), 2, "fsdp2")
        gathered = [entry for entry in report["jobs"]["finetune"]["parts"] if "gathered" in entry["name"]]
        always = [entry["bytes"] for entry in gathered if entry["moment"] is None]
        assert always == ([(160 * 64 + 64) * 2] if tied else [])


@pytest.mark.slow
def test_what_would_fit_is_suggested(large, capsys):
    flags = ["plan", large, "--bits", "2", "--optimizer", "adamw_8bit", "--gpu-memory"]
    assert main([*flags, "16GiB"]) == 0
    out = capsys.readouterr().out
    report = forecast(capsys, *flags[1:], "16GiB")
    lines = [line for line in out.splitlines() if line.startswith("  --world-size")]
    assert {line.split()[3] for line in lines} == {"fsdp2", "zero3"}
    for line in lines:
        _, devices, _, engine, _, size, *_ = line.split()
        total = spread(capsys, large, int(devices), engine, *flags[2:-1])["jobs"]["finetune"]["total"]
        assert total == report["spread"][engine][devices] <= 16 * GIB
        assert f"{total / GIB:.2f}" == size
        assert all(other > 16 * GIB for count, other in report["spread"][engine].items() if int(count) < int(devices))
    assert main([*flags, "1GiB"]) == 0
    assert "no engine fits them on up to 64 devices" in capsys.readouterr().out


@pytest.mark.slow
def test_text_names_devices_engine_and_global_batch(tmp_path, capsys):
    folder = saved(tmp_path, LlamaConfig(**SMALL))
    flags = ["--world-size", "8", "--batch", "3", "--seqlen", "256", "--gpu-memory", "4GiB"]
    for engine in ENGINES:
        assert main(["plan", folder, *flags, "--engine", engine]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"batch 3 x 256 tokens on each of 8 devices with {engine} (global batch 24, 6144 tokens" in lines[1]
        assert lines[3].split()[:-1] == ["finetuning:", "each", "of", "8", "devices,", engine]
        assert any(line.startswith("finetuning in 4.00 GiB of each of 8 devices") for line in lines)
        assert any(line.startswith(f"{engine}:") for line in lines)
        assert any("serving and compressing are what one machine takes" in line for line in lines)
        assert all(len(line) <= 260 for line in lines)


@grid(engine=ENGINES, device=["cuda", "cpu"])
def test_engines_know_every_dtype_and_device(tmp_path, capsys, engine, device):
    folder = saved(tmp_path, GPT2Config(vocab_size=160, n_embd=48, n_layer=2, n_head=4, n_positions=512))
    for dtype in ("float32", "bfloat16"):
        report = spread(capsys, folder, 2, engine, "--dtype", dtype, "--device", device, "--no-gradient-checkpointing")
        job = report["jobs"]["finetune"]
        assert job["total"] == sum(entry["bytes"] for entry in job["parts"] if entry["moment"] in (None, job["peak"]))
