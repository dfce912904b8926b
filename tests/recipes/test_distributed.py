"""`recipes/sft.py` on several processes, through the engines of `recipes/configs/accelerate`, over gloo.

What a run on one process computes is the yardstick: the same losses at the same global batch, and the same adapter.
The launcher and what it launches are forks of a process that has imported them; a slow test starts them as users do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests import warm
from tests.conftest import RECIPES, WORDS, flags, logits_of

CONFIGS = RECIPES / "configs" / "accelerate"
ON_CPU = Path(__file__).parent / "distributed" / "on_cpu.py"
DENSE_BORN = Path(__file__).parent / "distributed" / "dense_born.py"
STEPS, BATCH = 20, 4
SMALL = {
    "max_length": 32,
    "learning_rate": 2e-4,
    "logging_steps": 1,
    "report_to": "none",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
SLOW_TO_RESUME = ["ddp", "zero2", "zero3"]
# Minutes over an idle machine's half: what a test allows before it takes a run for one that hangs.
PATIENCE = 400


def launch(
    script: Path, processes: int, config: Path | None, *arguments: str, python: str, **environment: str
) -> subprocess.Popen:
    """`accelerate launch` of a script on the CPU; without a config, the script alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    command = [python, str(ON_CPU), str(script), *arguments]
    if config is not None:
        start = [python, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        start += ["--num_processes", str(processes), "--main_process_port", "0"]
        command = [*start, *(command[1:] if python == sys.executable else ["--no_python", *command])]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What the run printed, when it has come to an end; it and all that it started are killed if it does not."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        # The launcher gives every rank a session of its own, out of reach of a signal to the launcher's group.
        for running in [*psutil.Process(process.pid).children(recursive=True), process]:
            running.kill()
        pytest.fail(f"the run hangs: {process.communicate()[0][-3000:]}")


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def ranks(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


class Runs:
    """Runs of the recipe on the same model and data; each is made once."""

    def __init__(self, folder: Path, base: str, python: str | None = None) -> None:
        self.folder, self.base, self.python = folder, base, python
        self.data = folder / "train.jsonl"
        texts = [" ".join(WORDS[3 + (i + j) % 8] for j in range(9 + i % 14)) for i in range(STEPS * BATCH)]
        self.data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def start(self, name: str, processes: int, engine: str | None, steps: int = STEPS, **settings) -> subprocess.Popen:
        environment = {key: settings.pop(key) for key in list(settings) if key.isupper()}
        # DeepSpeed compiles its ops behind a lock that a killed process leaves for ever, in a folder all runs share.
        environment["TORCH_EXTENSIONS_DIR"] = str(self.folder / "extensions")
        settings = {
            **SMALL,
            "model_name_or_path": self.base,
            "dataset_name": self.data,
            "output_dir": self.folder / name,
            "max_steps": steps,
            "per_device_train_batch_size": BATCH // processes,
            "save_strategy": "no",
            **settings,
        }
        cache = str(self.folder / f"cache-{name}")
        script = Path(settings.pop("script", RECIPES / "sft.py"))
        level = "deepspeed" if (engine or "").startswith("zero") else "trl"
        environment.update(HF_DATASETS_CACHE=cache, python=self.python or warm.python(level))
        return launch(script, processes, self.config(engine), *flags(**settings), **environment)

    def config(self, engine: str | None) -> Path | None:
        """The recipe's; for ZeRO-3 with a threshold of 0, above which the layers of a real model are and ours not.

        "… universal" goes on from a checkpoint that `ds_to_universal` made.
        """
        if engine not in ("zero3", "zero2 universal", "zero3 universal"):
            return engine and CONFIGS / f"{engine}.yaml"
        kind, *universal = engine.split()
        stage3 = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        settings = {
            "zero_optimization": {"stage": 3, **stage3} if kind == "zero3" else {"stage": 2},
            "checkpoint": {"load_universal": bool(universal)},
            **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
            **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
        }
        details, config = self.folder / f"{engine}.json", self.folder / f"{engine}.yaml"
        details.write_text(json.dumps(settings))
        lines = (CONFIGS / f"{kind}.yaml").read_text().splitlines()
        kept = [line for line in lines if not line.startswith(("  ", "mixed_precision"))]
        init = str(kind == "zero3").lower()
        config.write_text("\n".join([*kept, f"  deepspeed_config_file: {details}", f"  zero3_init_flag: {init}"]))
        return config

    def run(self, name: str, processes: int, engine: str | None, **settings) -> Path:
        folder = self.folder / name
        if not (folder / "trainer_state.json").exists():
            folder.mkdir(exist_ok=True)
            process = self.start(name, processes, engine, ON_CPU_REPORT=str(folder), **settings)
            output = finish(process)
            assert process.returncode == 0, output[-4000:]
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compressed_dir) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), compressed_dir)


def adapted(base: str, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


def check(runs: Runs, alone: Path, together: Path, tokens: torch.Tensor, engine: str, processes: int) -> None:
    assert losses(alone)[-1] < losses(alone)[0] - 0.1  # there was something to learn
    assert len(losses(together)) == STEPS
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    facts = ranks(together)
    assert [one["world"] for one in facts] == [processes] * processes
    assert len({one["trained"] for one in facts}) == 1
    held, total = [one["codes"] for one in facts], facts[0]["all_codes"]
    if engine in ("fsdp2", "zero3"):
        # Rows are dealt out whole, so that a rank may hold one more of each of the 14 matrices.
        assert sum(held) >= total and max(held) <= total / processes * 1.1
    else:
        assert held == [total] * processes
    one, other = adapted(runs.base, alone), adapted(runs.base, together)
    assert torch.allclose(logits_of(one, tokens), logits_of(other, tokens), atol=1e-3)
    assert not torch.allclose(logits_of(one, tokens), logits_of(one.unload(), tokens), atol=1e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(runs, tokens, engine):
    pytest.importorskip("deepspeed") if engine.startswith("zero") else None
    alone = runs.run("alone", 1, None)
    check(runs, alone, runs.run(engine, 2, engine), tokens, engine, 2)


@pytest.mark.slow
def test_processes_that_import_for_themselves_train_as_one(tmp_path, compressed_dir, tokens):
    runs = Runs(tmp_path, compressed_dir, sys.executable)
    check(runs, runs.run("alone", 1, None), runs.run("ddp", 2, "ddp"), tokens, "ddp", 2)


def check_dense_born(
    runs: Runs, dense: str, tokens: torch.Tensor, engine: str, kind: str, adapter: Path | None = None
) -> None:
    settings = {
        "script": DENSE_BORN,
        "model_name_or_path": dense,
        "kind": kind,
        "use_cpu": not engine.startswith("zero"),
    }
    if adapter is not None:
        settings["adapter"], kind = adapter, f"{kind}-further"
    alone = runs.run(f"{kind}-alone", 1, None, **settings)
    together = runs.run(f"{kind}-{engine}", 2, engine, **settings)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    config, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (alone, together))
    assert config["carries_codes"] and config["fingerprint"] == other["fingerprint"] is not None
    assert len({one["trained"] for one in ranks(together)}) == 1
    one, two = adapted(dense, alone), adapted(dense, together)
    assert torch.allclose(logits_of(one, tokens), logits_of(two, tokens), atol=1e-3)


def test_dense_layers_are_dealt_out_and_saved_whole(runs, dense_dir, tokens):
    check_dense_born(runs, dense_dir, tokens, "fsdp2", "clustered")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clustered", "dense"])
@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_on_dense_models(runs, dense_dir, tokens, engine, kind):
    check_dense_born(runs, dense_dir, tokens, engine, kind)


def test_partitioned_dense_layers_are_gathered_and_their_codes_saved(runs, dense_dir, tokens):
    pytest.importorskip("deepspeed")
    check_dense_born(runs, dense_dir, tokens, "zero3", "dense")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clustered", "dense"])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_saved_adapter_brings_its_codes(runs, dense_dir, tokens, engine, kind):
    check_dense_born(runs, dense_dir, tokens, "ddp", kind)
    check_dense_born(runs, dense_dir, tokens, engine, kind, runs.folder / f"{kind}-alone")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_train_as_one(runs, tokens, engine):
    pytest.importorskip("deepspeed") if engine.startswith("zero") else None
    alone = runs.run("alone", 1, None)
    check(runs, alone, runs.run(f"{engine}-4", 4, engine), tokens, engine, 4)


def where_to_resume(engine: str, checkpoint: Path) -> str | None:
    """The engine for one process to go on with; DeepSpeed's checkpoints are made independent of their number."""
    if not engine.startswith("zero"):
        return "fsdp2" if engine == "fsdp2" else None
    step = checkpoint / "global_step10"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(step), "--output_folder", f"{step}_universal"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return f"{engine} universal"


@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW_TO_RESUME)])
def test_a_killed_rank_ends_the_run_and_its_checkpoint_resumes_elsewhere(runs, engine):
    """Rank 1 of 2 is killed inside step 13; one process goes on from step 10 (FSDP2's, sharding alone)."""
    pytest.importorskip("deepspeed") if engine.startswith("zero") else None
    alone = runs.run("alone", 1, None)
    started = time.monotonic()
    checkpoints = {"save_strategy": "steps", "save_steps": 5, "gradient_checkpointing": True}
    name = f"killed-{engine}"
    process = runs.start(name, 2, engine, **checkpoints, ON_CPU_KILL="1:13")
    output = finish(process)
    assert process.returncode != 0
    assert "exitcode  : -9" in output, output[-3000:]
    assert time.monotonic() - started < PATIENCE
    folder = runs.folder / name
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]
    checkpoint = folder / "checkpoint-10"
    process = runs.start(name, 1, where_to_resume(engine, checkpoint), resume_from_checkpoint=checkpoint)
    output = finish(process)
    assert process.returncode == 0, output[-4000:]
    assert losses(folder)[:10] == pytest.approx(losses(alone)[:10], rel=1e-4)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)
