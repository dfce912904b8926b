"""The demo runs to its end, small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.py"


@pytest.mark.slow
def test_the_quickstart_ends_with_its_table(tmp_path):
    command = [sys.executable, SCRIPT, "--output_dir", tmp_path, "--pretrain_steps", "4", "--sft_steps", "3"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.splitlines() + done.stderr.splitlines()
    assert len(printed) <= 40 and not [
        line for line in printed if "warning" in line.lower() or "|" in line.replace("||", "")
    ]
    assert [line[:3] for line in done.stdout.splitlines() if line[1:3] == "/5"] == [f"{i}/5" for i in range(1, 6)]
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if "%" in line}
    assert list(rows) == ["dense", "compressed", "finetuned", "merged"]
    assert rows["finetuned"][3] == rows["merged"][3] != rows["compressed"][3]
    assert rows["compressed"][1] == rows["merged"][1]
    assert "merged = finetuned: every logit is equal to the last bit" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"dense", "compressed", "adapter", "merged"}
