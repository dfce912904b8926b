"""The README's four commands, from the built wheel, in a folder with nothing but a model and a text, print what the
README prints but for their numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import WORDS

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


def transcript() -> list[tuple[str, list[str]]]:
    """Commands of the README's console block, each with the lines below it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```console\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
    return [(parts[i], parts[i + 1].splitlines()) for i in range(0, len(parts), 2)]


def matches(printed: list[str], shown: list[str]) -> bool:
    """Whether lines are those of the README when numbers are left out; a line of … stands for any lines."""
    pattern = "".join("(?:.*\n)*" if line == "…" else re.escape(NUMBER.sub("N", line)) + "\n" for line in shown)
    return re.fullmatch(pattern, "".join(NUMBER.sub("N", line) + "\n" for line in printed)) is not None


def test_lines_are_compared_but_for_their_numbers():
    assert matches(["a 1.5 MB", "x", "y", "in 3e-05 s"], ["a 22 MB", "…", "in 4 s"])
    assert not matches(["a 1.5 MB"], ["a 1.5 kB"]) and not matches(["a"], ["a", "b"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """What `pip wheel` makes of the repository's files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    for name in listed.stdout.splitlines():
        if name.startswith(("cluscomp_peft", "setup.py", "pyproject", "README", "LICENSE", "MANIFEST")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    made = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_commands_of_the_readme_print_what_it_prints(tmp_path, wheel, dense_dir):
    pytest.importorskip("trl")
    site, work = tmp_path / "site", tmp_path / "work"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    commands = transcript()
    assert [command.split()[1] for command, _ in commands] == ["compress", "finetune", "merge", "chat"]
    model = work / commands[0][0].split()[2]
    AutoModelForCausalLM.from_pretrained(dense_dir).save_pretrained(model)
    AutoTokenizer.from_pretrained(dense_dir).save_pretrained(model)
    texts = [" ".join(WORDS[3 + (7 * i + j) % 93] for j in range(40)) for i in range(40)]
    (work / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for command, shown in commands:
        words = re.findall(r'"[^"]*"|\S+', command)
        done = subprocess.run(
            [sys.executable, str(site / "bin" / words[0]), *(word.strip('"') for word in words[1:])],
            capture_output=True,
            text=True,
            cwd=work,
            env=environment,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert matches(done.stdout.splitlines(), shown), f"{command} printed\n{done.stdout}"
    code = "import cluscomp_peft; print(cluscomp_peft.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(site))
