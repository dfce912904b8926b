"""Decoding, the linear op and its gradients against slow references, and their way through torch's machinery."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from cluscomp_peft import ops
from cluscomp_peft.codes import ClusterSpec, code_bits, num_groups, pack
from cluscomp_peft.linear import ClusteredLinear
from cluscomp_peft.ops.backends import reference

IN, OUT = 7, 11
CASES = {
    "plain": {},
    "no padding": dict(group_size=11, clusters=3),
    "scalar groups": dict(group_size=1, clusters=2),
    "padding": dict(group_size=4, clusters=6),
    "wide group": dict(group_size=16, clusters=3),
    "blocks": dict(blocks=3),
    "more blocks than inputs": dict(blocks=9),
    "scale_in": dict(scale_in=True),
    "scale_out": dict(scale_out=True),
    "residual": dict(residual=True),
    "bias": dict(bias=True),
    "everything": dict(blocks=2, scale_in=True, scale_out=True, residual=True, bias=True, group_size=4),
    "residual and scale_in": dict(residual=True, scale_in=True, blocks=2),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def parts(
    dtype=torch.float32,
    group_size=3,
    clusters=5,
    blocks=1,
    scale_in=False,
    scale_out=False,
    residual=False,
    bias=False,
    shape=(OUT, IN),
    seed=0,
) -> dict:
    """The fields of a `PackedWeight`, "bias", and under "plain" the codes as integers."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    plain = torch.randint(0, clusters, (in_features, num_groups(out_features, group_size)), generator=generator)
    return {
        "plain": plain,
        "codes": pack(plain, code_bits(clusters)),
        "codebook": normal(blocks, clusters, group_size),
        "scale_in": 1 + normal(in_features) / 4 if scale_in else None,
        "scale_out": 1 + normal(out_features) / 4 if scale_out else None,
        "residual": normal(out_features, in_features) if residual else None,
        "bias": normal(out_features) if bias else None,
        "out_features": out_features,
    }


def packed(given: dict) -> ops.PackedWeight:
    return ops.PackedWeight(**{name: given[name] for name in ops.PackedWeight._fields})


def linear(x: torch.Tensor, given: dict) -> torch.Tensor:
    return ops.linear(x, packed(given), given["bias"])


def decode(given: dict, dtype: torch.dtype | None = None) -> torch.Tensor:
    return ops.decode(packed(given), dtype)


def codebook_grad(x: torch.Tensor, grad_output: torch.Tensor, given: dict) -> tuple[torch.Tensor, ...]:
    return ops.codebook_grad(x, grad_output, packed(given))


def dense(given: dict) -> torch.Tensor:
    """The weight in plain indexing that autograd follows, in the dtype of the parts."""
    codebook, plain = given["codebook"], given["plain"]
    (blocks, _, group_size), in_features = codebook.shape, len(plain)
    rows = []
    for o in range(given["out_features"]):
        row = [
            codebook[i * blocks // in_features, plain[i, o // group_size], o % group_size] for i in range(in_features)
        ]
        rows.append(torch.stack(row))
    weight = torch.stack(rows)
    if given["residual"] is not None:
        weight = weight + given["residual"]
    if given["scale_in"] is not None:
        weight = weight * given["scale_in"]
    if given["scale_out"] is not None:
        weight = weight * given["scale_out"][:, None]
    return weight


def trained(given: dict) -> dict[str, torch.Tensor]:
    """Leaves that gradients are compared on."""
    names = ("codebook", "scale_in", "scale_out", "residual", "bias")
    return {name: given[name].requires_grad_() for name in names if given[name] is not None}


def gradients(run, x: torch.Tensor, given: dict) -> dict[str, torch.Tensor]:
    leaves = {"x": x.requires_grad_(), **trained(given)}
    for leaf in leaves.values():
        leaf.grad = None
    run()
    return {name: leaf.grad.clone() for name, leaf in leaves.items()}


def tokens(*size: int, dtype=torch.float32, seed=5) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_decode_is_no_part_of_the_graph():
    given = parts()
    given["codebook"].requires_grad_()
    assert not decode(given).requires_grad


@each_case
def test_gradients_are_those_of_finite_differences(case):
    given = parts(torch.float64, **case)
    x = tokens(3, IN, dtype=torch.float64).requires_grad_()
    leaves = trained(given)

    def run(x, *values):
        return linear(x, {**given, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradcheck(run, (x, *leaves.values()))


@pytest.mark.parametrize("size", [(IN,), (2, 3, IN)])
@each_case
def test_gradients_are_those_of_the_dense_layer(case, size):
    given = parts(torch.float32, **case)
    x = tokens(*size)
    upstream = tokens(*size[:-1], OUT, seed=6)
    ours = gradients(lambda: linear(x, given).backward(upstream), x, given)
    theirs = gradients(lambda: F.linear(x, dense(given), given["bias"]).backward(upstream), x, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@each_case
def test_gradients_in_half_precision_stay_near_fp32(case):
    given = parts(torch.float32, **case)
    x, upstream = tokens(20, IN), tokens(20, OUT, seed=6)
    exact = gradients(lambda: linear(x, given).backward(upstream), x, given)
    half = x.detach().bfloat16()
    rounded = gradients(lambda: linear(half, given).backward(upstream.bfloat16()), half, given)
    assert rounded["x"].dtype == torch.bfloat16
    for name, value in rounded.items():
        assert value.dtype == (torch.bfloat16 if name == "x" else torch.float32)
        assert (value.float() - exact[name]).norm() < 0.02 * exact[name].norm(), name


def test_gradients_come_in_the_dtype_of_their_parameter():
    given = parts(torch.float16, scale_in=True, scale_out=True, residual=True, bias=True)
    x = tokens(4, IN, dtype=torch.bfloat16)
    grads = gradients(lambda: linear(x, given).sum().backward(), x, given)
    assert {name: grad.dtype for name, grad in grads.items()} == {
        "x": torch.bfloat16,
        **{name: torch.float16 for name in ("codebook", "scale_in", "scale_out", "residual", "bias")},
    }


def test_no_tokens_give_zero_gradients():
    given = parts(scale_in=True, scale_out=True)
    x = tokens(0, IN)
    grads = gradients(lambda: linear(x, given).sum().backward(), x, given)
    assert grads["x"].shape == (0, IN)
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("frozen", ["x", "codebook", "scale_in", "scale_out", "residual", "bias"])
def test_frozen_tensors_get_no_gradient_and_change_no_other(frozen):
    given = parts(**CASES["everything"])
    x, upstream = tokens(4, IN), tokens(4, OUT, seed=6)
    full = gradients(lambda: linear(x, given).backward(upstream), x, given)
    leaves = {"x": x, **trained(given)}
    for leaf in leaves.values():
        leaf.grad = None
    leaves[frozen].requires_grad_(False)
    linear(x, given).backward(upstream)
    assert leaves.pop(frozen).grad is None
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, full[name]), name


@pytest.mark.parametrize("elements", [1, OUT, 2 * OUT + 3, 5 * OUT])
@each_case
def test_tiles_change_nothing(case, elements, monkeypatch):
    given = parts(torch.float64, **case)
    x, upstream = tokens(3, IN, dtype=torch.float64), tokens(3, OUT, dtype=torch.float64, seed=6)
    whole = gradients(lambda: linear(x, given).backward(upstream), x, given)
    weight = decode(given)
    monkeypatch.setattr(reference, "_TILE_ELEMENTS", elements)
    tiled = gradients(lambda: linear(x, given).backward(upstream), x, given)
    assert torch.equal(decode(given), weight)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16])
def test_autocast_sets_the_dtype_but_not_the_sums(dtype, parameters):
    given = parts(parameters, **{**CASES["everything"], "shape": (48, 40)})
    x, upstream = tokens(30, 40), tokens(30, 48, seed=6).to(dtype)

    def run():
        with torch.autocast("cpu", dtype=dtype):
            y = linear(x, given)
            assert y.dtype == dtype
            assert torch.equal(y, linear(x.to(dtype), given))
            # Backward inside the region is what a Trainer's step may do; autocast must not reach the sums.
            y.backward(upstream)

    grads = gradients(run, x, given)
    assert grads["x"].dtype == torch.float32
    given = {name: value.detach() if torch.is_tensor(value) else value for name, value in given.items()}
    exact = codebook_grad(x.detach().to(dtype).double(), upstream.double(), given)
    tolerance = 1e-5 if parameters == torch.float32 else 1e-3
    for name, expected in zip(("codebook", "scale_in", "scale_out"), exact, strict=True):
        assert grads[name].dtype == parameters
        assert (grads[name].double() - expected).norm() < tolerance * expected.norm(), name
    inexact = F.linear(x.detach(), decode(given, torch.float32), given["bias"].detach().float())
    assert (linear(x.detach().to(dtype), given).float() - inexact).norm() < 0.02 * inexact.norm()


def test_autocast_leaves_fp64_alone():
    given = parts(torch.float64)
    x = tokens(4, IN, dtype=torch.float64)
    expected = linear(x, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, given), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(use_reentrant, autocast):
    given = parts(**CASES["everything"])
    x = tokens(4, IN)

    def block(x):
        return F.silu(linear(x, given)) ** 2

    def plain():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = block(x).sum()
        loss.backward()

    def checkpointed():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = checkpoint(block, x, use_reentrant=use_reentrant).sum()
        loss.backward()

    expected = gradients(plain, x, given)
    for name, grad in gradients(checkpointed, x, given).items():
        assert torch.equal(grad, expected[name]), name


def test_a_layer_used_twice_sums_its_gradients():
    given = parts(torch.float64, shape=(6, 6), scale_in=True, scale_out=True, bias=True)
    x = tokens(4, 6, dtype=torch.float64)

    def run(layer):
        return gradients(lambda: (layer(torch.tanh(layer(x))) ** 2).sum().backward(), x, given)

    ours = run(lambda x: linear(x, given))
    theirs = run(lambda x: F.linear(x, dense(given), given["bias"]))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", [CASES["plain"], CASES["everything"]], ids=["plain", "everything"])
def test_the_graph_holds_no_dense_weight(case, autocast):
    shape = (60, 50)
    given = parts(**{**case, "residual": False, "shape": shape})
    x = tokens(4, 50).requires_grad_()
    trained(given)
    saved = []

    def remember(tensor):
        saved.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        y = linear(x, given)
    inputs = [given[name] for name in ("codes", "codebook", "scale_in", "scale_out") if given[name] is not None]
    assert saved
    assert all(tensor.numel() < shape[0] * shape[1] for tensor in saved)
    assert sum(t.nbytes for t in saved) <= x.nbytes + sum(t.nbytes for t in inputs)
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    others = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in known]
    assert [tensor.shape for tensor in others] == [x.shape]
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_without_a_break_it_is_the_eager_op(dtype):
    given = parts(**CASES["everything"])
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):
        x, upstream = tokens(batch, IN, dtype=dtype), tokens(batch, OUT, dtype=dtype, seed=6)
        assert torch.equal(compiled(x, given), linear(x, given))
        eager = gradients(lambda x=x, upstream=upstream: linear(x, given).backward(upstream), x, given)
        ours = gradients(lambda x=x, upstream=upstream: compiled(x, given).backward(upstream), x, given)
        for name, grad in ours.items():
            assert torch.equal(grad, eager[name]), name


def test_compiled_under_autocast_it_is_the_eager_op():
    given = parts(**CASES["everything"])
    x = tokens(3, IN)
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x, given)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, linear(x, given))


def test_compiled_decode_is_the_eager_one():
    given = parts(**CASES["everything"])
    torch.compiler.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given, torch.bfloat16), decode(given, torch.bfloat16))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_eager_numbers():
    given = parts(scale_in=True, scale_out=True, bias=True)
    x = tokens(3, IN)
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True)
    eager = gradients(lambda: linear(x, given).square().sum().backward(), x, given)
    ours = gradients(lambda: compiled(x, given).square().sum().backward(), x, given)
    torch.testing.assert_close(compiled(x, given), linear(x, given), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [CASES["plain"], CASES["everything"]], ids=["plain", "everything"])
@pytest.mark.parametrize("op", ["decode", "linear", "codebook_grad"])
def test_ops_are_registered_soundly(op, case):
    given = parts(**case)
    x = tokens(3, IN)
    weight = [given[name] for name in ("codes", "codebook", "scale_in", "scale_out", "residual")]
    if op == "linear":
        trained(given)
        x.requires_grad_()
    arguments = {
        "decode": (*weight, OUT, torch.bfloat16),
        "linear": (x, *weight, given["bias"], OUT),
        "codebook_grad": (x, tokens(3, OUT, seed=6), *weight),
    }[op]
    assert set(torch.library.opcheck(getattr(torch.ops.cluscomp, op).default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("size", [(4, IN), (2, 3, IN)])
def test_shapes_are_known_without_data(size):
    given = parts(**CASES["everything"])
    with FakeTensorMode() as mode:
        given = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
        y = linear(torch.empty(size, dtype=torch.bfloat16), given)
        weight = decode(given, torch.float16)
    assert y.shape == (*size[:-1], OUT) and y.dtype == torch.bfloat16
    assert weight.shape == (OUT, IN) and weight.dtype == torch.float16


def test_decode_runs_on_meta():
    given = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in parts(**CASES["everything"]).items()
    }
    weight = decode(given, torch.bfloat16)
    assert weight.is_meta and weight.shape == (OUT, IN) and weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int8])
def test_cast_codes_are_refused(dtype):
    given = parts()
    given["codes"] = given["codes"].to(dtype)
    with pytest.raises(TypeError, match=f"must stay uint8, got {dtype}"):
        linear(tokens(2, IN), given)
    with pytest.raises(TypeError, match="uint8"):
        decode(given)
    with pytest.raises(TypeError, match="uint8"):
        codebook_grad(tokens(2, IN), tokens(2, OUT), given)


WRONG = [
    (dict(codebook=torch.zeros(5, 3)), ValueError, "a codebook has shape"),
    (dict(codebook=torch.zeros(1, 5, 2)), ValueError, "codes of shape .* do not belong to 11"),
    (dict(codebook=torch.zeros(1, 64, 3)), ValueError, "codes of shape .* do not belong to 11"),
    (dict(codebook=torch.zeros(0, 5, 3)), ValueError, "at least one block"),
    (dict(codebook=torch.zeros(1, 0, 3)), ValueError, "1 to 65536 clusters"),
    (dict(codebook=torch.zeros(1, 5, 0)), ValueError, "a group_size of 1 to 64"),
    (dict(codebook=torch.zeros(1, 5, 65)), ValueError, "a group_size of 1 to 64"),
    (dict(codebook=torch.zeros(1, 2**16 + 1, 3)), ValueError, "1 to 65536 clusters"),
    (dict(codebook=torch.zeros(1, 5, 3, dtype=torch.int32)), TypeError, "codebook must be floating point"),
    (dict(out_features=OUT + 9), ValueError, "codes of shape .* do not belong to 20"),
    (dict(codes=torch.zeros(IN, 1, dtype=torch.uint8)), ValueError, "codes of shape"),
    (dict(codes=torch.zeros(IN * 2, dtype=torch.uint8)), ValueError, "codes of shape"),
    (dict(scale_in=torch.ones(IN + 1)), ValueError, rf"scale_in must have shape \({IN},\)"),
    (dict(scale_in=torch.ones(IN, 1)), ValueError, "scale_in must have shape"),
    (dict(scale_in=torch.ones(IN, dtype=torch.int64)), TypeError, "scale_in must be floating point"),
    (dict(scale_out=torch.ones(1)), ValueError, rf"scale_out must have shape \({OUT},\)"),
    (dict(scale_out=torch.ones(OUT, dtype=torch.complex64)), TypeError, "scale_out must be floating point"),
    (dict(residual=torch.ones(IN, OUT)), ValueError, rf"residual must have shape \({OUT}, {IN}\)"),
    (dict(residual=torch.ones(OUT)), ValueError, "residual must have shape"),
    (dict(residual=torch.ones(OUT, IN, dtype=torch.int8)), TypeError, "residual must be floating point"),
    (dict(bias=torch.ones(OUT + 1)), ValueError, rf"bias must have shape \({OUT},\)"),
    (dict(bias=torch.ones(OUT, dtype=torch.int64)), TypeError, "bias must be floating point"),
]


def every_op(given: dict, x: torch.Tensor | None = None):
    """Calls of each op that takes these parts, bias aside."""
    x = tokens(2, IN) if x is None else x
    upstream = torch.ones(2, max(0, given["out_features"]), device=x.device)
    return [
        lambda: linear(x, given),
        lambda: linear(x.clone().requires_grad_(), given),
        lambda: decode(given),
        lambda: codebook_grad(x, upstream, given),
    ]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_tensors_that_do_not_belong_together_are_refused(change, error, message):
    for call in every_op({**parts(), **change})[: 2 if "bias" in change else None]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", ["x", "codes", "codebook", "scale_in", "scale_out", "residual", "bias"])
def test_tensors_of_several_devices_are_refused(name):
    """A kernel would take the address of what is on meta, which is 0."""
    large = dict(shape=(256, 128), scale_in=True, scale_out=True, residual=True, bias=True)
    for moved in (True, False):
        given = {"x": tokens(2, 128), **parts(**large)}
        for key, value in given.items():
            if isinstance(value, torch.Tensor) and (key == name) == moved:
                given[key] = value.to("meta")
        x = given.pop("x")
        calls = {"x": (0, 1, 3), "bias": (0, 1)}.get(name, (0, 1, 2, 3))
        for call in (every_op(given, x)[k] for k in calls):
            with pytest.raises(ValueError, match=r"the codes of this layer are on (meta|cpu), but"):
                call()


def test_a_layer_without_numbers_is_refused_by_name():
    layer = ClusteredLinear(256, 256, ClusterSpec(4, 64), device="meta")
    for graph in (False, True):
        with pytest.raises(ValueError, match="the input is on cpu; what is on meta has no numbers: load"):
            layer(tokens(1, 256).requires_grad_(graph))


def test_inputs_that_do_not_fit_are_refused():
    given = parts()
    for size in ((2, IN + 1), (1,), ()):
        with pytest.raises(ValueError, match=f"takes {IN} input features"):
            linear(torch.zeros(size), given)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        linear(torch.ones(2, IN, dtype=torch.int64), given)
    with pytest.raises(ValueError, match="do not belong to -1"):
        linear(tokens(2, IN), {**given, "codes": torch.zeros(IN, 0, dtype=torch.uint8), "out_features": -1})
    with pytest.raises(TypeError, match="a weight is decoded to a floating-point dtype"):
        decode(given, torch.int32)
    sizes = [((2, IN), (3, OUT)), ((2, 3, IN), (2, 3, OUT)), ((IN,), (OUT,)), ((2, IN + 1), (2, OUT))]
    for x, upstream in (*sizes, ((2, IN), (2, OUT - 1))):
        with pytest.raises(ValueError, match=r"must have shape|input features"):
            codebook_grad(torch.ones(x), torch.ones(upstream), given)
    with pytest.raises(TypeError, match="grad_output must be floating point"):
        codebook_grad(tokens(2, IN), torch.ones(2, OUT, dtype=torch.int64), given)


def test_meta_tensors_pass_through():
    layer = ClusteredLinear(4, 6, ClusterSpec(4, 64), device="meta")
    result = layer(torch.empty(2, 4, device="meta"))
    assert result.shape == (2, 6) and result.device.type == "meta"
