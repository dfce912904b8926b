"""recipes/benchmarks/harness.py: what was measured is written at once, never twice, and never mixed."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from tests.conftest import RECIPES

SCRIPT = """
import sys
sys.path.insert(0, {benchmarks!r})
from harness import Results, answer, arguments, child, settings_of, table
parser = arguments("A benchmark.", "toy")
parser.add_argument("--base", type=int, default=10)
options = parser.parse_args()

def measure(job):
    if job["power"] == 13:
        raise ValueError("bad luck")
    return {{"value": options.base ** job["power"]}}

if not answer(options, measure):
    results = Results(options.results, settings_of(options), options.fresh)
    print(table(results.complete([{{"power": power}} for power in (2, 13, 3)], lambda job: child(__file__, job), 2),
                {{"power": "{{power}}", "value": "{{value:.1f}}", "none": "{{none:.1f}}"}}))
    print(len(results.failed), "failed")
"""


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmarks"))
    return importlib.import_module("harness")


@pytest.mark.slow
def test_rows_are_measured_in_processes_of_their_own(harness, tmp_path, monkeypatch, capsys):
    script = tmp_path / "toy.py"
    script.write_text(SCRIPT.format(benchmarks=str(RECIPES / "benchmarks")))
    monkeypatch.setattr(sys, "argv", ["toy.py", "--results", str(tmp_path / "found"), "--base", "3"])
    scope = {"__file__": str(script), "__name__": "__main__"}
    exec(compile(script.read_text(), str(script), "exec"), scope)
    out, err = capsys.readouterr()
    expected = ["| power | value | none |", "|---|---:|---:|", "| 2 | 9.0 |  |", "| 3 | 27.0 |  |", "1 failed"]
    assert out.splitlines() == expected
    assert '{"power": 13}: ValueError: bad luck' in err
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["settings"] == {"base": 3} and {row["value"] for row in written["rows"]} == {9, 27}
    (environment,) = written["environments"]
    assert all(environment[key] for key in ("commit", "python", "torch", "transformers", "processor"))
    assert all(row["environment"] == 0 for row in written["rows"])


def test_a_run_that_was_ended_goes_on(harness, tmp_path):
    name, asked = str(tmp_path / "rows"), []

    def measure(job):
        asked.append(job["n"])
        if asked == [1, 2]:
            raise KeyboardInterrupt
        return {"square": job["n"] ** 2}

    jobs = [{"n": n} for n in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        harness.Results(name, {"seed": 0}).complete(jobs, measure)
    rows = harness.Results(name, {"seed": 0}).complete(jobs, measure)
    assert [row["square"] for row in rows] == [1, 4, 9] and asked == [1, 2, 2, 3]


def test_fresh_measures_each_job_once_more_and_keeps_the_rest(harness, tmp_path):
    name = str(tmp_path / "rows")
    harness.Results(name, {}).complete([{"n": 1}, {"n": 2}], lambda job: {"value": "old"})
    results = harness.Results(name, {}, fresh=True)
    for value in ("new", "newer"):
        results.complete([{"n": 2}], lambda job, value=value: {"value": value})
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["n"]: row["value"] for row in found} == {1: "old", 2: "new"}


def test_rows_of_other_settings_are_never_mixed_or_lost(harness, tmp_path):
    name = str(tmp_path / "rows")
    harness.Results(name, {"steps": 5, "seed": 0}).complete([{"n": 1}], lambda job: {"value": 1})
    before = (tmp_path / "rows.json").read_bytes()
    with pytest.raises(SystemExit, match=r"rows\.json holds rows of other settings \(steps\): .*--results.*--fresh"):
        harness.Results(name, {"steps": 6, "seed": 0})
    assert (tmp_path / "rows.json").read_bytes() == before
    assert harness.Results(name, {"steps": 6, "seed": 0}, fresh=True).rows == []
    assert harness.Results("-", {"steps": 6, "seed": 0}).rows == []


def test_versions_of_another_day_stay_with_their_rows(harness, tmp_path, monkeypatch):
    name = str(tmp_path / "rows")
    for commit in ("aaa", "bbb"):
        monkeypatch.setattr(harness, "environment", lambda commit=commit: {"commit": commit})
        harness.Results(name, {}).complete([{"n": commit}], lambda job: {"value": 1})
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [written["environments"][row["environment"]]["commit"] for row in written["rows"]] == ["aaa", "bbb"]


def test_settings_name_files_and_not_where_they_lie(harness, tmp_path):
    parser = harness.arguments(None, "toy")
    parser.add_argument("--data")
    options = parser.parse_args(["--data", str(tmp_path / "text.jsonl"), "--fresh"])
    assert harness.settings_of(options) == {"data": "text.jsonl"}


def test_the_results_that_are_kept_can_be_gone_on_with(harness):
    """Every file but those of scripts that are gone, or that write files of their own, has the harness's form."""
    files = sorted((RECIPES / "benchmarks" / "results").glob("*.json"))
    assert len(files) >= 15
    for path in files:
        if path.name == "gpu.json":
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        assert harness.as_text(content) == path.read_text(encoding="utf-8"), path
        assert all(0 <= row.get("environment", 0) < max(1, len(content["environments"])) for row in content["rows"])
