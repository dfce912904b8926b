"""`--json`: standard output is one object, whatever trainers and progress print beside it."""

from __future__ import annotations

import json
import sys

import pytest

from cluscomp_peft.cli import main
from cluscomp_peft.quiet import one_object
from tests.conftest import BRIEF_TRAINING, WORDS, flags

SEEN = flags(eval_strategy="steps", eval_steps=2)


@pytest.fixture
def one(capsys):
    """Runs a command and returns the object that it prints."""

    def run(*arguments: str) -> dict:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return run


def test_what_others_print_goes_to_the_other_output(capsys):
    with one_object() as result:
        print("a line of a library")
        result["value"] = 1
    assert capsys.readouterr() == ('{"value": 1}\n', "a line of a library\n")
    with pytest.raises(ValueError), one_object() as result:
        result["value"] = 1
        raise ValueError
    with one_object(wanted=False) as result:
        print("text")
        result["value"] = 1
    assert capsys.readouterr().out == "text\n"


def test_a_job_from_finetuning_to_export(tmp_path, compressed_dir, monkeypatch, one):
    pytest.importorskip("trl")
    import deepspeed  # noqa: F401  (prints as it is imported, which `hush` keeps out of a command's own process)

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data, tuned, merged, dense = (str(tmp_path / name) for name in ("text.jsonl", "tuned", "merged", "dense"))
    with open(data, "w") as file:
        file.writelines(json.dumps({"text": " ".join(WORDS[3 + i : 15 + i])}) + "\n" for i in range(24))
    done = one(
        "finetune",
        "sft",
        compressed_dir,
        tuned,
        "--data",
        data,
        "--merge",
        "--dataset_test",
        data,
        *BRIEF_TRAINING,
        *SEEN,
    )
    assert (done["adapter"], done["base"], done["merged"]) == (tuned, compressed_dir, f"{tuned}/merged")
    assert done["steps"] == 2 and 0 < done["train_loss"] < 20 and 0 < done["eval_loss"] < 20 and done["seconds"] > 0
    assert done["trained"] > 0 and done["merged_bits"] >= done["true_bits"] > 1
    joined = one("merge", tuned, merged)
    assert joined["folder"] == merged and joined["true_bits"] == pytest.approx(done["merged_bits"])
    said = one("chat", merged, "--prompt", "w7 w8", "--temperature", "0", "--max-new-tokens", "4")
    assert said["model"] == merged and said["prompt"] == "w7 w8" and len(said["answer"].split()) > 1
    plain = one("export", merged, dense, "--to", "dense")
    assert plain["folder"] == dense and plain["matrices"] == 14 and plain["dtype"] == "float32"


def test_recovery(tmp_path, dense_dir, compressed_dir, one):
    data = tmp_path / "text.txt"
    data.write_text(" ".join(WORDS[3 + (7 * i) % 93] for i in range(400)))
    job = [compressed_dir, str(tmp_path / "out"), "--teacher", dense_dir, "--data", str(data)]
    done = one("finetune", "recover", *job, *flags(steps=3, evaluations=1, seqlen=32, learning_rate=1e-4))
    assert done["folder"] == str(tmp_path / "out") and done["after"]["kl"] < done["before"]["kl"]


def test_gguf(tmp_path, shared, one):
    pytest.importorskip("gguf")
    source = str(shared / "models" / "tinystories-656k")
    small, file = str(tmp_path / "small"), str(tmp_path / "model.gguf")
    one("compress", source, small, "--calibration", "none", "--quality", "fast")
    done = one("export", small, file, "--to", "gguf", "--type", "F16")
    assert done["file"] == file and done["type"] == "F16" and done["tensors"] > 10


def test_a_conversation_is_no_object(compressed_dir, capsys):
    assert main(["chat", compressed_dir, "--json"]) == 1
    assert "give it with --prompt" in capsys.readouterr().err


def test_an_error_leaves_standard_output_empty(tmp_path, compressed_dir, capsys):
    pytest.importorskip("trl")
    data = str(tmp_path / "absent.jsonl")
    assert main(["finetune", "sft", compressed_dir, str(tmp_path / "out"), "--data", data, "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("cluscomp finetune:") and sys.stdout is not sys.stderr
