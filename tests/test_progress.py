"""Lines of long work in a log: what is done, and an estimate of what is left."""

from __future__ import annotations

import re

import pytest

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""
    now = [100.0]
    monkeypatch.setattr("cluscomp_peft.progress.time.perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_work_of_an_earlier_run_is_left_out_of_the_estimate(clock, capsys):
    with Progress("Compressing", 100, done=60) as bar:
        clock(10)
        bar.advance(10)
        bar.step("block 7 of 10", always=True)
        clock(30)
        bar.advance(30)
        bar.step("block 10 of 10", always=True)
    assert capsys.readouterr().err.splitlines() == [
        "Compressing: block 7 of 10; 70 % done, about 30 s left",
        "Compressing: block 10 of 10; 100 % done",
    ]


def test_steps_that_are_quick_are_told_now_and_then(clock, capsys):
    with Progress("Evaluating", 100) as bar:
        for number in range(100):
            clock(1)
            bar.advance()
            bar.step(f"window {number + 1}")
    told = [int(re.search(r"window (\d+)", line)[1]) for line in capsys.readouterr().err.splitlines()]
    assert told == [31, 62, 93]
    with Progress("Evaluating", 1, shown=False) as bar:
        bar.step("window 1", always=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (19.96, "20.0 s"), (59.6, "60 s"), (600, "10 min"), (7560, "2.1 h")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_a_compression_tells_every_block_and_where_it_goes_on(tmp_path, dense_dir, capsys, monkeypatch):
    source = compress_checkpoint.__globals__["join_shards"]

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("cluscomp_peft.compress.checkpoint.join_shards", stop)
    config = ClusCompQuantizationConfig(bits=6)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(dense_dir, str(tmp_path / "out"), config, calibration="none")
    err = capsys.readouterr().err.splitlines()
    assert [line.partition(" in ")[0] for line in err] == [
        "Compressing: block 1 of 2",
        "Compressing: block 2 of 2",
        "Compressing: what is outside of the blocks",
    ]
    monkeypatch.setattr("cluscomp_peft.compress.checkpoint.join_shards", source)
    compress_checkpoint(dense_dir, str(tmp_path / "out"), config, calibration="none")
    assert capsys.readouterr().err.splitlines() == ["resuming: all 3 parts are there"]


def test_a_run_that_was_stopped_in_a_block_resumes_at_it(tmp_path, dense_dir, capsys, monkeypatch):
    from cluscomp_peft.compress.stream import pipeline

    compress = pipeline.compress_shard

    def stop(shard, *args):
        if shard.index == 1:
            raise KeyboardInterrupt
        return compress(shard, *args)

    config = ClusCompQuantizationConfig(bits=6)
    monkeypatch.setattr(pipeline, "compress_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(dense_dir, str(tmp_path / "out"), config, calibration="none")
    capsys.readouterr()
    monkeypatch.setattr(pipeline, "compress_shard", compress)
    compress_checkpoint(dense_dir, str(tmp_path / "out"), config, calibration="none")
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "resuming at block 2 of 2: 1 of 3 parts are there"
    assert err[1].startswith("Compressing: block 2 of 2 in ") and err[1].endswith("; 100 % done")
