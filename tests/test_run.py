"""`python -m cluscomp_peft.run`: scripts that do not know the plug-in load its checkpoints and adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from cluscomp_peft.run import main
from tests import warm
from tests.conftest import config_for, logits_of, train_briefly

# A script of somebody who never heard of this package.
SCRIPT = """
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import helper

base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits
torch.save({"logits": logits, "argv": sys.argv, "name": __name__, "helper": helper.VALUE}, out)
"""
ECHO = "import json, sys\nprint(json.dumps([__name__, *sys.argv]))\nsys.exit(3)\n"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [warm.python("torch"), "-m", "cluscomp_peft.run", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


@pytest.fixture
def argv(monkeypatch):
    """Sets the command line of this process; what the runner changes is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])


def test_a_script_that_does_not_import_the_plug_in_loads_base_and_adapter(tmp_path, compressed_dir, tokens):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(compressed_dir), config_for("compressed"))
    train_briefly(model, tokens)
    adapter, out = tmp_path / "adapter", tmp_path / "out.pt"
    model.save_pretrained(adapter)
    script = tmp_path / "scripts" / "load.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (script.parent / "helper.py").write_text("VALUE = 7\n")

    done = run(script, compressed_dir, adapter, out)
    assert done.returncode == 0, done.stderr
    result = torch.load(out)
    probe = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(result["logits"], logits_of(model, probe))
    with model.disable_adapter():
        assert not torch.equal(result["logits"], logits_of(model, probe))
    assert result["argv"] == [str(script), compressed_dir, str(adapter), str(out)]
    assert result["name"] == "__main__"
    assert result["helper"] == 7  # from beside the script


def test_a_module_runs_as_python_m_does_and_its_exit_status_is_kept(tmp_path):
    package = tmp_path / "somepackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tool.py").write_text(ECHO)
    done = run("-m", "somepackage.tool", "--flag", "value", "-m", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3, done.stderr
    name, path, *arguments = json.loads(done.stdout)
    assert (name, arguments) == ("__main__", ["--flag", "value", "-m"])
    assert os.path.samefile(path, package / "tool.py")


def test_no_script_is_a_usage_error():
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("usage: python -m cluscomp_peft.run SCRIPT")
    assert "Traceback" not in done.stderr


def test_m_without_a_module_is_a_usage_error(argv):
    argv("-m")
    with pytest.raises(SystemExit, match=r"^usage: python -m cluscomp_peft\.run"):
        main()


def test_a_script_that_is_not_there_is_named(argv, tmp_path):
    argv(tmp_path / "absent.py")
    with pytest.raises(SystemExit, match=r"absent\.py is not a file\.\nusage: "):
        main()


def test_the_exit_status_of_a_script_is_kept(argv, tmp_path, capsys):
    script = tmp_path / "fail.py"
    script.write_text(ECHO)
    argv(script, "--bits", "2")
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 3
    assert json.loads(capsys.readouterr().out) == ["__main__", str(script), "--bits", "2"]
