"""The `cluscomp` command, in process: compress, inspect, evaluate."""

from __future__ import annotations

import json
import math
import os
import re
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp_peft import ClusCompQuantizationConfig, ClusteredLinear
from cluscomp_peft.cli import main
from cluscomp_peft.compress.calibration.text import read_documents, token_windows
from tests.conftest import WORDS, config_for, logits_of, tiny_llama, train_briefly

PARTS = ("codes", "codebook", "scale_in", "scale_out")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": " ".join(WORDS[3 + (i * 7 + j) % 93] for j in range(12))} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, dense_dir) -> str:
    """What `cluscomp compress` makes of the dense model."""
    folder = str(tmp_path_factory.mktemp("cli") / "made")
    assert main(["compress", dense_dir, folder, "--bits", "6", "--scales"]) == 0
    return folder


@pytest.fixture
def adapter(tmp_path, made, tokens) -> str:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(made), config_for("compressed", num_blocks=2))
    train_briefly(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def failing(capsys):
    """Runs a command that must fail; returns the one line that it prints."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 1
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("cluscomp ")]
        assert out == "" and len(lines) == 1 and "Traceback" not in err
        assert err.rstrip().endswith(lines[0])  # nothing follows it
        return lines[0]

    return run


def output_of(capsys, *arguments: str) -> dict:
    """The JSON that a command prints, which must be all that it prints."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def contents(folder) -> dict[str, bytes]:
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def clustered(folder: str) -> dict[str, ClusteredLinear]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: module for name, module in model.named_modules() if isinstance(module, ClusteredLinear)}


# -- compress


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--bits", "6"], dict(bits=6)),
        (["--bits", "5.5", "--no-scales", "--seed", "3"], dict(bits=5.5, scales=False, seed=3)),
        (
            ["--group-size", "3", "--num-clusters", "12", "--scales", "--codebook-dtype", "float32"],
            dict(group_size=3, num_clusters=12, scales=True, codebook_dtype="float32"),
        ),
        (["--bits", "6", "--quality", "fast"], dict(bits=6, quality="fast")),
    ],
)
def test_compress_makes_what_loading_with_the_same_settings_does(tmp_path, dense_dir, tokens, capsys, flags, settings):
    target = str(tmp_path / "out")
    assert main(["compress", dense_dir, target, *flags, "--device", "cpu"]) == 0  # where loading clusters it
    line = capsys.readouterr().out
    assert line.startswith(f"{target}: 14 matrices at ") and line.count("\n") == 5
    assert "\nlinear weights: 16,128 of 19,200 clustered (84.0 %); dense: lm_head " in line

    on_the_fly = AutoModelForCausalLM.from_pretrained(
        dense_dir, quantization_config=ClusCompQuantizationConfig(**settings)
    )
    model = AutoModelForCausalLM.from_pretrained(target)
    expected, found = on_the_fly.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())
    assert torch.equal(logits_of(model, tokens), logits_of(on_the_fly, tokens))
    assert AutoTokenizer.from_pretrained(target)("w1 w2")["input_ids"] == [4, 5]


def test_bits_are_a_bound_for_every_matrix_and_group_size_is_taken_literally(tmp_path, dense_dir, made):
    assert all(4.5 < layer.true_bits <= 6 for layer in clustered(made).values())
    target = str(tmp_path / "out")
    assert main(["compress", dense_dir, target, "--group-size", "3", "--num-clusters", "12"]) == 0
    assert {tuple(layer.codebook.shape) for layer in clustered(target).values()} == {(1, 12, 3)}


def test_compress_leaves_a_card_and_a_report(made, dense_dir):
    assert {"README.md", "cluscomp_report.json", "config.json", "model.safetensors"} <= set(os.listdir(made))
    with open(os.path.join(made, "cluscomp_report.json")) as file:
        report = json.load(file)
    assert report["matrices"].keys() == clustered(made).keys()
    assert report["summary"]["source"] == dense_dir
    assert report["summary"]["calibration"] is None
    assert report["summary"]["bytes"] == os.path.getsize(os.path.join(made, "model.safetensors"))
    with open(os.path.join(made, "README.md")) as file:
        card = file.read()
    assert "import cluscomp_peft" in card and f"{report['summary']['true_bits']:.3f}" in card


@pytest.fixture
def loud_dir(tmp_path, tokenizer) -> str:
    """A dense model whose layers get a few channels that are far louder than the others, as real models' do."""
    model = tiny_llama()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::8] = 10
    model.save_pretrained(tmp_path / "loud")
    tokenizer.save_pretrained(tmp_path / "loud")
    return str(tmp_path / "loud")


def test_calibration_lowers_the_error_of_the_outputs(tmp_path, loud_dir, text, tokenizer):
    plain, weighted = str(tmp_path / "plain"), str(tmp_path / "weighted")
    settings = ["--group-size", "2", "--num-clusters", "16", "--codebook-dtype", "float32"]
    assert main(["compress", loud_dir, plain, *settings]) == 0
    assert main(["compress", loud_dir, weighted, *settings, "--calibration", text]) == 0
    with open(os.path.join(weighted, "cluscomp_report.json")) as file:
        assert json.load(file)["summary"]["calibration"] == os.path.basename(text)

    dense = AutoModelForCausalLM.from_pretrained(loud_dir)
    name = "model.layers.0.mlp.gate_proj"
    inputs = []
    dense.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    logits_of(dense, token_windows(read_documents(text), tokenizer, 64)[-2])
    weight = dense.get_submodule(name).weight.detach()
    error = {
        folder: float((inputs[0] @ (clustered(folder)[name].decode() - weight).T).square().sum())
        for folder in (plain, weighted)
    }
    assert error[weighted] < 0.8 * error[plain]


def test_samples_bound_the_calibration_text(tmp_path, dense_dir, text):
    # A sample is one window of the model's 64 positions, so one sample is the first 64 tokens of the file.
    head = tmp_path / "head.jsonl"
    with open(text) as file:
        head.write_text("".join(file.readlines()[:5]))  # 65 tokens with EOS
    settings = ["--group-size", "3", "--num-clusters", "12"]
    weights = []
    for path, samples in ((text, "1"), (str(head), "1"), (text, "4")):
        target = str(tmp_path / f"out{len(weights)}")
        assert main(["compress", dense_dir, target, *settings, "--calibration", path, "--samples", samples]) == 0
        weights.append(contents(target)["model.safetensors"])
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_the_same_seed_gives_the_same_bytes(tmp_path, dense_dir):
    weights = []
    for seed in ("5", "5", "6"):
        target = str(tmp_path / f"out{len(weights)}")
        arguments = ["--group-size", "3", "--num-clusters", "12", "--seed", seed]
        assert main(["compress", dense_dir, target, *arguments]) == 0
        weights.append(contents(target)["model.safetensors"])
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_dtype_is_that_of_what_stays_dense(tmp_path, dense_dir):
    target = str(tmp_path / "out")
    assert main(["compress", dense_dir, target, "--bits", "6", "--dtype", "bfloat16"]) == 0
    tensors = load_file(os.path.join(target, "model.safetensors"))
    floats = {key: value.dtype for key, value in tensors.items() if key.rpartition(".")[2] not in PARTS}
    assert len(floats) == 7 and set(floats.values()) == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_target_is_refused_and_left_as_it_is(tmp_path, dense_dir, failing, kind):
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    (target / "notes.txt" if kind == "folder" else target).write_text("mine")
    line = failing("compress", dense_dir, str(target), "--bits", "6")
    assert f"{target} exists already" in line and "--overwrite" in line
    assert (target / "notes.txt" if kind == "folder" else target).read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_a_fine_target(tmp_path, dense_dir):
    target = tmp_path / "out"
    target.mkdir()
    assert main(["compress", dense_dir, str(target), "--bits", "6"]) == 0
    assert clustered(str(target))


def test_overwrite_replaces_a_checkpoint(tmp_path, dense_dir, made):
    target = str(tmp_path / "out")
    shutil.copytree(made, target)
    (tmp_path / "out" / "stale.bin").write_text("old")
    assert main(["compress", dense_dir, target, "--group-size", "3", "--num-clusters", "12", "--overwrite"]) == 0
    assert {tuple(layer.codebook.shape) for layer in clustered(target).values()} == {(1, 12, 3)}
    assert "stale.bin" not in os.listdir(target)
    assert os.listdir(tmp_path) == ["out"]  # no temporary folder, no old one set aside


@pytest.fixture
def broken_dir(tmp_path_factory, dense_dir) -> str:
    """A dense model with a NaN in its last matrices, which is found when much work is done."""
    folder = str(tmp_path_factory.mktemp("broken") / "dense")
    shutil.copytree(dense_dir, folder)
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_failed_compression_leaves_what_it_has_done_and_says_where(tmp_path, broken_dir, failing):
    line = failing("compress", broken_dir, str(tmp_path / "out"), "--bits", "6")
    assert "model.layers.1.mlp.up_proj" in line
    assert f"The 1 finished shards stay in {tmp_path / '.out.partial'}" in line and "--overwrite starts anew" in line
    assert os.listdir(tmp_path) == [".out.partial"]


def test_a_failed_overwrite_keeps_the_old_checkpoint(tmp_path, broken_dir, made, failing):
    target = str(tmp_path / "out")
    shutil.copytree(made, target)
    failing("compress", broken_dir, target, "--bits", "6", "--overwrite")
    assert contents(target) == contents(made)
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "out"]


def test_an_interrupted_compression_leaves_nothing_behind(tmp_path, dense_dir, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cluscomp_peft.compress.policy.Policy.cluster", interrupt)
    assert main(["compress", dense_dir, str(tmp_path / "out"), "--bits", "6"]) == 130
    assert "cluscomp compress: interrupted" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "0.1"], "bits must be between"),
        (["--group-size", "3", "--num-clusters", "300"], r"model\.layers\.0\.self_attn\.k_proj: .* 192 groups"),
        (["--group-size", "3"], "go together"),
        (["--bits", "6", "--codebook-dtype", "int8"], "codebook_dtype must be one of"),
        (["--bits", "6", "--calibration", "absent.txt"], r"absent\.txt is not a file"),
        (["--bits", "6", "--calibration", "absent.txt", "--samples", "0"], "at least one sample"),
        (["--bits", "6", "--workers", "0"], "workers must be a whole number of at least 1, got 0"),
        (["--bits", "6", "--workers", "-1"], "workers must be a whole number of at least 1, got -1"),
        (["--bits", "6", "--workers", "2", "--calibration", "absent.txt"], "workers=2 and calibration do not go"),
        (["--bits", "6", "--device", "abacus"], "device must be cpu, cuda or cuda:N, got 'abacus'"),
    ],
)
def test_settings_that_cannot_be_met_end_in_one_line(tmp_path, dense_dir, failing, flags, message):
    assert re.search(message, failing("compress", dense_dir, str(tmp_path / "out"), *flags))
    assert os.listdir(tmp_path) == []


def test_a_compressed_model_is_not_compressed_again(tmp_path, made, failing):
    assert f"{made} is quantised already" in failing("compress", made, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_no_command_and_an_unknown_flag_are_usage_errors(capsys):
    for arguments in ([], ["shrink"], ["inspect", "somewhere", "--bits", "2"]):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert status.value.code == 2
        assert "usage: cluscomp" in capsys.readouterr().err


# -- inspect


def test_inspect_totals_agree_with_the_file(made, capsys):
    report = output_of(capsys, "inspect", made)
    path = os.path.join(made, "model.safetensors")
    sizes: dict[str, int] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            name, _, part = key.rpartition(".")
            if part in PARTS:
                sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
    dense = {
        row["name"]: 8 * sizes[row["name"]] / (row["out_features"] * row["in_features"]) for row in report["matrices"]
    }
    assert sizes.keys() == dense.keys()
    assert {row["name"]: row["true_bits"] for row in report["matrices"]} == pytest.approx(dense, rel=1e-12)
    totals = report["totals"]
    assert totals["clustered_bytes"] == sum(sizes.values())
    assert totals["total_bytes"] == os.path.getsize(path) == totals["clustered_bytes"] + totals["dense_bytes"]
    assert totals["weights"] == sum(row["out_features"] * row["in_features"] for row in report["matrices"])
    assert totals["true_bits"] == pytest.approx(8 * totals["clustered_bytes"] / totals["weights"], rel=1e-12)


def test_inspect_errors_are_those_of_the_weights(made, dense_dir, capsys):
    report = output_of(capsys, "inspect", made)
    dense = AutoModelForCausalLM.from_pretrained(dense_dir)
    layers = clustered(made)
    squares = {}
    for row in report["matrices"]:
        weight = dense.get_submodule(row["name"]).weight.detach().double()
        assert (row["out_features"], row["in_features"]) == tuple(weight.shape)
        error = (layers[row["name"]].decode(torch.float32).double() - weight).square().sum()
        squares[row["name"]] = (float(error), float(weight.square().sum()))
        assert row["relative_error"] == pytest.approx((error / weight.square().sum()).sqrt().item(), rel=1e-5)
    total = (sum(error for error, _ in squares.values()) / sum(norm for _, norm in squares.values())) ** 0.5
    assert report["totals"]["relative_error"] == pytest.approx(total, rel=1e-5)
    assert 0 < total < 0.2


def test_inspect_prints_a_table_of_the_same_numbers(made, capsys):
    report = output_of(capsys, "inspect", made)
    assert main(["inspect", made]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["matrix", "shape", "stored", "as", "true", "bits", "error"]
    rows = lines[2:16]
    assert [row.split()[0] for row in rows] == [entry["name"] for entry in report["matrices"]]
    for row, entry in zip(rows, report["matrices"], strict=True):
        assert f"{entry['out_features']} x {entry['in_features']}" in row
        assert entry["spec"] in row and "scales" in row
        assert row.split()[-2:] == [f"{entry['true_bits']:.3f}", f"{entry['relative_error']:.4f}"]
    totals = report["totals"]
    assert lines[17].startswith("14 matrices")
    assert lines[17].split()[-2:] == [f"{totals['true_bits']:.3f}", f"{totals['relative_error']:.4f}"]
    assert len({len(line) for line in lines[:18]}) == 1  # a table: every line is as wide


def test_inspect_without_a_report_knows_everything_but_errors(tmp_path, made, capsys):
    folder = str(tmp_path / "copy")
    shutil.copytree(made, folder)
    os.remove(os.path.join(folder, "cluscomp_report.json"))
    full, bare = output_of(capsys, "inspect", made), output_of(capsys, "inspect", folder)
    assert {row["relative_error"] for row in bare["matrices"]} == {None} == {bare["totals"]["relative_error"]}
    for row in (*full["matrices"], *bare["matrices"], full["totals"], bare["totals"]):
        del row["relative_error"]
    assert bare == full
    assert main(["inspect", folder]) == 0


def test_inspect_refuses_what_is_no_clustered_checkpoint(tmp_path, dense_dir, failing):
    assert f"{dense_dir} is no ClusComp checkpoint" in failing("inspect", dense_dir)
    assert str(tmp_path) in failing("inspect", str(tmp_path))
    assert str(tmp_path / "absent") in failing("inspect", str(tmp_path / "absent"))


@pytest.mark.parametrize("length", [5, 1000, -100])
def test_inspect_names_a_cut_off_file(tmp_path, made, failing, length):
    folder = str(tmp_path / "copy")
    shutil.copytree(made, folder)
    path = os.path.join(folder, "model.safetensors")
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(data[:length])
    line = failing("inspect", folder)
    assert line.startswith(f"cluscomp inspect: {path} is damaged or cut off")


def test_inspect_names_what_is_lacking(tmp_path, made, failing):
    folder = str(tmp_path / "copy")
    shutil.copytree(made, folder)
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.codes"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "lacks model.layers.1.self_attn.k_proj.codes" in failing("inspect", folder)


# -- evaluate


def manual_loss(model, text: str, length: int) -> tuple[float, int]:
    """Mean loss per predicted token over windows that do not overlap, with the model's own loss function."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    stream: list[int] = []
    with open(text) as file:
        for line in file:
            stream += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    total, tokens = 0.0, 0
    model.eval()
    for start in range(0, len(stream), length):
        window = torch.tensor([stream[start : start + length]])
        if window.shape[1] > 1:
            with torch.no_grad():
                total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
            tokens += window.shape[1] - 1
    return total / tokens, tokens


@pytest.mark.parametrize("length", [64, 9])
def test_evaluate_is_the_mean_loss_over_windows(made, text, capsys, length):
    flags = [] if length == 64 else ["--seqlen", str(length)]  # the default is what the model takes
    result = output_of(capsys, "evaluate", made, "--data", text, *flags)
    keys = {"loss", "perplexity", "tokens", "true_bits", "all_bits", "bits_per_byte", "kl", "agreement"}
    assert result.keys() == keys and result["kl"] is result["agreement"] is None
    model = AutoModelForCausalLM.from_pretrained(made)
    loss, tokens = manual_loss(model, text, length)
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["tokens"] == tokens
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_evaluate_counts_the_true_bits(made, dense_dir, text, capsys):
    compressed = output_of(capsys, "evaluate", made, "--data", text)
    dense = output_of(capsys, "evaluate", dense_dir, "--data", text)
    half = output_of(capsys, "evaluate", dense_dir, "--data", text, "--dtype", "bfloat16")
    assert (dense["true_bits"], half["true_bits"]) == (32, 16)
    assert half["loss"] == pytest.approx(dense["loss"], rel=0.05) and half["loss"] != dense["loss"]
    assert compressed["true_bits"] == output_of(capsys, "inspect", made)["totals"]["true_bits"]


def test_evaluate_with_an_adapter_is_the_merged_model(tmp_path, made, adapter, text, capsys):
    base = output_of(capsys, "evaluate", made, "--data", text)
    adapted = output_of(capsys, "evaluate", made, "--data", text, "--adapter", adapter)
    assert adapted["loss"] != base["loss"]
    merged = str(tmp_path / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made), adapter)
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(made).save_pretrained(merged)
    after = output_of(capsys, "evaluate", merged, "--data", text)
    assert (after["loss"], after["tokens"]) == (adapted["loss"], adapted["tokens"])
    assert after["true_bits"] == adapted["true_bits"] > base["true_bits"]  # two codebooks a matrix


def test_evaluate_stops_after_max_tokens(made, text, capsys):
    result = output_of(capsys, "evaluate", made, "--data", text, "--max-tokens", "40", "--seqlen", "16")
    assert result["tokens"] == 15 + 15 + 7
    assert result["loss"] != output_of(capsys, "evaluate", made, "--data", text, "--seqlen", "16")["loss"]


def test_evaluate_prints_a_line(made, text, capsys):
    result = output_of(capsys, "evaluate", made, "--data", text)
    assert main(["evaluate", made, "--data", text]) == 0
    assert capsys.readouterr().out == (
        f"loss {result['loss']:.4f} nats ({result['bits_per_byte']:.3f} bits per byte), "
        f"perplexity {result['perplexity']:.3f} over {result['tokens']} tokens, "
        f"{result['true_bits']:.3f} true bits per weight of the linear layers, "
        f"{result['all_bits']:.3f} of all weights\n"
    )


def test_evaluate_counts_bytes_of_text(made, tmp_path, capsys):
    """Of the words after the first of each window, which a space separates."""
    path = tmp_path / "words.txt"
    path.write_text("w1 w22 w3 w44 w5 w66 w7 w88")
    result = output_of(capsys, "evaluate", made, "--data", str(path), "--seqlen", "4")
    windows = ["w22 w3 w44", "w66 w7 w88"]  # and the end-of-sequence token alone, which is dropped
    size = sum(map(len, windows))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["tokens"] / math.log(2) / size)


def test_evaluate_against_a_teacher(made, dense_dir, text, capsys):
    flags = ("--data", text, "--max-tokens", "64", "--seqlen", "32")
    result = output_of(capsys, "evaluate", made, *flags, "--teacher", dense_dir)
    plain = output_of(capsys, "evaluate", made, *flags)
    assert {**result, "kl": None, "agreement": None} == plain
    tokenizer = AutoTokenizer.from_pretrained(made)
    model, dense = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (made, dense_dir))
    rows = [json.loads(line)["text"] for line in open(text)]
    stream = [token for row in rows for token in [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]]
    q, p = (logits_of(m, torch.tensor(stream[:64]).view(2, 32))[:, :-1].softmax(-1) for m in (model, dense))
    assert result["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert result["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    itself = output_of(capsys, "evaluate", dense_dir, *flags, "--teacher", dense_dir)
    assert itself["agreement"] == 1 and abs(itself["kl"]) < 1e-6
    assert main(["evaluate", made, *flags, "--teacher", dense_dir]) == 0
    assert f"KL from {dense_dir} {result['kl']:.4f} nats per token" in capsys.readouterr().out


def test_evaluate_refuses_what_cannot_be_measured(tmp_path, made, text, failing):
    assert "--seqlen 65 is more than the 64 positions" in failing("evaluate", made, "--data", text, "--seqlen", "65")
    assert "seqlen=1" in failing("evaluate", made, "--data", text, "--seqlen", "1")
    absent = str(tmp_path / "absent")
    assert f"{absent} is not a file" in failing("evaluate", made, "--data", absent)
    assert absent in failing("evaluate", made, "--data", text, "--adapter", absent)
    assert "--max-tokens must be at least 2" in failing("evaluate", made, "--data", text, "--max-tokens", "1")


def test_evaluate_refuses_an_adapter_of_another_base(tmp_path, dense_dir, adapter, text, failing):
    other = str(tmp_path / "other")
    # At 6 bits the small matrices take numbers one by one, whose best codes know no seed; activations move them.
    assert main(["compress", dense_dir, other, "--bits", "6", "--scales", "--calibration", text]) == 0
    assert "another base" in failing("evaluate", other, "--data", text, "--adapter", adapter)


def test_the_dense_model_itself_is_never_overwritten(tmp_path, dense_dir, failing):
    copy = shutil.copytree(dense_dir, tmp_path / "copy")
    before = (copy / "model.safetensors").read_bytes()
    assert "is the model itself" in failing("compress", str(copy), str(copy), "--overwrite")
    assert (copy / "model.safetensors").read_bytes() == before


def test_overwrite_leaves_folders_alone_that_are_no_checkpoints(tmp_path, dense_dir, failing):
    (tmp_path / "notes.txt").write_text("mine")
    assert "no model" in failing("compress", dense_dir, str(tmp_path), "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_scales_that_do_not_fit_are_an_error(tmp_path, dense_dir, failing):
    line = failing("compress", dense_dir, str(tmp_path / "out"), "--bits", "1", "--scales")
    assert "cannot be stored in 1" in line


def test_cut_off_weights_are_named_by_every_command(tmp_path, dense_dir, made, text, failing):
    for source in (dense_dir, made):
        copy = shutil.copytree(source, tmp_path / f"copy of {os.path.basename(source)}")
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        assert "model.safetensors is damaged" in failing("evaluate", str(copy), "--data", text)
    assert "model.safetensors is damaged" in failing(
        "compress", str(tmp_path / f"copy of {os.path.basename(dense_dir)}"), str(tmp_path / "out")
    )


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"summary": {}}',
        '{"summary": 3, "matrices": {}}',
        '{"summary": {}, "matrices": {"x": 3}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_report_is_named(tmp_path, made, failing, content):
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "cluscomp_report.json").write_text(content)
    assert "cluscomp_report.json is damaged" in failing("inspect", str(copy))


def test_a_folder_that_is_not_there(tmp_path, text, failing):
    path = str(tmp_path / "absent")
    for arguments in (("inspect", path), ("evaluate", path, "--data", text), ("compress", path, str(tmp_path / "o"))):
        assert f"{path} is no folder" in failing(*arguments)


def test_a_report_without_a_field_is_one_that_does_not_know(tmp_path, made, capsys):
    copy = shutil.copytree(made, tmp_path / "copy")
    path = copy / "cluscomp_report.json"
    report = json.loads(path.read_text())
    first = next(iter(report["matrices"]))
    report["matrices"][first] = {"relative_error": "much"}
    report["summary"] = {}
    path.write_text(json.dumps(report))
    output = output_of(capsys, "inspect", str(copy))
    assert output["totals"]["relative_error"] is None
    assert {entry["name"]: entry["relative_error"] for entry in output["matrices"]}[first] is None
    assert main(["inspect", str(copy), "--html", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 3}, "layout must be an object"),
        ({"layout": ["model"]}, "layout must be an object"),
        ({"layout": {"model.layers.*.mlp.up_proj": 3}}, "layout must be an object"),
        ({"exclude_modules": "up_proj"}, "exclude_modules must be a list of names"),
        ({"target_modules": [3]}, "target_modules must be a list of names"),
        ({"version": "\x1b[2J9"}, r"version '\\x1b\[2J9' of the ClusComp format"),
        ({"version": {"a": "\ud800"}}, r"version .*ud800.* of the ClusComp format"),
    ],
)
def test_a_config_of_other_types_is_refused_in_plain_letters(change, message, tmp_path, made, failing):
    copy = shutil.copytree(made, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"].update(change)
    (copy / "config.json").write_text(json.dumps(config))
    line = failing("inspect", str(copy))
    assert re.search(message, line) and line.isprintable()


def test_names_in_a_file_do_not_move_the_cursor(tmp_path, dense_dir, failing):
    line = failing("compress", dense_dir, str(tmp_path / "out\x1b[2J"), "--bits", "0.1")
    assert line.isprintable()
    line = failing("inspect", str(tmp_path / "gone\x1b[2J"))
    assert r"gone\x1b[2J is no folder" in line


def test_json_that_is_nested_too_deeply(tmp_path, dense_dir, failing):
    copy = shutil.copytree(dense_dir, tmp_path / "copy")
    (copy / "config.json").write_text('{"model_type": ' + "[" * 100_000)
    assert "Traceback" not in failing("compress", str(copy), str(tmp_path / "out"))


@pytest.mark.timeout(60)
def test_a_pipe_among_the_shards_is_not_waited_for(tmp_path, dense_dir, made, failing):
    for source, command in ((dense_dir, "compress"), (made, "inspect")):
        copy = shutil.copytree(source, tmp_path / command)
        os.mkfifo(copy / "model-2.safetensors")
        arguments = [str(tmp_path / "out")] if command == "compress" else []
        assert "model-2.safetensors is no file" in failing(command, str(copy), *arguments)
