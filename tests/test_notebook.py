"""The notebook runs from top to bottom, small; what it shows is true, and its stored outputs can travel."""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as hf_logging

pytest.importorskip("matplotlib")
pytest.importorskip("trl")

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
MOST_BYTES = 1_500_000


def texts(cell) -> list[str]:
    """What a code cell shows, images left out."""
    found = []
    for output in cell["outputs"]:
        parts = {"text": output["text"]} if "text" in output else output.get("data", {})
        found += ["".join(value) for kind, value in parts.items() if not kind.startswith("image/")]
    return found


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The notebook's variables after its last cell."""
    import matplotlib.pyplot as plt

    verbosity = hf_logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUSCOMP_NOTEBOOK_SMALL", "1")
        patch.setenv("CLUSCOMP_NOTEBOOK_FOLDER", str(tmp_path_factory.mktemp("notebook")))
        patch.chdir(NOTEBOOK.parent)
        patch.setattr(sys, "path", list(sys.path))
        plt.switch_backend("Agg")
        namespace: dict = {"__name__": "__main__"}
        with plt.rc_context(), warnings.catch_warnings():
            for number, cell in enumerate(CODE, 1):
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), namespace)
            plt.close("all")
        sys.modules.pop("quickstart", None)
    hf_logging.set_verbosity(verbosity)
    return namespace


@pytest.mark.slow
def test_calibration_text_lowers_the_loss_and_rounding_is_worst(names):
    plain, calibrated = (names["curves"][f"codebooks, {kind}"] for kind in ("without data", "with calibration text"))
    rounded = names["curves"]["round to nearest"]
    assert [bits for bits, _ in calibrated] == pytest.approx(names["BITS"], rel=0.05)
    assert names["dense_loss"] - 0.01 < calibrated[0][1] <= plain[0][1] < rounded[0][1]
    assert [loss for _, loss in rounded] == sorted((loss for _, loss in rounded), reverse=True)


@pytest.mark.slow
def test_finetuning_lowers_the_loss_by_moving_codebooks(names):
    assert names["tuned_row"].loss < 0.9 * names["base_row"].loss
    assert [step for step, _, _ in names["watch"].points] == [0, 6, 12]
    assert names["watch"].points[-1][1] == pytest.approx(names["tuned_row"].loss, rel=1e-5)
    assert len(names["shifts"]) == 21 and min(names["shifts"].values()) > 0


@pytest.mark.slow
def test_merged_is_finetuned_at_the_same_size(names):
    assert names["difference"] == 0 and torch.equal(names["merged_logits"], names["tuned_logits"])
    assert names["size"]["merged"] == names["size"]["compressed"] and names["again"]
    assert names["merged_row"].true_bits == names["base_row"].true_bits == pytest.approx(names["base_bits"])
    assert names["merged_row"].loss == names["tuned_row"].loss


@pytest.mark.slow
def test_the_report_is_shown_as_a_page(names):
    page = names["Page"](names["folder"]("calibrated-2/report.html"))
    assert page._repr_html_().startswith("<iframe srcdoc=") and "true bits" in page._repr_html_()


def test_what_the_notebook_imports_is_there(monkeypatch):
    monkeypatch.syspath_prepend(NOTEBOOK.parents[1] / "recipes")
    trees = [ast.parse("".join(cell["source"])) for cell in CODE]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any(getattr(node, "module", None) == "cluscomp_peft" for node in imports)
    exec(compile(ast.Module(imports, []), NOTEBOOK.name, "exec"), {})


def test_stored_outputs_are_whole_and_hold_nothing_of_the_machine():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    shown = "\n".join(text for cell in CODE for text in texts(cell))
    assert "merged and finetuned: 0.0" in shown
    paths = r"(?<![\w.<:/])/(?:[a-z]+/)+[\w.]+|[A-Z]:\\|site-packages|~/"
    assert not re.findall(paths, re.sub(r"https?://\S+", "", shown))
    assert NOTEBOOK.stat().st_size < MOST_BYTES


def test_links_lead_somewhere():
    prose = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    headings = {line.lstrip("# ").replace(" ", "-") for line in prose.splitlines() if line.startswith("## ")}
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("http"):
            assert (NOTEBOOK.parent / target).exists(), target
