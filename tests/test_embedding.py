"""`ClusteredEmbedding` and the rows that it decodes: the very rows of the decoded weight."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from cluscomp_peft import ops
from cluscomp_peft.clustered_weight import clustered_weights
from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.compress.policy import Policy
from cluscomp_peft.embedding import ClusteredEmbedding, clustered_layer, is_dense_embedding, tied_layer
from cluscomp_peft.linear import all_bits, dense_bits
from cluscomp_peft.ops import PackedWeight
from tests.ops.test_ops import CASES, parts

VOCABULARY, HIDDEN = 50, 12
TOKENS = torch.tensor([[0, 49, 7, 7], [3, 48, 47, 0]])


class Scaled(nn.Embedding):
    """As Gemma's: the rows times a number that is rounded to the dtype of the weight."""

    def __init__(self, *args, scale: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, tokens):
        return super().forward(tokens) * self.scale.to(self.weight.dtype)


def clustered(dense: nn.Embedding, bits: float = 6) -> ClusteredEmbedding:
    policy = Policy(bits=bits, scales=True)
    spec = policy.spec_for("wte", *dense.weight.shape)
    return clustered_layer(dense, policy.cluster("wte", dense.weight, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", {**CASES, "widest codes": dict(group_size=1, clusters=65536)}.items(), ids=str)
def test_rows_are_those_of_the_decoded_weight(case, dtype):
    name, settings = case
    fields = parts(shape=(29, 5), **{key: value for key, value in settings.items() if key not in ("residual", "bias")})
    weight = PackedWeight(*(fields[key] for key in ("codes", "codebook")), 29, fields["scale_in"], fields["scale_out"])
    rows = torch.tensor([28, 0, 13, 13, 27, 1])
    assert torch.equal(ops.decode_rows(weight, rows, dtype), ops.decode(weight, dtype)[rows]), name


@pytest.mark.parametrize("clusters", range(2, 300, 37))
def test_rows_of_every_width_of_codes(clusters):
    fields = parts(shape=(61, 4), group_size=2, clusters=clusters)
    weight = PackedWeight(fields["codes"], fields["codebook"], 61)
    assert torch.equal(ops.decode_rows(weight, torch.arange(61)), ops.decode(weight))


def test_many_rows_are_decoded_in_pieces(monkeypatch):
    fields = parts(shape=(61, 4), group_size=3, clusters=9, scale_in=True)
    weight = PackedWeight(fields["codes"], fields["codebook"], 61, fields["scale_in"])
    monkeypatch.setattr("cluscomp_peft.ops.rows._TILE_ELEMENTS", 20)
    assert torch.equal(ops.decode_rows(weight, torch.arange(61, dtype=torch.int32)), ops.decode(weight))


@pytest.mark.parametrize("row", [-1, 29])
def test_a_row_that_is_not_there(row):
    fields = parts(shape=(29, 5))
    with pytest.raises(IndexError, match=f"there are 29 rows, from 0; got {row}"):
        ops.decode_rows(PackedWeight(fields["codes"], fields["codebook"], 29), torch.tensor([0, row]))


def test_no_rows():
    fields = parts(shape=(29, 5))
    found = ops.decode_rows(PackedWeight(fields["codes"], fields["codebook"], 29), torch.tensor([], dtype=torch.int64))
    assert found.shape == (0, 5)


def test_rows_with_a_residual_are_refused():
    fields = parts(shape=(29, 5), residual=True)
    weight = PackedWeight(fields["codes"], fields["codebook"], 29, residual=fields["residual"])
    with pytest.raises(ValueError, match="with a residual"):
        ops.decode_rows(weight, torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Embedding(VOCABULARY, HIDDEN),
        lambda: nn.Embedding(VOCABULARY, HIDDEN, padding_idx=3),
        lambda: Scaled(VOCABULARY, HIDDEN, scale=7.3),
        lambda: nn.Embedding(VOCABULARY, HIDDEN, max_norm=1.0),
    ],
    ids=["plain", "padding", "scaled", "max_norm"],
)
def test_it_computes_what_the_dense_embedding_does_with_the_decoded_weight(make, dtype):
    dense = make().to(dtype)
    layer = clustered(dense)
    expected = copy.deepcopy(dense)
    expected.weight.data.copy_(layer.decode(dtype))
    with torch.no_grad():
        assert torch.equal(layer(TOKENS), expected(TOKENS))
        again = layer.to_dense(dtype)
        assert type(again) is type(dense) and again.padding_idx == dense.padding_idx
        assert torch.equal(again(TOKENS), layer(TOKENS))
    assert layer(TOKENS).dtype == dtype and layer.weight.shape == (VOCABULARY, HIDDEN)


def test_several_threads_look_up_at_once():
    together = threading.Barrier(2, timeout=60)

    class Waiting(Scaled):
        def forward(self, tokens):
            if threading.current_thread() is not threading.main_thread():
                together.wait()
            return super().forward(tokens)

    layer = clustered(Waiting(VOCABULARY, HIDDEN, scale=3.0))
    given = [TOKENS[:1], TOKENS[1:]]
    expected = [layer(tokens) for tokens in given]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(layer, given))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_the_class_of_the_model_runs_compiled():
    layer = clustered(Scaled(VOCABULARY, HIDDEN, scale=3.0))
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(TOKENS), layer(TOKENS)) and torch.equal(compiled(TOKENS), layer(TOKENS))


def test_it_follows_casts_and_copies():
    layer = clustered(Scaled(VOCABULARY, HIDDEN, scale=3.0))
    expected = layer(TOKENS)
    assert torch.equal(copy.deepcopy(layer)(TOKENS), expected)
    assert layer.to(torch.bfloat16)(TOKENS).dtype == torch.bfloat16
    assert layer.codes.dtype == torch.uint8 and layer.rows.scale.dtype == torch.bfloat16


def test_the_state_dict_fills_a_fresh_layer():
    dense = Scaled(VOCABULARY, HIDDEN, scale=3.0)
    layer = clustered(dense)
    fresh = ClusteredEmbedding(dense, layer.spec)
    fresh.load_state_dict(layer.state_dict())
    assert layer.state_dict().keys() == {"codes", "codebook", "scale_in", "scale_out"}
    assert torch.equal(fresh(TOKENS), layer(TOKENS)) and fresh.fingerprint() == layer.fingerprint()


def test_its_first_number_has_the_dtype_of_the_model():
    for dtype in (torch.float32, torch.bfloat16):
        layer = clustered(nn.Embedding(VOCABULARY, HIDDEN, dtype=dtype))
        assert next(p.dtype for p in layer.parameters() if p.is_floating_point()) == dtype
        assert layer.codebook.dtype == torch.float16
        sizes = [value.numel() * value.element_size() for value in layer.state_dict().values()]
        assert layer.stored_bytes() == sum(sizes)
        assert layer.true_bits == 8 * sum(sizes) / (VOCABULARY * HIDDEN)
    with pytest.raises(ValueError, match="its spec has none"):
        ClusteredEmbedding(nn.Embedding(VOCABULARY, HIDDEN), ClusterSpec(1, 8))


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_shares_every_tensor(bias):
    source = clustered(nn.Embedding(VOCABULARY, HIDDEN))
    dense = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    head = tied_layer(dense, source)
    assert all(head._parameters[name] is source._parameters[name] for name in ("codes", "codebook", "scale_out"))
    x = torch.randn(20, HIDDEN)
    assert torch.equal(head(x), nn.functional.linear(x, source.decode(torch.float32), dense.bias))
    model = nn.ModuleDict({"wte": source, "body": nn.Linear(4, 4), "head": head})
    assert [name for name, _ in clustered_weights(model)] == ["wte"]
    assert dense_bits(model) == (64, 16)
    biases = 4 + VOCABULARY * bias
    assert all_bits(model) == (64 + source.stored_bytes() + 4 * biases, 16 + VOCABULARY * HIDDEN + biases)


def test_what_is_no_embedding_that_can_be_clustered():
    class More(nn.Embedding):
        def __init__(self):
            super().__init__(4, 4)
            self.further = nn.Embedding(2, 4)

    assert is_dense_embedding(nn.Embedding(4, 4)) and is_dense_embedding(Scaled(4, 4, scale=1.0))
    assert not is_dense_embedding(More()) and not is_dense_embedding(nn.Linear(4, 4))
