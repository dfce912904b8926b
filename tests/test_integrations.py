"""Tools that know nothing of this package, on compressed checkpoints; those that are not installed are skipped."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig, ClusteredLinear
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from tests import warm
from tests.conftest import WORDS, flags, logits_of


def test_lm_eval_counts_what_the_model_says(compressed_dir):
    models = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    evaluated = models.HFLM(pretrained=compressed_dir, dtype="float32", device="cpu", batch_size=1)
    assert any(isinstance(module, ClusteredLinear) for module in evaluated.model.modules())
    request = instance.Instance("loglikelihood", {}, ("w5 w6 w7", " w8 w9"), 0)
    ((found, _),) = evaluated.loglikelihood([request], disable_tqdm=True)
    tokens = torch.tensor([[WORDS.index(word) for word in ("w5", "w6", "w7", "w8", "w9")]])
    logits = logits_of(AutoModelForCausalLM.from_pretrained(compressed_dir), tokens)
    expected = -F.cross_entropy(logits[0, 2:4], tokens[0, 3:], reduction="sum")
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_sentence_transformers_embeds_and_trains(tmp_path, tokenizer):
    sentences = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    small, saved = str(tmp_path / "small"), str(tmp_path / "saved")
    compress_checkpoint(str(tmp_path / "dense"), small, ClusCompQuantizationConfig(bits=4))
    model = sentences.SentenceTransformer(modules=[Transformer(small), Pooling(32)], device="cpu")
    words = ["w5 w6", "w7 w8 w9"]
    before = model.encode(words, convert_to_tensor=True)
    assert any(isinstance(module, ClusteredLinear) for module in model.modules())
    model.add_adapter(ClusCompConfig(task_type="FEATURE_EXTRACTION", num_blocks=1))
    settings = sentences.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    pairs = Dataset.from_dict({"anchor": ["w5", "w6", "w7", "w8"] * 4, "positive": ["w9", "w10", "w11", "w12"] * 4})
    loss = MultipleNegativesRankingLoss(model)
    sentences.SentenceTransformerTrainer(model=model, args=settings, train_dataset=pairs, loss=loss).train()
    after = model.encode(words, convert_to_tensor=True)
    assert not torch.allclose(after, before)
    model.save_pretrained(saved)
    again = sentences.SentenceTransformer(saved, device="cpu")
    assert torch.equal(again.encode(words, convert_to_tensor=True), after)


@pytest.mark.slow
def test_the_script_of_trl_trains_lora_beside_the_codes(tmp_path, compressed_dir):
    pytest.importorskip("trl")
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "train.jsonl", "w") as file:
        file.writelines(json.dumps({"text": " ".join(WORDS[3 + i : 15 + i])}) + "\n" for i in range(24))
    named = flags(model_name_or_path=compressed_dir, dataset_name=tmp_path / "data", output_dir=tmp_path / "out")
    settings = flags(max_steps=1, bf16=False, report_to="none", learning_rate=2e-4, max_length=32)
    lora = ["--use_cpu", "--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    done = subprocess.run(
        [warm.python("torch"), "-m", "cluscomp_peft.run", "-m", "trl.scripts.sft", *named, *settings, *lora],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (tmp_path / "out" / "adapter_model.safetensors").exists()
