"""The clustered layer: building, decoding, deltas, exact merging and its counts."""

import math
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import DebertaConfig, DebertaModel
from transformers.pytorch_utils import Conv1D

from cluscomp_peft import ClusCompConfig, ops
from cluscomp_peft.codes import ClusterSpec, checksum, code_bits, fingerprint, num_groups, pack
from cluscomp_peft.deltas import Delta, apply_deltas
from cluscomp_peft.dense import LINEAR_CLASSES, is_dense_linear, weight_of
from cluscomp_peft.linear import ClusteredLinear, dense_bits

IN, OUT, GROUP, CLUSTERS = 10, 13, 3, 6
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def clustered(dtype=torch.float16, blocks=1, scale_in=True, scale_out=True, bias=True, conv1d=False):
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(size, generator=generator)

    codes = torch.randint(0, CLUSTERS, (IN, num_groups(OUT, GROUP)), generator=generator)
    return ClusteredLinear.from_parts(
        pack(codes, code_bits(CLUSTERS)),
        normal(blocks, CLUSTERS, GROUP).to(dtype),
        (1 + normal(IN) / 4).to(dtype) if scale_in else None,
        (1 + normal(OUT) / 4).to(dtype) if scale_out else None,
        nn.Parameter(normal(OUT)) if bias else None,
        OUT,
        conv1d=conv1d,
    )


def delta(blocks=1, scale_in=False, scale_out=False, seed=0, size=0.05) -> Delta:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * size

    return Delta(
        normal(blocks, CLUSTERS, GROUP),
        normal(IN) if scale_in else None,
        normal(OUT) if scale_out else None,
    )


def inputs(dtype=torch.float32, batch=4) -> torch.Tensor:
    return torch.randn(batch, IN, generator=torch.Generator().manual_seed(9)).to(dtype)


DELTAS = {
    "codebook": [delta()],
    "scales": [delta(scale_in=True, scale_out=True)],
    "scale_in": [delta(scale_in=True)],
    "scale_out": [delta(scale_out=True)],
    "finer blocks": [delta(6)],
    "two of them": [delta(scale_in=True), delta(scale_in=True, scale_out=True, seed=1)],
    "different blocks": [delta(4, scale_out=True), delta(3, seed=1), delta(1, scale_in=True, seed=2)],
    "large": [delta(2, scale_in=True, scale_out=True, size=5.0)],
    "tiny": [delta(2, scale_in=True, scale_out=True, size=1e-6)],
}
each_delta = pytest.mark.parametrize("deltas", DELTAS.values(), ids=DELTAS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scales", [(False, False), (True, False), (True, True)])
def test_a_fresh_layer_cannot_pass_for_a_loaded_one(bias, scales):
    spec = ClusterSpec(GROUP, CLUSTERS, 2, *scales)
    layer = ClusteredLinear(IN, OUT, spec, bias=bias, codebook_dtype=torch.bfloat16, dtype=torch.float16)
    assert layer.spec == spec
    names = {"codes", "codebook"} | {
        name for name, there in zip(("scale_in", "scale_out", "bias"), (*scales, bias), strict=True) if there
    }
    assert set(dict(layer.named_parameters())) == set(layer.state_dict()) == names
    for name, parameter in layer.named_parameters():
        assert not parameter.requires_grad
        if name == "codes":
            assert parameter.dtype == torch.uint8 and not parameter.any()
        else:
            assert parameter.dtype == (torch.float16 if name == "bias" else torch.bfloat16)
            assert parameter.isnan().all()
    assert layer(inputs()).isnan().all()


def test_from_parts_copies_nothing():
    source = clustered()
    parts = [source.codes, source.codebook, source.scale_in, source.scale_out, source.bias]
    layer = ClusteredLinear.from_parts(*parts, OUT)
    assert [layer.codes, layer.codebook, layer.scale_in, layer.scale_out, layer.bias] == parts
    assert all(ours is theirs for ours, theirs in zip(layer.parameters(), source.parameters(), strict=True))
    assert (layer.in_features, layer.out_features, layer.conv1d) == (IN, OUT, False)
    assert layer.bias.requires_grad and not layer.codebook.requires_grad


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_layer_reports_its_spec(blocks):
    layer = clustered(blocks=blocks, scale_in=False)
    assert layer.spec == ClusterSpec(GROUP, CLUSTERS, blocks, False, True)
    text = repr(layer)
    for part in (f"in_features={IN}", f"out_features={OUT}", "bias=True", f"group_size={GROUP}", "scale_out=True"):
        assert part in text


@pytest.mark.parametrize("conv1d", [False, True])
def test_the_state_dict_fills_a_fresh_layer(conv1d):
    source = clustered(blocks=2, conv1d=conv1d)
    layer = ClusteredLinear(IN, OUT, source.spec, bias=True, conv1d=conv1d)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(inputs()), source(inputs()))
    assert layer.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("stored", DTYPES)
def test_decode_is_what_the_op_decodes(stored, dtype):
    layer = clustered(stored, blocks=2)
    weight = layer.decode(dtype)
    assert weight.dtype == (dtype or stored) and not weight.requires_grad
    packed = ops.PackedWeight(layer.codes, layer.codebook, OUT, layer.scale_in, layer.scale_out)
    assert torch.equal(weight, ops.decode(packed, weight.dtype))


@pytest.mark.parametrize("conv1d", [False, True])
def test_weight_decodes_in_the_orientation_of_the_dense_layer(conv1d):
    layer = clustered(conv1d=conv1d)
    assert "weight" not in dict(layer.named_parameters()) and "weight" not in layer.state_dict()
    expected = layer.decode().t() if conv1d else layer.decode()
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.weight, expected)


def test_writing_into_the_weight_changes_nothing():
    layer = clustered()
    before = layer(inputs())
    layer.weight.zero_()
    assert torch.equal(layer(inputs()), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_dense_layer(dtype, bias):
    layer = clustered(bias=bias)
    x = inputs(dtype)
    dense = layer.to_dense(dtype)
    expected = F.linear(x, dense.weight, None if not bias else layer.bias.to(dtype))
    assert torch.equal(layer(x), expected)
    assert type(dense) is nn.Linear and dense.bias is layer.bias
    assert (dense.in_features, dense.out_features) == (IN, OUT)
    assert torch.equal(dense.weight, layer.decode(dtype)) and not dense.weight.requires_grad


def test_to_dense_gives_a_conv1d_back():
    layer = clustered(torch.float32, conv1d=True)
    dense = layer.to_dense(torch.float32)
    assert type(dense) is Conv1D and dense.bias is layer.bias
    assert dense.weight.shape == (IN, OUT) and dense.weight.is_contiguous()
    assert torch.equal(weight_of(dense), layer.decode())
    torch.testing.assert_close(dense(inputs()), layer(inputs()))


def test_three_dimensional_inputs_keep_their_shape():
    layer = clustered()
    x = inputs(batch=6)
    torch.testing.assert_close(layer(x.view(2, 3, IN)), layer(x).view(2, 3, OUT))


@each_delta
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("scales", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_is_exact(dtype, scales, blocks, deltas):
    layer = clustered(dtype, blocks, *scales)
    xs = [inputs(kind) for kind in DTYPES]
    before = layer(xs[0])
    with torch.no_grad():
        expected = [layer(x, deltas) for x in xs]
    weights = [layer.decode(kind, deltas) for kind in DTYPES]
    fingerprint_before = layer.fingerprint()
    assert torch.equal(layer(xs[0]), before)
    layer.merge(deltas)
    for x, y, weight in zip(xs, expected, weights, strict=True):
        assert torch.equal(layer(x), y)
        assert torch.equal(layer.decode(weight.dtype), weight)
    assert {p.dtype for name, p in layer.named_parameters() if name not in ("codes", "bias")} == {dtype}
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")
    assert layer.fingerprint() == fingerprint_before
    assert layer.spec.scale_in == (scales[0] or any(d.scale_in is not None for d in deltas))
    assert layer.spec.scale_out == (scales[1] or any(d.scale_out is not None for d in deltas))
    assert layer.spec.num_blocks == min(IN, math.lcm(blocks, *(len(d.codebook) for d in deltas)))


def test_merging_writes_the_sum_of_the_deltas():
    layer = clustered(torch.float32, blocks=2)
    codebook, scale_in, scale_out = (p.clone() for p in (layer.codebook, layer.scale_in, layer.scale_out))
    one, two = delta(2, scale_in=True), delta(4, scale_in=True, scale_out=True, seed=1)
    layer.merge([one, two])
    expected = (codebook + one.codebook).repeat_interleave(2, 0) + two.codebook
    torch.testing.assert_close(layer.codebook.detach(), expected)
    torch.testing.assert_close(layer.scale_in.detach(), scale_in * (1 + one.scale_in + two.scale_in))
    torch.testing.assert_close(layer.scale_out.detach(), scale_out * (1 + two.scale_out))


def test_merging_rounds_to_nearest():
    layer = clustered(torch.float16, scale_in=False, scale_out=False)
    expected = (layer.codebook.float() + delta(scale_out=True).codebook).half()
    layer.merge([delta(scale_out=True)])
    assert torch.equal(layer.codebook, expected)
    assert torch.equal(layer.scale_out, (1 + delta(scale_out=True).scale_out).half())


def test_merging_nothing_changes_nothing():
    layer = clustered()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge([])
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_zero_delta_changes_no_bit():
    layer = clustered(torch.bfloat16)
    zero = Delta(torch.zeros(2, CLUSTERS, GROUP), torch.zeros(IN), torch.zeros(OUT))
    assert torch.equal(layer(inputs(), [zero]), layer(inputs()))


def test_coarser_deltas_keep_the_blocks_of_the_layer():
    layer = clustered(torch.float32, blocks=4)
    change = delta(2)
    expected = layer.codebook.detach() + change.codebook[[0, 0, 1, 1]]
    effective = layer.effective([change])[0]
    assert effective.shape == (4, CLUSTERS, GROUP)
    assert torch.equal(effective, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@each_delta
def test_true_bits_count_what_is_stored(dtype, deltas):
    layer = clustered(dtype)
    before = layer.true_bits
    layer.merge(deltas)
    stored = sum(p.nbytes for name, p in layer.named_parameters() if name != "bias")
    assert layer.true_bits == 8 * stored / (IN * OUT)
    blocks = layer.spec.num_blocks
    added = (blocks - 1) * CLUSTERS * GROUP * dtype.itemsize
    assert layer.true_bits == pytest.approx(before + 8 * added / (IN * OUT))


@pytest.mark.parametrize("dtype", DTYPES)
def test_effective_values_are_those_of_the_stored_dtype(dtype):
    layer = clustered(dtype)
    deltas = DELTAS["different blocks"]
    for value in layer.effective(deltas):
        assert value.dtype == torch.float32
        assert torch.equal(value.to(dtype).float(), value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [False, True])
def test_the_gradient_of_deltas_passes_through_rounding(dtype, scales):
    layer = clustered(dtype, 2, scales, scales)
    one, two = delta(2, scale_in=True, scale_out=True), delta(4, scale_in=True, seed=1)
    leaves = [tensor.requires_grad_() for d in (one, two) for tensor in d if tensor is not None]
    for leaf in leaves:
        leaf.grad = None
    effective = apply_deltas(layer.codebook, layer.scale_in, layer.scale_out, [one, two])
    upstream = [torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for value in effective]
    torch.autograd.backward(effective, upstream)
    codebook, scale_in, scale_out = upstream
    stored_in = layer.scale_in.float() if scales else 1
    stored_out = layer.scale_out.float() if scales else 1
    torch.testing.assert_close(one.codebook.grad, codebook.view(2, 2, CLUSTERS, GROUP).sum(1))
    torch.testing.assert_close(two.codebook.grad, codebook)
    torch.testing.assert_close(one.scale_in.grad, scale_in * stored_in)
    torch.testing.assert_close(two.scale_in.grad, scale_in * stored_in)
    torch.testing.assert_close(one.scale_out.grad, scale_out * stored_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deltas_train_through_the_layer(dtype):
    layer = clustered(dtype)
    change = delta(2, scale_in=True, scale_out=True, size=0.0)
    target = inputs() @ layer.decode(torch.float32, [delta(2, scale_in=True, scale_out=True, size=0.3)]).t()
    leaves = [tensor.requires_grad_() for tensor in change]
    optimizer = torch.optim.Adam(leaves, lr=0.03)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(inputs(), [change]) - layer.bias.detach(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert layer.codebook.grad is None and layer.scale_in.grad is None


def test_gradient_reaches_input_and_trained_bias():
    layer = clustered()
    x = inputs().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.decode(torch.float32).sum(0).expand(4, IN))
    assert torch.equal(layer.bias.grad, torch.full((OUT,), 4.0))


def test_modules_that_change_their_input_in_place_train():
    layer = clustered(bias=True)
    layer.bias.requires_grad_()
    x = torch.randn(2, 3, layer.in_features)
    nn.Sequential(layer, nn.ReLU(inplace=True))(x).sum().backward()
    assert torch.equal(layer.bias.grad, (layer(x) > 0).sum((0, 1)).float())


def test_a_model_that_changes_results_in_place_trains_an_adapter():
    config = DebertaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    targets = ["in_proj", "pos_proj", "pos_q_proj", "dense"]
    model = get_peft_model(DebertaModel(config), ClusCompConfig(target_modules=targets, group_size=2, num_clusters=16))
    model(torch.arange(12).view(2, 6)).last_hidden_state.square().sum().backward()
    trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert all(grad is not None and grad.any() for name, grad in trained.items() if "in_proj" in name)


def test_the_fingerprint_follows_the_codes():
    layer = clustered()
    before = layer.fingerprint()
    assert before == fingerprint(layer.codes, OUT, layer.spec)
    layer.codebook.data += 1
    assert layer.fingerprint() == before
    with torch.no_grad():
        layer.codes[0, 0] ^= 1
    changed = layer.fingerprint()
    assert changed != before
    layer.set_parameter("codes", layer.codes.clone().zero_())
    assert layer.fingerprint() not in (before, changed)


def test_the_fingerprint_follows_codes_that_change_in_secret():
    layer = clustered()
    seen = {layer.fingerprint()}
    layer.codes.data[3, 1] ^= 8  # counted by no version
    seen.add(layer.fingerprint())
    layer.codes = nn.Parameter(layer.codes.data.clone(), requires_grad=False)
    layer.codes.data[0, 0] ^= 1
    replaced = layer.codes.data.numpy()
    replaced[-1, -1] ^= 1  # past torch
    seen.add(layer.fingerprint())
    assert len(seen) == 3
    # The same memory, taken for other codes: what an allocator does when a model is loaded after another.
    memory = layer.codes.detach().clone()
    one, two = clustered(), clustered()
    for layer in (one, two):
        layer.codes = nn.Parameter(memory, requires_grad=False)
    before = one.fingerprint(), two.fingerprint()
    memory.data.bitwise_xor_(torch.ones_like(memory.data))
    assert before[0] == before[1]
    assert one.fingerprint() == two.fingerprint() == fingerprint(memory, OUT, one.spec) != before[0]


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (9, 8), (64, 1024), (300, 2000)])
def test_a_checksum_notices_every_flip_and_exchange(size):
    codes = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, flat = checksum(codes), codes.view(-1)
    assert checksum(codes.clone()) == checksum(torch.cat([flat.new_zeros(3), flat])[3:].view(size)) == before
    for index in {0, flat.numel() - 1, flat.numel() // 2, flat.numel() // 3}:
        for bit in range(8):
            flat[index] ^= 1 << bit
            assert checksum(codes) != before
            flat[index] ^= 1 << bit
    for distance in (8, 16, 8 * 2**16):
        if flat.numel() > distance + 8 and not torch.equal(flat[:8], flat[distance : distance + 8]):
            other = flat.clone()
            other[:8], other[distance : distance + 8] = flat[distance : distance + 8], flat[:8]
            assert checksum(other) != before
    assert checksum(codes) == before


def test_casting_the_layer_keeps_the_codes():
    layer = clustered()
    codes = layer.codes.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.codes, codes) and layer.codes.dtype == torch.uint8
    assert layer.codebook.dtype == torch.bfloat16
    assert layer(inputs(torch.bfloat16)).isfinite().all()


def test_a_clustered_layer_is_no_dense_one():
    class Odd(nn.Linear):
        pass

    assert is_dense_linear(nn.Linear(2, 2)) and is_dense_linear(Conv1D(2, 2))
    assert not any(is_dense_linear(module) for module in (clustered(), Odd(2, 2), nn.Conv1d(2, 2, 1), nn.ReLU()))
    assert not isinstance(clustered(), nn.Linear)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("path", LINEAR_CLASSES)
def test_listed_classes_are_the_linear_map(path, bias):
    """A release of theirs in which one of them computes something else, or is gone, fails here."""
    kind = pkgutil.resolve_name(path)
    layer, x = kind(5, 3, bias=bias), torch.randn(2, 4, 5)
    assert issubclass(kind, nn.Linear) and is_dense_linear(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.register_buffer("weight_scale", torch.ones(3))
    assert not is_dense_linear(layer)


def test_weight_of_is_a_view_of_out_by_in():
    for module in (nn.Linear(3, 5), Conv1D(5, 3)):
        weight = weight_of(module)
        assert weight.shape == (5, 3)
        assert weight.data_ptr() == module.weight.data_ptr()


def test_dense_bits_count_every_linear_layer_but_the_head():
    class Model(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.a = clustered(torch.float32)
            self.b = nn.Linear(8, 4, dtype=torch.bfloat16)
            self.c = Conv1D(4, 6)
            self.norm = nn.LayerNorm(8)
            self.embed = nn.Embedding(9, 8)
            self.head = head

        def get_output_embeddings(self):
            return self.head

    model = Model(nn.Linear(8, 9))
    stored = sum(p.nbytes for name, p in model.a.named_parameters() if name != "bias")
    expected = (stored + 2 * 32 + 4 * 24, IN * OUT + 32 + 24)
    assert dense_bits(model) == expected
    clustered_head = clustered(torch.float16, blocks=2)
    head_bytes = sum(p.nbytes for name, p in clustered_head.named_parameters() if name != "bias")
    assert dense_bits(Model(clustered_head)) == (expected[0] + head_bytes, expected[1] + IN * OUT)
    assert dense_bits(nn.Sequential(nn.Linear(8, 9))) == (4 * 72, 72)
    assert dense_bits(nn.ReLU()) == (0, 0)
