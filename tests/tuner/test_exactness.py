"""What the product promises to the last bit, on {fp32, bf16} x {compressed, dense-born, dense} bases.

The models of most tests are too small for the fast kernels; `test_on_every_path_…` run on each of them, at numbers of
tokens on both sides of where another kernel takes over.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompQuantizationConfig, ClusteredLinear
from cluscomp_peft.hf.evaluate import true_bits
from cluscomp_peft.ops.backends import cpu
from tests.conftest import BORN, config_for, load, logits_of, tiny_llama, train_briefly
from tests.grids import grid
from tests.ops import harness as backends

KINDS = ["compressed", "born", "dense"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


each = grid(kind=KINDS, dtype=DTYPES)


@pytest.fixture
def base(kind, dtype, dense_dir, compressed_dir):
    """A function that loads a fresh base model."""
    folder = compressed_dir if kind == "compressed" else dense_dir
    return lambda: load(folder, dtype)


@pytest.fixture
def trained(kind, base, tokens):
    """A briefly trained adapter with two delta codebooks per matrix, and the logits before and after."""
    model = get_peft_model(base(), config_for(kind, num_blocks=2))
    before = logits_of(model, tokens)
    train_briefly(model, tokens)
    after = logits_of(model, tokens)
    assert not torch.equal(before, after)
    return model, before, after


@each
def test_a_fresh_adapter_changes_nothing(kind, base, tokens):
    expected = logits_of(base(), tokens)
    model = get_peft_model(base(), config_for(kind))
    if kind == "born":
        with model.disable_adapter():
            expected = logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), expected)


@grid(kind=KINDS, dtype=DTYPES, low_cpu_mem_usage=[False, True])
def test_a_reloaded_adapter_gives_equal_logits(trained, base, tokens, tmp_path, low_cpu_mem_usage):
    model, _, expected = trained
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits_of(loaded, tokens), expected)
    assert not any(parameter.device.type == "meta" for parameter in loaded.parameters())


@each
def test_every_way_of_loading_gives_equal_logits(trained, base, dtype, tokens, tmp_path):
    model, _, expected = trained
    model.save_pretrained(tmp_path)
    mixin = base()
    mixin.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(mixin, tokens), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), tokens), expected)
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), tokens), expected)


@each
def test_a_twice_saved_adapter_has_equal_files(trained, base, tmp_path):
    model, _, _ = trained
    model.save_pretrained(tmp_path / "one")
    PeftModel.from_pretrained(base(), tmp_path / "one").save_pretrained(tmp_path / "two")
    mixin = base()
    mixin.load_adapter(str(tmp_path / "one"))
    mixin.save_pretrained(tmp_path / "three")
    one, two, three = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "three")
    )
    assert one == two
    assert len(one) == len(three)


@each
def test_merging_and_unmerging_are_exact(trained, tokens):
    model, before, after = trained
    model.merge_adapter()
    assert torch.equal(logits_of(model, tokens), after)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model, tokens), after)
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens), before)


@each
def test_the_merged_model_reloads_with_equal_logits(trained, kind, tokens, tmp_path, dtype):
    model, _, expected = trained
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged, tokens), expected)
    assert any(isinstance(module, ClusteredLinear) for module in merged.modules()) == (kind == "compressed")
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(logits_of(loaded, tokens), expected)


@each
def test_disabling_gives_the_base(trained, tokens):
    model, before, after = trained
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens), before)
    assert torch.equal(logits_of(model, tokens), after)


@each
def test_two_adapters_do_not_touch_each_other(trained, kind, tokens):
    model, before, after = trained
    model.add_adapter("other", config_for(kind))
    assert torch.equal(logits_of(model, tokens), after)
    model.set_adapter("other")
    assert torch.equal(logits_of(model, tokens), before)
    train_briefly(model, tokens.flip(1))
    other = logits_of(model, tokens)
    model.set_adapter("default")
    assert torch.equal(logits_of(model, tokens), after)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits_of(model, tokens), other)


@each
def test_merging_two_adapters_equals_running_both(trained, kind, tokens):
    model, _, _ = trained
    model.add_adapter("other", config_for(kind, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    both = logits_of(model, tokens)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert torch.equal(logits_of(model, tokens), both)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_merging_one_delta_codebook_keeps_the_true_bits(compressed_dir, tokens, dtype):
    base = load(compressed_dir, dtype)
    bits = true_bits(base)
    model = get_peft_model(base, config_for("compressed", num_blocks=1))
    train_briefly(model, tokens)
    assert true_bits(model.merge_and_unload()) == bits


def test_merging_several_delta_codebooks_counts_them(compressed_dir, tokens, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(compressed_dir)
    layer = base.model.layers[0].mlp.up_proj
    extra = 8 * layer.codebook.numel() * layer.codebook.element_size() / (layer.in_features * layer.out_features)
    bits = layer.true_bits
    model = get_peft_model(base, config_for("compressed", num_blocks=2))
    train_briefly(model, tokens)
    model.merge_and_unload().save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.up_proj
    assert merged.spec.num_blocks == 2
    assert merged.true_bits == pytest.approx(bits + extra)


@each
def test_an_adapter_continues_on_a_merged_base(trained, kind, tokens, tmp_path):
    model, _, expected = trained
    merged = model.merge_and_unload()
    again = get_peft_model(merged, config_for(kind))
    if kind == "compressed":
        assert torch.equal(logits_of(again, tokens), expected)
    train_briefly(again, tokens)
    trained_on = logits_of(again, tokens)
    assert torch.equal(logits_of(again.merge_and_unload(), tokens), trained_on)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_compressed_checkpoints_round_trip(compressed_dir, dtype, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    for (name, one), two in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name


# -- on every path

COUNTS = [1, 3, 16, 17, 64]  # tokens
FEW = 16  # up to which kernels other than the dense product's may sum
SIZES = dict(hidden_size=136, intermediate_size=176, num_key_value_heads=4, num_hidden_layers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A dense model whose every matrix is large enough for the compiled kernels, and the same compressed."""
    dense, compressed = (str(tmp_path_factory.mktemp(name)) for name in ("wide", "wide_compressed"))
    # Interpreted kernels take any size, slowly.
    sizes = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=20) if backends.INTERPRETED else SIZES
    tiny_llama(**sizes).save_pretrained(dense)
    config = ClusCompQuantizationConfig(**BORN)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(compressed)
    return {"compressed": compressed, "born": dense, "dense": dense}


@pytest.fixture(params=backends.BACKENDS)
def backend(request, monkeypatch) -> str:
    backends.use_backend(monkeypatch, request.param)
    return request.param


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 96, (1, count), generator=generator) for count in COUNTS]


def loaded_anew(folder: str, dtype: torch.dtype):
    """A model in memory of torch's own: MKL's products depend on how a weight lies in memory, in a file anyhow."""
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def all_logits(model) -> list[torch.Tensor]:
    return [logits_of(model, text) for text in texts()]


def all_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(left, right, strict=True))


@grid(kind=KINDS, dtype=backends.DTYPES)
def test_on_every_path_merging_is_exact(folders, kind, dtype, backend, monkeypatch, tmp_path):
    seen = []
    few = cpu._linear_few
    monkeypatch.setattr(cpu, "_linear_few", lambda *args: seen.append(args) or few(*args))
    base = loaded_anew(folders[kind], dtype)
    expected = all_logits(base)
    model = get_peft_model(base, config_for(kind, num_blocks=2, init_weights=False))
    after = all_logits(model)
    assert not any(torch.equal(one, two) for one, two in zip(expected, after, strict=True))
    assert bool(seen) == (backend == "cpu" and kind != "dense")
    model.merge_adapter()
    assert all_equal(all_logits(model), after)
    with model.disable_adapter():  # also unmerges
        assert kind == "born" or all_equal(all_logits(model), expected)

    merged = model.merge_and_unload()
    for count, ours, theirs in zip(COUNTS, all_logits(merged), after, strict=True):
        if kind == "born" and backend != "reference" and count <= FEW:
            # A layer of codes became an nn.Linear, which sums in another order: README, "Exact to the last bit".
            rounding = torch.finfo(dtype).eps * theirs.abs().max()
            assert (ours - theirs).abs().max() <= 32 * rounding
        else:
            assert torch.equal(ours, theirs), count
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in merged.state_dict().items():
        assert value.dtype == loaded[name].dtype and torch.equal(value, loaded[name]), name


@grid(kind=KINDS, dtype=backends.DTYPES)
def test_on_every_path_a_fresh_adapter_changes_nothing(folders, kind, dtype, backend):
    base = loaded_anew(folders[kind], dtype)
    expected = all_logits(base)
    model = get_peft_model(base, config_for(kind))
    if kind == "born":
        with model.disable_adapter():
            expected = all_logits(model)
    assert all_equal(all_logits(model), expected)
