"""How long each stage of a compression took, by the journal: in the report, its page, and over several runs."""

from __future__ import annotations

import json
import random
import time

import pytest

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.stream import pipeline
from cluscomp_peft.compress.stream.folder import work_folder
from tests.conftest import WORDS

CONFIG = ClusCompQuantizationConfig(bits=4)


def test_every_stage_of_a_calibrated_run(tmp_path, dense_dir):
    draw = random.Random(0)
    for name in ("text", "other"):
        (tmp_path / f"{name}.txt").write_text(" ".join(WORDS[3 + draw.randrange(93)] for _ in range(150)))
    out, text, other = (str(tmp_path / name) for name in ("out", "text.txt", "other.txt"))
    started = time.perf_counter()
    job = dict(calibration=text, samples=9, seqlen=16, epochs=1, evaluate=other)
    summary = compress_checkpoint(dense_dir, out, CONFIG, **job)
    elapsed = time.perf_counter() - started
    stages = summary["stages"]
    named = ["allocating bits", "calibrating", "clustering", "reconstructing", "writing", "evaluating"]
    assert list(stages) == named and all(seconds > 0 for seconds in stages.values())
    assert stages["evaluating"] >= summary["evaluation"]["seconds"]
    assert sum(stages.values()) <= summary["seconds"] <= elapsed
    report = json.loads((tmp_path / "out" / "cluscomp_report.json").read_text())
    assert report["summary"]["stages"] == stages
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Time by stage" in page and all(name in page for name in named)


def test_lost_work_is_left_out_and_that_of_an_earlier_run_counts(tmp_path, dense_dir, monkeypatch):
    compress, target = pipeline.compress_shard, str(tmp_path / "out")

    def stop(shard, *args):
        if shard.index == 1:
            time.sleep(1)
            raise KeyboardInterrupt
        return compress(shard, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "compress_shard", stop)
        compress_checkpoint(dense_dir, target, CONFIG, calibration="none")
    path = f"{work_folder(target)}/journal.json"
    with open(path) as file:
        journal = json.load(file)
    (first,) = journal["content"]["done"].values()
    first["stages"]["clustering"] += 1000
    first["seconds"] += 1000
    with open(path, "w") as file:
        json.dump(journal, file)
    before = first["stages"]["clustering"]
    summary = compress_checkpoint(dense_dir, target, CONFIG, calibration="none")
    assert list(summary["stages"]) == ["allocating bits", "clustering", "writing"]
    assert before < summary["stages"]["clustering"] < before + summary["elapsed"]
    assert sum(summary["stages"].values()) <= summary["seconds"] < first["seconds"] + summary["elapsed"]
