"""400 damaged checkpoints and adapters: each loads as if it were sound or is refused in clear words. None ends the
process, hangs, takes memory that its file does not explain, or computes something else in silence."""

from __future__ import annotations

import collections
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompQuantizationConfig
from tests import warm
from tests.conftest import config_for, tiny_llama
from tests.damage import ADAPTERS, CHECKPOINTS, KINDS, base_of
from tests.mixtures import tiny_mixture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read and limited as on Linux")
ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 60  # for one case; a hundred times what it takes
_ALL = range(CHECKPOINTS + ADAPTERS)
_SOME = [*range(0, CHECKPOINTS, 10), *range(CHECKPOINTS, CHECKPOINTS + ADAPTERS, 10)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """The folder that [`tests.damage`] takes."""
    root = tmp_path_factory.mktemp("sound")
    settings = dict(group_size=3, num_clusters=12, scales=True)
    models = {
        "compressed": (tiny_llama(), settings),
        "embeddings": (tiny_llama(tie_word_embeddings=True), {**settings, "embeddings": 6}),
        "experts": (tiny_mixture("mixtral"), settings),
    }
    for base, (model, config) in models.items():
        for folder in (base, f"{base}-other"):
            if folder != base:
                for parameter in model.parameters():
                    parameter.data += 0.1 * parameter.data.roll(1)
            dense = root / {"compressed": "dense", "compressed-other": "dense-other"}.get(folder, f"{folder}-dense")
            model.save_pretrained(dense)
            made = AutoModelForCausalLM.from_pretrained(
                dense, quantization_config=ClusCompQuantizationConfig(**config)
            )
            made.save_pretrained(root / folder)
            if folder == "compressed":
                made.save_pretrained(root / "shards", max_shard_size="20KB")
    for kind in KINDS:
        for other in ("", "-other"):
            model = AutoModelForCausalLM.from_pretrained(root / f"{base_of(kind)}{other}")
            config = config_for(kind if kind in ("born", "dense") else "compressed", init_weights=False, num_blocks=2)
            get_peft_model(model, config).save_pretrained(root / "adapters" / f"{kind}{other}")
    return root


class Worker:
    """The process, with a watch."""

    def __init__(self, root: Path, backend: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(backend == "triton"))}
        python = sys.executable if backend == "triton" else warm.python()
        self._process = subprocess.Popen(
            [python, "-W", "ignore", "-m", "tests.damage", str(root), backend],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(errors := open(root / "errors", "w+")),
            text=True,
        )
        self._errors = errors
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._next(300) == "ready\n", self._why()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _next(self, seconds: float) -> str:
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return "hangs"

    def _why(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def verdict(self, case: int) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case}\n")
        self._process.stdin.flush()
        line = self._next(_SECONDS)
        if not line.startswith("{"):
            self.end()
            return {"case": case, "verdict": "FAULT", "why": line or f"ended: {self._why()}"}
        return json.loads(line)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def verdicts(root: Path, cases, backend: str = "own") -> list[dict]:
    worker, found = Worker(root, backend), []
    try:
        for case in cases:
            if not worker.alive:
                worker = Worker(root, backend)
            found.append(worker.verdict(case))
    finally:
        worker.end()
    return found


def check(found: list[dict]) -> None:
    faults = [verdict for verdict in found if verdict["verdict"] == "FAULT"]
    assert not faults, json.dumps(faults, indent=1)
    counts = collections.Counter(verdict["verdict"] for verdict in found)
    assert counts["refused"] > len(found) / 3 and counts["same"] > 0, counts


def test_some_damage(sound):
    check(verdicts(sound, _SOME))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["own", "reference", "triton"])
def test_all_damage(sound, backend):
    check(verdicts(sound, _ALL, backend))
