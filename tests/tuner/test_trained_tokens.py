"""Tokens that are trained beside the deltas, and settings that somebody changes after the config was made."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from cluscomp_peft import ClusCompConfig
from tests.conftest import config_for, load, logits_of, train_briefly
from tests.grids import grid
from tests.hf.test_device_map import MAP
from tests.recipes.test_trl import TEXT, settings
from tests.tuner.test_merging import assert_equal, numbers

KINDS = ["compressed", "born", "dense"]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def base(kind, dense_dir, compressed_dir):
    """A function that loads a fresh base model."""
    folder = compressed_dir if kind == "compressed" else dense_dir
    return lambda **options: load(folder, **options)


@grid(kind=KINDS, indices=[[5, 6, 90], {"embed_tokens": [5, 6, 90]}])
def test_tokens_are_trained_saved_loaded_and_merged(base, kind, indices, tokens, tmp_path):
    tokens = torch.cat([tokens, torch.full_like(tokens, 5)], 1)
    model = get_peft_model(base(), config_for(kind, trainable_token_indices=indices))
    before = numbers(model)
    train_briefly(model, tokens)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert sum("trainable_tokens_delta" in name for name in changed) == 1
    assert all("cluscomp_delta" in name or "trainable_tokens_delta" in name for name in changed)
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base(), tmp_path), tokens), expected)
    mixin = base()
    mixin.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(mixin, tokens), expected)
    state = numbers(model)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits_of(model, tokens), expected)
    model.unmerge_adapter()
    assert_equal(numbers(model), state)
    assert torch.equal(logits_of(model.merge_and_unload(safe_merge=True), tokens), expected)


def test_broken_tokens_leave_every_layer_unmerged(base, kind, tokens):
    model = get_peft_model(base(), config_for(kind, trainable_token_indices=[5], init_weights=False))
    delta = next(value for name, value in model.named_parameters() if "trainable_tokens_delta" in name)
    delta.data[0, 0] = float("nan")
    before = numbers(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(safe_merge=True)
        for (name, value), old in zip(model.named_parameters(), before.values(), strict=True):
            assert torch.equal(value, old) or value is delta, name


def test_trl_adds_tokens_after_the_config_was_made(base, kind, tokenizer, tokens, tmp_path):
    import copy

    source = copy.deepcopy(tokenizer)
    source.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    source.chat_template = "{% for m in messages %}<|start|> {{ m['content'] }} <|end|> {% endfor %}"
    source.save_pretrained(tmp_path / "template")
    trainer = SFTTrainer(
        model=base(),
        args=SFTConfig(**settings(tmp_path / "run", max_length=32), chat_template_path=str(tmp_path / "template")),
        train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": row["text"]}]} for row in TEXT]),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=config_for(kind),
    )
    assert trainer.model.peft_config["default"].trainable_token_indices
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    tokens = torch.cat([tokens, torch.tensor([[96], [97]])], 1)
    expected = logits_of(trainer.model, tokens)
    fresh = base()
    fresh.resize_token_embeddings(trainer.model.get_input_embeddings().weight.shape[0])
    assert torch.equal(logits_of(PeftModel.from_pretrained(fresh, tmp_path / "adapter"), tokens), expected)


@pytest.mark.parametrize("indices", ["5", [5.0], [-1], {"embed_tokens": 5}, {3: [5]}, [True]])
def test_indices_that_are_none(indices):
    with pytest.raises(ValueError, match="trainable_token_indices must be"):
        ClusCompConfig(trainable_token_indices=indices)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rank", 0), ("delta_scale", -1.0), ("target_parameters", ["w"]), ("base", "sparse"), ("num_blocks", 2.0)],
)
def test_settings_are_checked_when_they_are_used(base, kind, setting, value):
    config = config_for(kind)
    setattr(config, setting, value)
    with pytest.raises(ValueError, match=setting):
        get_peft_model(base(), config)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("rank", 0, "rank must be"),
        ("num_blocks", 5, "was changed after the adapter was made"),
        ("train_scales", False, "was changed after the adapter was made"),
        ("trainable_token_indices", [5], "no token was trained"),
    ],
)
def test_settings_are_checked_when_they_are_saved(base, kind, setting, value, message, tmp_path):
    model = get_peft_model(base(), config_for(kind))
    setattr(model.peft_config["default"], setting, value)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("whole", [{"trainable_token_indices": [5]}, {"modules_to_save": ["norm"]}])
def test_what_is_trained_whole_has_no_sum(base, kind, whole):
    model = get_peft_model(base(), config_for(kind, **whole))
    with pytest.raises(ValueError, match="of which there is no sum"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    assert set(model.peft_config) == {"default"}


def test_tokens_of_an_offloaded_embedding(compressed_dir):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir, device_map={**MAP, "model.embed_tokens": "disk"})
    with pytest.raises(ValueError, match="embed_tokens is offloaded"):
        get_peft_model(model, config_for("compressed", trainable_token_indices=[5]))
