"""Our commands print what they have to say and nothing else: run as a process of their own, one after another."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from cluscomp_peft import quiet
from tests import warm
from tests.conftest import WORDS, flags

EXPECTED = re.compile(
    r"Compressing: (block \d of 2|what is outside of the blocks) in \d+\.\d s.*; \d+ % done(, about .* left)?"
    r"|linear weights: .* adapted .*"
    r"|.* has no chat template: it continues each line instead of answering\."
)
RUN = """
import json, sys
from cluscomp_peft.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["cluscomp", *words]
    print("$", words[0], flush=True)
    assert main() == 0, words
"""


# The warm one has imported torch, which says nothing; the slow case holds that.
@pytest.mark.parametrize("python", ["warm", pytest.param("fresh", marks=pytest.mark.slow)])
def test_no_command_says_what_other_packages_say_to_themselves(python, tmp_path, dense_dir):
    pytest.importorskip("trl")
    data, small, tuned, merged = (str(tmp_path / name) for name in ("text.jsonl", "small", "tuned", "merged"))
    with open(data, "w") as file:
        file.writelines(json.dumps({"text": " ".join(WORDS[3 + i : 15 + i])}) + "\n" for i in range(24))
    training = flags(max_steps=1, per_device_train_batch_size=2, max_length=16, save_strategy="no")
    commands = [
        ["compress", dense_dir, small, "--bits", "6", "--calibration", "none"],
        ["inspect", small],
        ["finetune", "sft", small, tuned, "--data", data, *training],
        ["evaluate", tuned, "--data", data, "--teacher", dense_dir],
        ["merge", tuned, merged],
        ["chat", merged, "--prompt", "w5 w6", "--max-new-tokens", "4"],
        ["export", merged, str(tmp_path / "dense"), "--to", "dense"],
        ["plan", small],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    words = [warm.python("torch") if python == "warm" else sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    unexpected = [line for line in done.stderr.splitlines() if not EXPECTED.fullmatch(line)]
    assert not unexpected
    assert not re.search(r"\bwarning|%\|", done.stdout, re.IGNORECASE)
    assert [line[2:] for line in done.stdout.splitlines() if line.startswith("$")] == [line[0] for line in commands]


def test_only_what_others_say_to_each_other_is_filtered():
    record = logging.makeLogRecord
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.hush()
        for module, category in (
            ("transformers.training_args", FutureWarning),
            ("trl", FutureWarning),
            ("transformers.training_args", UserWarning),
            ("cluscomp_peft.hf.quantizer", FutureWarning),
            ("transformersish", FutureWarning),
        ):
            warnings.warn_explicit("old", category, f"{module}.py", 1, module=module)
    told = [(warning.filename, warning.category) for warning in caught]
    assert told == [
        ("transformers.training_args.py", UserWarning),
        ("cluscomp_peft.hf.quantizer.py", FutureWarning),
        ("transformersish.py", FutureWarning),
    ]
    logger = logging.getLogger("DeepSpeed")
    assert not logger.filter(record({"levelno": logging.WARNING})) and logger.filter(
        record({"levelno": logging.ERROR})
    )
