"""What people get wrong first ends in an error that names the value, the limit and the cure, or simply works.

Commands are called in process; mistakes in files are in `test_cli.py`, those of adapters in `tuner/test_bad_input.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from cluscomp_peft import ClusCompConfig, ClusteredLinear
from cluscomp_peft.cli import main
from tests.conftest import WORDS, config_for, logits_of, tiny_llama, train_briefly

HUB_ID = "someone/some-model"


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[3 + i % 93] for i in range(200)))
    return str(path)


@pytest.fixture
def compressed(compressed_dir):
    return AutoModelForCausalLM.from_pretrained(compressed_dir)


@pytest.fixture
def adapter(tmp_path, compressed) -> str:
    get_peft_model(compressed, config_for("compressed", init_weights=False)).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def said(capsys):
    """Runs a command that must fail; returns what it says on stderr."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        try:
            assert main(list(arguments)) == 1
        except SystemExit as status:
            assert status.code == 2
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        return err

    return run


# -- commands: a path or a hub id that is no model


def commands(path: str, text: str, out: str) -> list[list[str]]:
    return [["compress", path, out], ["inspect", path], ["evaluate", path, "--data", text], ["plan", path]]


def test_a_hub_id_without_a_network(text, said, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for arguments in commands(HUB_ID, text, str(tmp_path / "out")):
        line = said(*arguments)
        assert f"{HUB_ID} is no folder here, and the hub cannot be asked for it (HF_HUB_OFFLINE is set)" in line
        assert f"hf download {HUB_ID}" in line
    assert "reads like owner/name" in said("plan", "no hub id")


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers every question with one status and error code; returns a function that sets them."""
    answer: dict = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(answer["status"])
            self.send_header("X-Error-Code", answer["code"])
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = address + template[template.index("/{repo_id}") :]
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield lambda status, code: answer.update(status=status, code=code)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "is neither a folder here nor a model on the hub"),
        (403, "GatedRepo", "is gated: accept its terms at http"),
        (404, "EntryNotFound", "on the hub has no config.json"),
        (400, "", "the hub cannot be asked for it (Bad request"),
    ],
)
def test_a_hub_id_that_the_hub_does_not_give(status, code, words, said, hub):
    hub(status, code)
    line = said("plan", HUB_ID)
    assert HUB_ID in line and words in line


def test_a_folder_that_is_no_model_names_those_inside(text, said, tmp_path, dense_dir):
    shutil.copytree(dense_dir, tmp_path / "models" / "mine")
    folder = str(tmp_path / "models")
    for arguments in commands(folder, text, str(tmp_path / "out")):
        assert f"{folder} has no config.json, so it is no model; give {folder}/mine, which does" in said(*arguments)
    assert "give the folder that has it" in said("inspect", str(tmp_path / "models" / "mine" / os.pardir / os.pardir))
    assert f"{text} is a file; give the folder" in said("inspect", text)


def test_an_adapter_where_a_model_is_wanted(said, adapter, compressed_dir, tmp_path):
    for arguments in (["compress", adapter, str(tmp_path / "out")], ["inspect", adapter], ["plan", adapter]):
        assert f"{adapter} is an adapter of {compressed_dir} and no model; give {compressed_dir}" in said(*arguments)


def test_evaluate_takes_an_adapter_for_its_model_with_it(adapter, compressed_dir, text, capfd, caplog):
    results = []
    for arguments in ([adapter], [compressed_dir, "--adapter", adapter], [compressed_dir]):
        capfd.readouterr()
        assert main(["evaluate", *arguments, "--data", text, "--json"]) == 0
        out, err = capfd.readouterr()
        assert "LOAD REPORT" not in err + caplog.text
        results.append(json.loads(out))
    assert results[0] == results[1] and results[1]["loss"] != results[2]["loss"]


def test_an_adapter_whose_model_is_gone(said, adapter, text, tmp_path):
    path = os.path.join(adapter, "adapter_config.json")
    config = json.loads(open(path).read())
    for base, words in ((str(tmp_path / "gone"), "gone is no folder"), (None, "does not say of which model")):
        with open(path, "w") as file:
            json.dump({**config, "base_model_name_or_path": base}, file)
        assert words in said("evaluate", adapter, "--data", text)


def test_an_adapter_for_an_adapter(said, adapter, compressed_dir, text):
    line = said("evaluate", adapter, "--adapter", "other", "--data", text)
    assert f"{adapter} is an adapter, as --adapter other is; give the base, {compressed_dir}" in line


def test_a_model_without_a_tokenizer(said, dense_dir, text, tmp_path):
    folder = shutil.copytree(dense_dir, tmp_path / "bare")
    for name in os.listdir(folder):
        if "token" in name:
            os.remove(folder / name)
    line = said("evaluate", str(folder), "--data", text)
    assert f"{folder} has no tokenizer" in line and "copy tokenizer.json" in line


# -- commands: numbers


def test_a_size_without_its_unit(said, dense_dir, tmp_path):
    line = said("plan", dense_dir, "--gpu-memory", "24")
    assert "argument --gpu-memory: 24 is 24 bytes" in line and "24GiB" in line
    assert "argument --size: 16 is 16 bytes" in said("compress", dense_dir, str(tmp_path / "out"), "--size", "16")
    assert "argument --size: '1.2.3' is no size such as 16MB" in said("compress", "a", "b", "--size", "1.2.3")


@pytest.mark.parametrize("count", ["0", "1", "-5"])
def test_max_tokens_of_which_none_is_predicted(said, dense_dir, text, count):
    line = said("evaluate", dense_dir, "--data", text, "--max-tokens", count)
    assert f"--max-tokens must be at least 2, one token and the next to predict from it, got {count}" in line


@pytest.mark.parametrize("bits", ["16", "0.5"])
def test_bits_beyond_what_codes_can_have(said, dense_dir, tmp_path, bits, capsys):
    for arguments in (["compress", dense_dir, str(tmp_path / "out")], ["plan", dense_dir]):
        line = said(*arguments, "--bits", bits)
        assert f"bits must be between 1 and 8 (true bits per weight, codebooks included), got {float(bits)}" in line
        assert "leave it out for 4" in line
        with pytest.raises(SystemExit):
            main([arguments[0], "--help"])
        assert "1 to 8 (default 4" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flags", [["--samples", "3"], ["--seqlen", "32"], ["--epochs", "2"], ["--no-feedback"]])
def test_settings_of_calibration_without_calibration(said, dense_dir, tmp_path, flags):
    line = said("compress", dense_dir, str(tmp_path / "out"), "--calibration", "none", *flags)
    assert f"{' '.join(flags)} is about calibration text, and --calibration none takes none" in line
    assert not (tmp_path / "out").exists()


# -- Python: what comes from other methods


def test_arguments_of_lora():
    with pytest.raises(TypeError, match=r"unexpected keyword argument r=16; give rank=16, which trains about as many"):
        ClusCompConfig(r=16)
    with pytest.raises(TypeError, match=r"unexpected keyword argument lora_alpha=32; leave it out"):
        ClusCompConfig(rank=16, lora_alpha=32)
    with pytest.raises(TypeError, match=r"unexpected keyword argument num_block=2; give num_blocks="):
        ClusCompConfig(num_block=2)
    with pytest.raises(TypeError, match=r"unexpected keyword argument zzz=1; it has .*rank, num_blocks"):
        ClusCompConfig(zzz=1)


def test_a_task_that_the_model_has_no_head_for(compressed, tokens):
    expected = logits_of(compressed, tokens)
    with pytest.raises(ValueError, match=r"SEQ_CLS.*LlamaForCausalLM predicts tokens; .*ForSequenceClassification"):
        get_peft_model(compressed, ClusCompConfig(task_type="SEQ_CLS"))
    assert torch.equal(logits_of(compressed, tokens), expected)
    classifier = LlamaForSequenceClassification(tiny_llama().config)
    with pytest.raises(ValueError, match=r"CAUSAL_LM.*LlamaForSequenceClassification does not; .*SEQ_CLS"):
        get_peft_model(classifier, config_for("born"))
    get_peft_model(classifier, ClusCompConfig(task_type="SEQ_CLS", group_size=3, num_clusters=12))


def test_a_classifier_on_a_compressed_model(compressed_dir, tokens):
    model = AutoModelForSequenceClassification.from_pretrained(compressed_dir, num_labels=2)
    model = get_peft_model(model, ClusCompConfig(task_type="SEQ_CLS"))
    model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()


def test_merging_twice(adapter, compressed, compressed_dir, tokens):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(compressed_dir), adapter)
    model.merge_adapter()
    expected = logits_of(model, tokens)
    with pytest.warns(UserWarning, match=r"already merged, nothing to do: default.*unmerge_adapter\(\) takes it out"):
        model.merge_adapter()
    assert torch.equal(logits_of(model, tokens), expected)
    merged = model.merge_and_unload()
    with pytest.warns(UserWarning, match=r"no adapter left.*was called before"):
        assert model.merge_and_unload() is merged
    assert torch.equal(logits_of(merged, tokens), expected)
    with pytest.warns(UserWarning, match=r"other codebooks \(fingerprint .*counts twice.*load the base"):
        PeftModel.from_pretrained(merged, adapter)


def arguments(folder) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)


def test_a_trainer_without_an_adapter(compressed, tmp_path):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is clustered and has no adapter.*ClusCompConfig\(\)"):
        Trainer(compressed, arguments(tmp_path))
    Trainer(get_peft_model(compressed, config_for("compressed")), arguments(tmp_path))


def test_a_trainer_of_prompts(compressed, tmp_path):
    model = get_peft_model(compressed, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    Trainer(model, arguments(tmp_path))


# -- Python: LoRA and QLoRA's steps on a clustered model


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", None])
def test_lora_trains_beside_clustered_layers(compressed, compressed_dir, tokens, tmp_path, recwarn, targets):
    expected = logits_of(compressed, tokens)
    model = get_peft_model(compressed, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    assert torch.equal(logits_of(model, tokens), expected)
    adapted = {name.rpartition(".")[2] for name in model.targeted_module_names}
    linears = {name.rpartition(".")[2] for name, layer in tiny_llama().named_modules() if "_proj" in name}
    assert adapted == {"all-linear": linears, "None": {"q_proj", "v_proj"}}.get(str(targets), set(targets or ()))
    losses = train_briefly(model, tokens, lr=0.01)
    assert losses[-1] < losses[0]
    trained = logits_of(model, tokens)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(compressed_dir), tmp_path)
    assert torch.equal(logits_of(again, tokens), trained)
    with again.disable_adapter():
        assert torch.equal(logits_of(again, tokens), expected)
    assert not [entry for entry in recwarn if "nsupported" in str(entry.message)]


def test_lora_is_not_merged_into_codes_but_into_what_they_decode_to(compressed, compressed_dir, tokens, tmp_path):
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(compressed, settings)
    expected = logits_of(model, tokens)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"LoRA \(default\) cannot be merged into codes.*dequantize\(\)"):
            merge()
    assert torch.equal(logits_of(model, tokens), expected)
    model.save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(compressed_dir).dequantize()
    merged = PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    assert torch.allclose(logits_of(merged, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_kinds_of_lora_that_need_a_dense_weight(compressed, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} .* dense weight, of which a clustered layer has none; "):
        get_peft_model(compressed, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings))


def test_preparation_for_kbit_training_changes_no_number(compressed_dir, tokens):
    """QLoRA's scripts call it; it would make codebooks fp32, which merging then stores."""
    model = AutoModelForCausalLM.from_pretrained(compressed_dir, dtype=torch.bfloat16)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    expected = logits_of(model, tokens)
    model = prepare_model_for_kbit_training(model)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
    assert torch.equal(logits_of(model, tokens), expected)
    model = get_peft_model(model, config_for("compressed"))
    losses = train_briefly(model, tokens)
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    assert {layer.codebook.dtype for layer in merged.modules() if isinstance(layer, ClusteredLinear)} == {
        torch.float16
    }
