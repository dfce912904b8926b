"""Who forgets `import cluscomp_peft` gets the model all the same: PEFT and transformers find an installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import cluscomp_peft_plugin
from cluscomp_peft import registration
from tests import warm
from tests.conftest import config_for, logits_of

ROOT = Path(__file__).resolve().parents[1]
PROBE = [[3, 4, 5, 6]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> str:
    """A folder of packages with what the wheel holds."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", *map(str, ROOT.glob("cluscomp_peft_plugin.*"))):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "cluscomp_peft", source / "cluscomp_peft", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "packages")
    return str(folder / "packages")


def run(installed: str, code: str, python: str | None = None) -> list[str]:
    """Runs a program that never names this package, where the wheel is installed; returns the lines that it prints."""
    start = (
        "import site, sys\n"
        f"sys.path[:] = [{installed!r}, *(path for path in sys.path if path not in ('', {str(ROOT)!r}))]\n"
        f"site.addsitedir({installed!r})\n"  # as Python does at its start: reads the .pth file
        "assert not {'cluscomp_peft', 'peft', 'transformers'} & set(sys.modules)\n"
    )
    end = f"\nimport cluscomp_peft\nassert cluscomp_peft.__file__.startswith({installed!r}), cluscomp_peft.__file__\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python or warm.python("torch"), "-c", start + code + end],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_waiting_imports_nothing(installed):
    run(installed, "assert not {'torch', 'cluscomp_peft'} & set(sys.modules)", sys.executable)


def test_from_pretrained_and_pipelines_know_the_format(installed, compressed_dir, tmp_path):
    path = str(tmp_path / "logits.pt")
    lines = run(
        installed,
        f"""
import torch
from transformers import AutoModelForCausalLM, pipeline
torch.save(AutoModelForCausalLM.from_pretrained({compressed_dir!r})(torch.tensor({PROBE})).logits, {path!r})
made = pipeline("text-generation", model={compressed_dir!r})
print(type(made.model.model.layers[0].mlp.up_proj).__name__)
""",
    )
    expected = logits_of(AutoModelForCausalLM.from_pretrained(compressed_dir), torch.tensor(PROBE))
    assert torch.equal(torch.load(path), expected) and lines[-1] == "ClusteredLinear"


def test_peft_knows_the_method(installed, dense_dir, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(dense_dir), config_for("born", init_weights=False))
    adapter, path = str(tmp_path / "adapter"), str(tmp_path / "logits.pt")
    model.save_pretrained(adapter)
    run(
        installed,
        f"""
from peft import AutoPeftModelForCausalLM, PeftModel
import torch
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({dense_dir!r}), {adapter!r})
torch.save(model(torch.tensor({PROBE})).logits, {path!r})
""",
    )
    assert torch.equal(torch.load(path), logits_of(model, torch.tensor(PROBE)))


def test_the_plugin_waits_for_what_is_registered_with():
    assert set(cluscomp_peft_plugin.NAMES) == set(registration._REGISTER)


def test_a_package_that_cannot_be_imported_breaks_nobody_else():
    code = (
        "import sys, warnings, cluscomp_peft_plugin\n"
        "sys.modules['cluscomp_peft'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import transformers.quantizers.auto\n"
        "said = [str(entry.message) for entry in caught if 'cluscomp_peft cannot be imported' in str(entry.message)]\n"
        "assert len(said) == 1, said\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__name__ == 'Waiting']\n"
    )
    done = subprocess.run([warm.python("torch"), "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
