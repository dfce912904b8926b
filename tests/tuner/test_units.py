"""Units of the deltas: how far a step of AdamW goes in models of different depth, and adapters of old versions."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompConfig, ClusCompLayer
from cluscomp_peft.finetune.training import ExplosionWarning
from cluscomp_peft.tuner.units import count_blocks, default_delta_scale
from tests.conftest import BORN, config_for, flags, tiny_llama, train_briefly

RATE = 2e-4


def first_step(model, tokens: torch.Tensor) -> dict[str, float]:
    """How far the first step moves centroids, RMS over RMS: layer to that; unscaled by nothing but the rate."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ClusCompLayer)}
    before = {name: layer.deltas(["default"])[0].codebook.detach().clone() for name, layer in layers.items()}
    train_briefly(model, tokens, steps=1, lr=RATE)
    moved = {}
    for name, layer in layers.items():
        change = layer.deltas(["default"])[0].codebook.detach() - before[name]
        # What no weight of the block uses has no gradient.
        moved[name] = float(change[change != 0].square().mean().sqrt()) / layer.base_rms()
    return moved


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.11.mlp.up_proj"], 2),
        (["model.layers.3.moe.experts.0.w1", "model.layers.3.moe.experts.1.w1"], 1),
        (["encoder.block.0.layer.0.q", "encoder.block.0.layer.1.wi", "decoder.block.0.layer.0.q"], 2),
        (["vision.layers.0.q", "language.layers.0.q", "language.layers.1.q", "lm_head"], 4),
        (["0", "2"], 2),
        (["conv2d.q", "up", "down"], 1),
        ([], 1),
    ],
)
def test_blocks_are_told_by_the_first_index(names, blocks):
    assert count_blocks(names) == blocks


@pytest.mark.parametrize("kind", ["born", "dense"])
def test_the_deeper_the_model_the_shorter_the_step(kind, tokens):
    """All blocks move downhill at once, so that a step of one length for all would be too long in a deep model."""
    found = {}
    for depth in (1, 8):
        moved = first_step(get_peft_model(tiny_llama(num_hidden_layers=depth), config_for(kind)), tokens)
        assert len(moved) == 7 * depth
        found[depth] = {name: distance for name, distance in moved.items() if ".layers.0." in name}
    for name, distance in found[1].items():
        assert distance / found[8][name] == pytest.approx(8, rel=0.2), name


def test_the_more_numbers_the_shorter_the_step(tokens):
    """More of them fit the gradient better, and move the outputs further along it."""
    few, many = (
        first_step(get_peft_model(tiny_llama(), config_for("born", num_blocks=blocks)), tokens) for blocks in (1, 27)
    )
    # 27 to the power of 1/3; units are powers of two, and numbers without a weight of their own do not count.
    ratios = [few[name] / many[name] for name in few]
    assert all(0.9 <= ratio <= 4.4 for ratio in ratios) and max(ratios) > 1.9


def test_widths_cancel():
    """Eight times as wide at the same rank: as far, whatever the shape."""
    narrow, wide = (default_delta_scale(30, width, 4 * width, 16 * 5 * width) for width in (512, 4096))
    assert narrow == pytest.approx(wide) == pytest.approx(default_delta_scale(30, 4096, 1024, 16 * 5 * 1024))
    # SmolLM2-135M at rank 16: 1.7e-5 of the 256 of versions before, where 1.4e-5 to 2.5e-5 were best.
    assert 2e-4 * default_delta_scale(30, 576, 576, 16896) / 256 == pytest.approx(1.7e-5, rel=0.1)


def test_only_blocks_that_are_trained_count(tokens):
    part, whole = (
        first_step(get_peft_model(tiny_llama(num_hidden_layers=4), config_for("born", **settings)), tokens)
        for settings in ({"layers_to_transform": [2]}, {})
    )
    assert len(part) == 7
    for name, distance in part.items():
        assert distance / whole[name] == pytest.approx(4, rel=0.1)


def test_a_scale_that_is_given_holds_at_every_depth(tokens):
    for depth in (1, 4):
        config = config_for("born", delta_scale=64)
        moved = first_step(get_peft_model(tiny_llama(num_hidden_layers=depth), config), tokens)
        assert all(RATE * 64 / 1.5 < distance < RATE * 64 * 1.5 for distance in moved.values())


def test_an_adapter_of_an_old_version_keeps_its_units(compressed_dir, tmp_path, tokens):
    """Versions before wrote `delta_scale: 256.0`, the default of then, into every config."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(compressed_dir), config_for("compressed"))
    train_briefly(model, tokens)
    model.save_pretrained(tmp_path)
    path = Path(tmp_path) / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["delta_scale"] is None
    path.write_text(json.dumps({**saved, "delta_scale": 256.0}))
    old = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(compressed_dir), tmp_path, is_trainable=True)
    model.eval(), old.eval()
    with torch.no_grad():
        assert torch.equal(old(input_ids=tokens).logits, model(input_ids=tokens).logits)
    moved = first_step(old, tokens)
    assert all(RATE * 256 / 1.5 < distance < RATE * 256 * 1.5 for distance in moved.values())


def test_a_wrong_scale_is_refused():
    for wrong in (0.0, -1.0, math.inf, "8"):
        with pytest.raises(ValueError, match="delta_scale"):
            ClusCompConfig(delta_scale=wrong, **BORN)


# -- the warning of finetuning


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([5.3, 4.0, 3.1, 3.6, 2.5], None),
        ([2.4, 2.9, 3.3, 2.2], None),
        ([5.3, 10.6, 11.7, 11.1], 2),
        ([2.41, 2.5, 7.6, 8.0], 3),
        ([0.69, 0.6, math.nan], 3),
        ([0.0, 0.3], None),
    ],
)
def test_a_loss_that_explodes_is_told_with_the_cure(losses, warned):
    callback = ExplosionWarning()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, loss in enumerate(losses, 1):
            state = SimpleNamespace(global_step=step)
            callback.on_log(SimpleNamespace(learning_rate=2e-4), state, None, logs={"loss": loss})
            callback.on_log(SimpleNamespace(learning_rate=2e-4), state, None, logs={"eval_loss": 99.0})
    messages = [str(warning.message) for warning in caught]
    if warned is None:
        assert not messages
    else:
        assert len(messages) == 1
        assert f"after {warned} steps" in messages[0] and "--learning_rate 5e-05" in messages[0]


def test_the_recipe_warns_of_a_rate_that_is_too_high(run_recipe, tokenizer, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    for parameter in model.model.layers.parameters():
        parameter.data.div_(5 if parameter.ndim > 1 else 1)
    model.model.embed_tokens.weight.data.mul_(5)  # it repeats the last word, as the text does: there is much to lose
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"text": " ".join([f"w{i}"] * 12)}) + "\n" for i in range(40)))
    arguments = flags(
        model_name_or_path=tmp_path / "dense",
        dataset_name=train,
        bits=6,
        max_steps=6,
        per_device_train_batch_size=4,
        max_length=16,
        logging_steps=3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = run_recipe("sft.py", *arguments, *flags(output_dir=tmp_path / "calm"))
    assert not [warning for warning in caught if "too long for this model" in str(warning.message)]
    assert sum("loss" in entry for entry in log) == 3  # the first step, and every third
    with pytest.warns(UserWarning, match="--learning_rate 0.2"):
        run_recipe("sft.py", *arguments, *flags(output_dir=tmp_path / "wild", learning_rate=1.0))
