"""`cluscomp finetune`: the jobs of the recipes from the command line of the wheel."""

from __future__ import annotations

import builtins
import json
import sys

import pytest

from cluscomp_peft.cli import main
from tests.conftest import BRIEF_TRAINING, WORDS, flags

SMALL = [*BRIEF_TRAINING, *flags(disable_tqdm=True)]
TEXTS = [" ".join(WORDS[3 + (i * 7 + j) % 93] for j in range(12)) for i in range(16)]


@pytest.fixture
def data(tmp_path, monkeypatch) -> dict[str, str]:
    """A file for each kind of job."""
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {
        "sft": [{"text": text} for text in TEXTS],
        "dpo": [{"prompt": text, "chosen": " w5 w6", "rejected": " w60 w61"} for text in TEXTS],
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_job_of_the_command_is_that_of_the_recipe(kind, tmp_path, compressed_dir, data, run_recipe):
    command, recipe = tmp_path / "command", tmp_path / "recipe"
    assert main(["finetune", kind, compressed_dir, str(command), "--data", data[kind], *SMALL]) == 0
    named = flags(model_name_or_path=compressed_dir, output_dir=recipe, dataset_name=data[kind])
    run_recipe(f"{kind}.py", *named, *SMALL)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (command, recipe)]
    assert weights[0] == weights[1]


def test_recovery_takes_model_and_folder_first(tmp_path, dense_dir, compressed_dir, data, capsys):
    arguments = ["finetune", "recover", compressed_dir, str(tmp_path / "out"), "--teacher", dense_dir]
    assert main([*arguments, "--data", data["sft"], "--holdout", "2"]) == 1
    assert capsys.readouterr().err == "cluscomp finetune: --holdout must be between 0 and 1, got 2.0.\n"


@pytest.mark.parametrize(
    ("kind", "flag", "near"),
    [("sft", "--learning_rat_e", "--learning_rate"), ("recover", "--kl_wieght", "--kl_weight")],
)
def test_a_wrong_flag_comes_with_the_nearest(kind, flag, near, data, capsys):
    with pytest.raises(SystemExit) as status:
        main(["finetune", kind, "model", "out", "--data", data["sft"], flag, "1"])
    err = capsys.readouterr().err
    assert status.value.code == 2
    assert err.startswith(f"usage: cluscomp finetune {kind} MODEL OUT ") and len(err.splitlines()) == 2
    assert err.endswith(f"; did you mean {near}?\n")


def test_a_file_of_data_that_is_not_there(tmp_path, compressed_dir, capsys):
    pytest.importorskip("trl")
    assert main(["finetune", "sft", compressed_dir, str(tmp_path / "out"), "--data", "absent.jsonl"]) == 1
    assert "--dataset_name absent.jsonl is no file here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_trl_the_error_says_what_to_install(monkeypatch, capsys):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "trl":
            raise ModuleNotFoundError("No module named 'trl'", name="trl")
        return imported(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("cluscomp_peft.finetune")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["finetune", "sft", "model", "out", "--data", "train.jsonl"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "needs the package trl" in err and 'pip install "cluscomp_peft[train]"' in err
