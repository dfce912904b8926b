"""The `weight` that clustered and adapted layers show to model code: asked of it, computed with, and past it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig, ClusteredLinear, ops
from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.compress.policy import Policy

SPEC = ClusterSpec(2, 12, scale_in=True)
KINDS = {"born": {}, "dense": dict(base="dense")}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


class Reader(nn.Module):
    """Computes with the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.first(x), getattr(self, "second").weight)  # noqa: B009  source that names it is refused


def adapted(model: nn.Module, kind: str, targets: list[str], **changes) -> nn.Module:
    settings = dict(group_size=2, num_clusters=12, target_modules=targets, init_weights=False)
    return get_peft_model(model, ClusCompConfig(**KINDS[kind], **{**settings, **changes}))


@pytest.fixture
def no_decoding(monkeypatch):
    """Whatever decodes a matrix fails."""

    def fail(*args, **kwargs):
        raise AssertionError("a weight was decoded")

    monkeypatch.setattr(ops, "decode", fail)


@each_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_questions_are_answered_as_the_dense_layer_would_for_nothing(dtype, bias, no_decoding):
    dense = nn.Linear(12, 10, bias=bias, dtype=dtype)
    layer = Policy().cluster("layer", dense, SPEC)
    for other in (torch.float32, torch.bfloat16):
        weight = layer.weight
        assert isinstance(weight, torch.Tensor) and layer.codebook.dtype != torch.float64
        assert (weight.dtype, weight.device, weight.shape) == (dense.weight.dtype, dense.weight.device, (10, 12))
        assert weight.numel() == 120 and weight.ndim == 2 and not weight.requires_grad and "LazyWeight" in repr(weight)
        dense, layer = dense.to(other), copy.deepcopy(layer).to(other)
    assert layer.to("meta").weight.is_meta


@each_dtype
def test_computing_with_it_is_computing_with_the_decoded_weight(dtype):
    layer = Policy().cluster("layer", nn.Linear(12, 10, dtype=dtype), SPEC)
    x = torch.randn(3, 12, dtype=dtype, requires_grad=True)
    weight = layer.decode(dtype)
    expected = F.linear(x, weight)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    for y in (F.linear(x, layer.weight), x @ layer.weight.t()):
        assert type(y) is torch.Tensor and torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)
    assert torch.equal(layer.weight.float().sum(), weight.float().sum())


@each_kind
@each_dtype
def test_an_adapted_layer_answers_with_the_dtype_of_the_model(kind, dtype, no_decoding):
    model = adapted(Reader().to(dtype), kind, ["first", "second"])
    weight = model.base_model.model.second.weight
    assert (weight.dtype, weight.shape) == (dtype, (12, 10))


@each_kind
def test_an_adapter_on_a_weight_that_is_read_is_refused_by_name(kind):
    x = torch.randn(3, 12)
    model = adapted(Reader(), kind, ["first", "second"])
    with pytest.raises(RuntimeError, match=r"computes with the weight of second \(12 x 10\) instead of calling"):
        model(x)
    adapted(Reader(), kind, ["first"])(x).sum().backward()


@each_kind
def test_without_an_active_adapter_reading_is_right(kind):
    x, dense = torch.randn(3, 12), Reader()
    model = adapted(copy.deepcopy(dense), kind, ["second"])
    layer = model.base_model.model.second
    base = layer.base_layer.decode(torch.float32) if kind == "born" else dense.second.weight
    with model.disable_adapter():
        assert torch.equal(model(x), F.linear(dense.first(x), base))
    model.merge_adapter()
    merged = layer.base_layer.decode(torch.float32) if kind == "born" else layer.base_layer.weight
    assert not torch.equal(merged, base) and torch.equal(model(x), F.linear(dense.first(x), merged))


@each_kind
def test_the_fast_path_of_torchs_encoder_does_not_pass_an_adapter_by(kind):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0), 1)
    model = adapted(encoder, kind, ["linear1", "linear2"]).eval()
    x = torch.randn(2, 5, 16)
    trained = model(x)  # a graph is recorded, and torch leaves the fast path out
    with torch.no_grad():
        assert torch.allclose(model(x), trained, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(model(x), trained, atol=1e-3)


@each_dtype
def test_t5_computes_as_it_does_dense(dtype, tmp_path):
    """Its MLP casts to the dtype of a weight, which is not that of the codebook."""
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    quantization = ClusCompQuantizationConfig(group_size=2, num_clusters=12)
    clustered = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", quantization_config=quantization)
    clustered.save_pretrained(tmp_path / "compressed")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "compressed", dtype=dtype)
    dense = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    seen = {}
    for which, one in (("compressed", model), ("dense", dense)):
        layer = one.encoder.block[0].layer[1].DenseReluDense.wo
        assert isinstance(layer, ClusteredLinear) == (which == "compressed")
        layer.register_forward_pre_hook(lambda module, given, which=which: seen.update({which: given[0].dtype}))
        one(input_ids=torch.arange(6)[None], labels=torch.arange(4)[None])
    assert seen["compressed"] == seen["dense"] == (torch.float32 if dtype == torch.float16 else dtype)


def test_a_compiler_sees_a_dtype_and_no_break():
    layer = Policy().cluster("layer", nn.Linear(12, 10, dtype=torch.bfloat16), SPEC)
    x = torch.randn(3, 12)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x.to(layer.weight.dtype)), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x.bfloat16()))
