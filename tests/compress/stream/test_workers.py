"""Compressing in several processes: the bytes of one, whatever is killed on the way, and nobody left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.stream import workers as module
from cluscomp_peft.compress.stream.workers import visible_devices
from tests import warm
from tests.conftest import tiny_llama

TIMED = {"cluscomp_report.json", "report.html", "README.md"}
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")


def quick_config() -> ClusCompQuantizationConfig:
    return ClusCompQuantizationConfig(bits=5.0, quality="fast")


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer) -> str:
    """Five blocks, and embeddings beside them."""
    folder = str(tmp_path_factory.mktemp("dense"))
    tiny_llama(num_hidden_layers=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, dense) -> str:
    """What one process makes of it."""
    target = str(tmp_path_factory.mktemp("alone") / "out")
    compress_checkpoint(dense, target, quick_config())
    return target


def contents(folder) -> dict[str, bytes]:
    """Files of a checkpoint, without those that name times."""
    return {name: Path(folder, name).read_bytes() for name in sorted(set(os.listdir(folder)) - TIMED)}


def timeless(folder) -> dict:
    """The report, without times and memory."""
    report = json.loads(Path(folder, "cluscomp_report.json").read_text())
    for key in ("seconds", "stages", "peak_memory"):
        del report["summary"][key]
    return report


def children(pid: int) -> list[int]:
    """Spawned workers of a process; the tracker of its shared resources is none."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The command, which waits for a line after the first shard: whatever the machine's load, it is then at work.
PAUSING = """
import sys
from cluscomp_peft.cli import main
from cluscomp_peft.compress.stream.journal import Journal
commit = Journal.commit
def pausing(self, **content):
    commit(self, **content)
    if content.get("done"):
        Journal.commit = commit
        print("at work", flush=True)
        sys.stdin.readline()
Journal.commit = pausing
sys.exit(main())
"""


def started(source: str, target: Path) -> tuple[subprocess.Popen, list[int]]:
    """A run with two workers that has finished a shard and has more to do, and the workers; waits for a line."""
    arguments = ["compress", source, str(target), "--bits", "4", "--workers", "2", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSING, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "at work\n", process.communicate()
    return process, children(process.pid)


def shards_done(target: Path) -> int:
    """Shards that the journal of a run at work names."""
    try:
        journal = json.loads((target.parent / f".{target.name}.partial" / "journal.json").read_text())
    except (OSError, ValueError):
        return 0
    return len(journal["content"].get("done", {}))


@pytest.fixture
def warm_workers():
    """Workers that have imported the libraries already."""
    before = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(warm.python())
    yield
    multiprocessing.set_executable(before)


def test_the_bytes_are_those_of_one_process(dense, alone, tmp_path, warm_workers):
    target = str(tmp_path / "out")
    summary = compress_checkpoint(dense, target, quick_config(), workers=3)
    assert contents(target) == contents(alone)
    assert timeless(target) == timeless(alone)
    assert summary["peak_memory"] > 3 * 100e6  # that of the workers counts
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_other_workers_go_on_where_some_ended(dense, alone, tmp_path, monkeypatch):
    target = str(tmp_path / "out")

    class Stop(BaseException):
        pass

    def stop(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_peft.compress.checkpoint.join_shards", stop)
        with pytest.raises(Stop):
            compress_checkpoint(dense, target, quick_config(), workers=2)
    work = tmp_path / ".out.partial"
    journal = json.loads((work / "journal.json").read_text())
    for shard in list(journal["content"]["done"])[1:3]:
        del journal["content"]["done"][shard]
        os.remove(work / shard)
    (work / "journal.json").write_text(json.dumps(journal))
    compress_checkpoint(dense, target, quick_config(), workers=3)
    assert contents(target) == contents(alone) and timeless(target) == timeless(alone)


@pytest.mark.slow
@needs_proc
def test_a_killed_worker_ends_the_run_and_the_next_one_finishes_it(dense, tmp_path, capsys):
    target = tmp_path / "out"
    process, victims = started(dense, target)
    os.kill(victims[0], signal.SIGKILL)
    out, err = process.communicate("go on\n")
    line = err.strip().splitlines()[-1]
    assert process.returncode == 1 and out == "" and "Traceback" not in err
    assert f"process {victims[0]}) was killed by signal 9 while it made model-0000" in line
    assert "run the same command again" in line
    assert not any(running(pid) for pid in victims)
    assert os.listdir(tmp_path) == [".out.partial"]

    config = ClusCompQuantizationConfig(bits=4)
    compress_checkpoint(dense, str(target), config, device="cpu")
    assert "resuming at " in capsys.readouterr().err
    compress_checkpoint(dense, str(tmp_path / "whole"), config, device="cpu")
    assert contents(target) == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_do_not_outlive_the_run(how, dense, tmp_path):
    target = tmp_path / "out"
    process, workers = started(dense, target)
    assert len(workers) == 2
    process.send_signal(how)
    _, err = process.communicate()  # until nobody holds the other end, workers included
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in err
    while any(running(pid) for pid in workers):
        time.sleep(0.02)
    assert shards_done(target) >= 1


def test_what_a_worker_finds_wrong_is_said_as_by_one_process(dense, tmp_path, warm_workers):
    source = tmp_path / "broken"
    source.mkdir()
    for name in os.listdir(dense):
        (source / name).write_bytes(Path(dense, name).read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.4\.mlp\.up_proj has 1 NaN") as caught:
        compress_checkpoint(str(source), str(tmp_path / "out"), quick_config(), workers=2)
    assert any("in cut_into_vectors" in note for note in caught.value.__notes__)
    left = set(os.listdir(tmp_path)) - {"broken"}
    assert not left or (left == {".out.partial"} and shards_done(tmp_path / "out") >= 1)


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "2"])
def test_numbers_that_are_none_are_refused(workers, dense, tmp_path):
    with pytest.raises(ValueError, match="workers must be a whole number of at least 1, got"):
        compress_checkpoint(dense, str(tmp_path / "out"), quick_config(), workers=workers)
    assert os.listdir(tmp_path) == []


def test_calibration_goes_block_by_block(dense, tmp_path):
    with pytest.raises(ValueError, match=r"workers=2 and calibration do not go together.*Leave out --workers"):
        compress_checkpoint(dense, str(tmp_path / "out"), quick_config(), workers=2, calibration="text.txt")


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_about_it(dense, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from cluscomp_peft import ClusCompQuantizationConfig\n"
        "from cluscomp_peft.compress.checkpoint import compress_checkpoint\n"
        f"compress_checkpoint({dense!r}, {str(tmp_path / 'out')!r}, ClusCompQuantizationConfig(bits=5), workers=2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'do so under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_errors_that_cannot_travel_keep_their_text():
    class Local(Exception):
        pass

    for error, kind in ((Local("no room"), RuntimeError), (OSError(28, "No space left", "x"), OSError)):
        try:
            raise error
        except Exception as caught:
            made = module._portable(caught)
        assert type(made) is kind and str(error) in str(made) and "test_workers" in made.__notes__[0]
    assert made.errno == 28


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    every = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert visible_devices(None) == visible_devices("cuda") == every
    assert visible_devices("cuda:1") == every[1:]
    assert visible_devices("cpu") == [torch.device("cpu")]
    with pytest.raises(ValueError, match="cuda:2 is not there, PyTorch sees 2 GPUs"):
        visible_devices("cuda:2")
    with pytest.raises(ValueError, match="cpu, cuda or cuda:N, got 'abacus'"):
        visible_devices("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert visible_devices(None) == [torch.device("cpu")]
