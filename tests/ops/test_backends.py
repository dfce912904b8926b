"""The contract of `cluscomp_peft.ops.backends`, which holds for every backend: the reference, the CPU kernels, and
Triton's in its interpreter (`tests/test_interpreter.py`). The sections have the contract's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from cluscomp_peft import ops
from cluscomp_peft.codes import code_bits, num_groups, pack, unpack
from cluscomp_peft.ops.backends import cpu, reference
from cluscomp_peft.ops.backends.cpu import compilation
from cluscomp_peft.ops.packed_weight import PackedWeight
from tests.grids import grid
from tests.ops.harness import BACKENDS, INTERPRETED, backend, use_backend

DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
IN, OUT = 40, 33
FLOATING = ("codebook", "scale_in", "scale_out", "residual")
CASES = {
    "plain": {},
    "blocks": dict(blocks=3),
    "more blocks than inputs": dict(blocks=IN + 9),
    "scalar groups": dict(group_size=1, clusters=2),
    "no padding": dict(group_size=11, clusters=3),
    "wide groups": dict(group_size=16, clusters=3, residual=True, scale_in=True),
    "codes over three bytes": dict(group_size=2, clusters=2**14),
    "scale_in": dict(scale_in=True),
    "scale_out": dict(scale_out=True),
    "residual": dict(residual=True),
    "everything": dict(blocks=2, scale_in=True, scale_out=True, residual=True, group_size=4),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=BACKENDS)
def on(request, monkeypatch):
    """The functions of a backend. They serve the ops, too, and their kernels take small matrices; none of them fails
    unnoticed."""
    monkeypatch.setattr(cpu, "_SMALL", 1)
    use_backend(monkeypatch, request.param)
    yield backend(request.param)
    assert not compilation._failed
    assert not getattr(sys.modules.get("cluscomp_peft.ops.backends.cuda.failures"), "_failed", None)


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(
    shape: tuple[int, int] = (OUT, IN),
    group_size: int = 3,
    clusters: int = 12,
    blocks: int = 1,
    scale_in: bool = False,
    scale_out: bool = False,
    residual: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PackedWeight:
    """A weight of `shape` [out, in] with random codes, whose numbers are exact in fp16."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, clusters, (in_features, num_groups(out_features, group_size)), generator=generator)

    def numbers(*size: int, seed: int) -> torch.Tensor:
        return normal(*size, dtype=torch.float16, seed=seed).to(dtype)

    return PackedWeight(
        pack(codes, code_bits(clusters)),
        numbers(blocks, clusters, group_size, seed=1),
        out_features,
        (1 + numbers(in_features, seed=2) / 4).half().to(dtype) if scale_in else None,
        (1 + numbers(out_features, seed=3) / 4).half().to(dtype) if scale_out else None,
        numbers(out_features, in_features, seed=4) if residual else None,
    )


def converted(weight: PackedWeight, change) -> PackedWeight:
    """With every floating tensor changed."""
    given = {name: getattr(weight, name) for name in FLOATING}
    return weight._replace(**{name: change(value) for name, value in given.items() if value is not None})


def near(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> bool:
    return bool((ours.double() - exact.double()).norm() <= tolerance * exact.double().norm() + 1e-30)


def all_equal(ours, theirs) -> bool:
    return all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


# -- 1. arguments


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, none beside the next."""
    return torch.stack([tensor, tensor], -1)[..., 0]


@each_case
def test_arguments_may_have_any_strides(on, case):
    weight, bias = weight_of(**case), normal(OUT, seed=5)
    spread = converted(weight._replace(codes=strided(weight.codes)), strided)
    assert torch.equal(on.decode(spread, torch.float32), on.decode(weight, torch.float32))
    for count in (3, 20):
        x, upstream = normal(count, IN), normal(count, OUT, seed=6)
        y, grads = on.linear(x, weight, bias), on.codebook_grad(x, upstream, weight)
        assert torch.equal(on.linear(x, spread, strided(bias)), y)
        assert all_equal(on.codebook_grad(x, upstream, spread), grads)
        turned = x.t().contiguous().t()  # which a dense product adds up in another order
        torch.testing.assert_close(on.linear(turned, weight, bias), y, rtol=1e-5, atol=1e-5)
        again = on.codebook_grad(turned, strided(upstream), weight)
        torch.testing.assert_close(again, grads, rtol=1e-4, atol=1e-4)


@grid(lead=[(), (1,), (1, 1), (2, 3), (2, 20)], dtype=DTYPES)
def test_x_may_have_any_number_of_dimensions(on, lead, dtype):
    weight, x = weight_of(scale_in=True), normal(*lead, IN, dtype=dtype)
    y = on.linear(x, weight, None)
    assert y.shape == (*lead, OUT)
    assert torch.equal(y.reshape(-1, OUT), on.linear(x.reshape(-1, IN), weight, None))


@each_case
def test_no_tokens_are_enough(on, case):
    weight = weight_of(**case)
    for size in ((0, IN), (2, 0, IN)):
        assert on.linear(torch.zeros(size), weight, normal(OUT)).shape == (*size[:-1], OUT)
    grads = on.codebook_grad(torch.zeros(0, IN), torch.zeros(0, OUT), weight)
    shapes = [weight.codebook.shape, *((0,) if scale is None else scale.shape for scale in weight[3:5])]
    assert [grad.shape for grad in grads] == shapes and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("shape", [(0, IN), (OUT, 0), (1, 1), (1, IN), (OUT, 1)])
def test_a_weight_may_be_as_small_as_any(on, shape):
    weight, (out_features, in_features) = weight_of(shape, scale_in=True, scale_out=True), shape
    assert torch.equal(on.decode(weight, torch.float32), reference.decode(weight, torch.float32))
    x, upstream = normal(2, in_features), normal(2, out_features, seed=6)
    torch.testing.assert_close(on.linear(x, weight, None), reference.linear(x, weight, None))
    torch.testing.assert_close(on.codebook_grad(x, upstream, weight), reference.codebook_grad(x, upstream, weight))


def test_arguments_are_not_written_to(on):
    weight, bias = weight_of(**CASES["everything"]), normal(OUT)
    x, upstream = normal(3, IN), normal(3, OUT)
    given = [x, upstream, bias, *weight.tensors]
    before = [tensor.clone() for tensor in given]
    on.decode(weight, torch.float32), on.linear(x, weight, bias), on.codebook_grad(x, upstream, weight)
    on.linear(x, weight._replace(residual=None), bias)
    assert all_equal(given, before)


# -- 2. stray codes


@grid(bits=[2, 3, 4, 5, 8, 9, 12], count=[1, 3, 16, 20])
def test_codes_beyond_the_codebook_are_its_last_one(on, bits, count):
    """Bytes at random, in every field and behind the last: read, multiplied, and their gradient collected."""
    generator = torch.Generator().manual_seed(bits)
    clusters = 2**bits - 1 if bits % 2 else 2 ** (bits - 1) + 1
    scales = bits % 3 == 0
    weight = weight_of((OUT, IN), 1 + bits % 4, clusters, 1 + bits % 2, scales, scales)
    weight = weight._replace(codes=torch.randint(0, 256, weight.codes.shape, dtype=torch.uint8, generator=generator))
    found = unpack(weight.codes, bits, weight.num_groups)
    assert ops.has_stray_codes(weight.codes, clusters, weight.num_groups) and (found >= clusters).any()
    mended = weight._replace(codes=pack(found.clamp(max=clusters - 1), bits))
    assert not ops.has_stray_codes(mended.codes, clusters, weight.num_groups)
    x, upstream = normal(count, IN), normal(count, OUT, seed=5)
    assert torch.equal(on.decode(weight, torch.float32), on.decode(mended, torch.float32))
    assert torch.equal(on.linear(x, weight, None), on.linear(x, mended, None))
    exact = reference.codebook_grad(x.double(), upstream.double(), converted(mended, torch.Tensor.double))
    for grad, right in zip(on.codebook_grad(x, upstream, weight), exact, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clusters", [3, 5, 128, 200, 2**9 - 1])
def test_one_stray_code_is_found(on, clusters):
    codes = torch.full((IN, OUT), clusters - 1)
    for place in ((0, 0), (IN - 1, OUT - 1), (7, 11)):
        assert not ops.has_stray_codes(pack(codes, code_bits(clusters)), clusters, OUT)
        codes[place] = 2 ** code_bits(clusters) - 1
        assert ops.has_stray_codes(pack(codes, code_bits(clusters)), clusters, OUT) == (clusters != 128)
        codes[place] = clusters - 1


# -- 3. exactness


def by_loop(weight: PackedWeight) -> torch.Tensor:
    """The weight in fp64, by the words of its definition."""
    codes = unpack(weight.codes, weight.code_bits, weight.num_groups)
    wide = converted(weight, torch.Tensor.double)
    dense = torch.zeros(weight.out_features, weight.in_features, dtype=torch.float64)
    for i in range(weight.in_features):
        block = i * weight.num_blocks // weight.in_features
        for o in range(weight.out_features):
            dense[o, i] = wide.codebook[block, codes[i, o // weight.group_size], o % weight.group_size]
    if wide.residual is not None:
        dense += wide.residual
    if wide.scale_in is not None:
        dense *= wide.scale_in
    if wide.scale_out is not None:
        dense *= wide.scale_out[:, None]
    return dense


@grid(case=CASES, dtype=DTYPES)
def test_decode_is_the_reference_bit_for_bit(on, case, dtype):
    for stored in (dtype, torch.float16):
        weight = weight_of(**case, dtype=stored)
        decoded = on.decode(weight, dtype)
        assert decoded.dtype == dtype and decoded.shape == (OUT, IN)
        assert torch.equal(decoded, reference.decode(weight, dtype))
        assert torch.equal(decoded, on.decode(weight, torch.float32).to(dtype))  # rounded once
        torch.testing.assert_close(decoded.double(), by_loop(weight), rtol=torch.finfo(dtype).eps, atol=1e-7)


@each_case
def test_fp64_is_computed_in_fp64(on, case):
    weight = weight_of(**case, dtype=torch.float64)
    exact, bias = by_loop(weight), normal(OUT, dtype=torch.float64)
    torch.testing.assert_close(on.decode(weight, torch.float64), exact, rtol=1e-14, atol=0)
    x, upstream = normal(3, IN, dtype=torch.float64), normal(3, OUT, dtype=torch.float64, seed=6)
    torch.testing.assert_close(on.linear(x, weight, bias), F.linear(x, exact, bias), rtol=1e-12, atol=1e-12)
    grads = on.codebook_grad(x, upstream, weight)
    assert {grad.dtype for grad in grads} == {torch.float64}
    assert all_equal(grads, reference.codebook_grad(x, upstream, weight))


@grid(case=CASES, dtype=DTYPES)
def test_many_tokens_are_the_dense_layer_bit_for_bit(on, case, dtype):
    weight, bias = weight_of(**case, dtype=torch.float16), normal(OUT, seed=5)
    for x in (normal(70, IN, dtype=dtype), normal(2, 40, IN, dtype=dtype)):
        expected = F.linear(x, reference.decode(weight, dtype), bias.to(dtype))
        assert torch.equal(on.linear(x, weight, bias), expected)


@grid(case=CASES, count=[1, 2, 5, 16], dtype=DTYPES)
def test_few_tokens_are_as_exact_as_their_roundings(on, case, count, dtype):
    weight, bias, x = weight_of(**case, dtype=torch.float16), normal(OUT, seed=5), normal(count, IN, dtype=dtype)
    y, exact = on.linear(x, weight, bias), by_loop(weight)
    assert y.dtype == dtype
    if on.linear is reference.linear:
        assert torch.equal(y, F.linear(x, reference.decode(weight, dtype), bias.to(dtype)))
    right = F.linear(x.double(), exact, bias.to(dtype).double())
    magnitude = F.linear(x.double().abs(), exact.abs(), bias.to(dtype).double().abs())
    eps = torch.finfo(dtype).eps / 2
    assert ((y.double() - right).abs() <= 1.01 * eps * right.abs() + (2.02 * eps + 1e-6) * magnitude).all()


@grid(case=CASES, dtype=DTYPES)
def test_gradients_are_sums_in_fp32(on, case, dtype):
    """A sum in 16 bits would be off by more."""
    weight = weight_of((96, 64), **{**case, "group_size": 3, "clusters": 4}, dtype=torch.float16)
    x, upstream = normal(50, 64, dtype=dtype), normal(50, 96, dtype=dtype, seed=6)
    grads = on.codebook_grad(x, upstream, weight)
    exact = reference.codebook_grad(x.double(), upstream.double(), converted(weight, torch.Tensor.double))
    # On a CPU with matrix units for bf16 each element of dL/dW is rounded once, as in training the dense layer.
    rounded = dtype == torch.bfloat16 and on.codebook_grad is cpu.codebook_grad and cpu._multiplies_bf16()
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == torch.float32 and near(ours, theirs, 4e-3 if rounded else 2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all_equal(on.codebook_grad(x, upstream, weight), grads)


# -- 4. merging


@grid(case=CASES, count=[1, 4, 9, 20], dtype=DTYPES)
def test_the_dtype_of_the_codebook_does_not_show(on, case, count, dtype):
    """The unmerged layer has its sums in fp32, the merged one in fp16."""
    weight, x = weight_of(**case, dtype=torch.float16), normal(count, IN, dtype=dtype)
    expected = on.linear(x, weight, None)
    assert torch.equal(on.linear(x, converted(weight, torch.Tensor.float), None), expected)


# -- 5. determinism


def test_the_same_call_gives_the_same_bits_with_any_number_of_threads(on):
    out_features, in_features = (65, 70) if INTERPRETED else (300, 260)
    weight = weight_of((out_features, in_features), blocks=2, scale_in=True, scale_out=True)
    x, upstream = normal(9, in_features), normal(9, out_features, seed=6)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3) if on.decode is cpu.decode else (1,):
            torch.set_num_threads(threads)
            found.append(
                [on.decode(weight, torch.float16), on.linear(x[:1], weight, None), on.linear(x, weight, None)]
            )
            grads = on.codebook_grad(x, upstream, weight)
            assert all_equal(grads, on.codebook_grad(x, upstream, weight))
            exact = reference.codebook_grad(x.double(), upstream.double(), weight)
            assert all(near(ours, theirs, 1e-5) for ours, theirs in zip(grads, exact, strict=True))
            assert all_equal(found[-1][:1], [on.decode(weight, torch.float16)])
            assert all_equal(found[-1][1:], [on.linear(x[:1], weight, None), on.linear(x, weight, None)])
    finally:
        torch.set_num_threads(before)
    kept = 3 if on.linear is cpu.linear else 1
    assert all(all_equal(other[:kept], found[0][:kept]) for other in found)


# -- 6. ownership


@grid(
    lead=[(), (1,), (20,), (2, 3), (2, 20), (2, 2, 3), (0, 2)],
    dtype=DTYPES,
    bias=[False, True],
    graph=[None, "x", "codebook"],
    pairs=True,
)
def test_results_belong_to_the_caller_who_may_change_them(on, lead, dtype, bias, graph):
    weight, x = weight_of(scale_in=graph == "x", scale_out=graph == "x"), normal(*lead, IN, dtype=dtype)
    offset = normal(OUT, seed=4) if bias else None
    leaves = {"x": x, "codebook": weight.codebook}
    if graph is not None:
        leaves[graph].requires_grad_()
    y, expected = ops.linear(x, weight, offset), ops.linear(x, weight, offset) + 1
    assert not y._is_view() and y.is_contiguous() and y.dtype == dtype and y.shape == (*lead, OUT)
    y.add_(1)
    assert torch.equal(y, expected)
    if graph is not None:
        for result in (torch.relu(expected), torch.relu_(y)):
            result.square().sum().backward()
            if result is not y:
                first, leaves[graph].grad = leaves[graph].grad, None
        assert torch.equal(leaves[graph].grad, first)


@each_case
def test_weights_and_gradients_are_contiguous(on, case):
    weight = weight_of(**case)
    grads = on.codebook_grad(normal(3, IN), normal(3, OUT), weight)
    for result in (on.decode(weight, torch.float32), *grads):
        assert result.is_contiguous() and not result.requires_grad


# -- 7. failures

# Each case runs in a process forked from one that has imported torch, and compiled nothing.
PROGRAM = """
import json, os, sys, traceback, warnings
import torch
from cluscomp_peft.codes import pack
from cluscomp_peft.ops import PackedWeight
from cluscomp_peft.ops.backends import cpu, reference

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
weight = PackedWeight(pack(torch.randint(0, 8, (200, 150), generator=generator), 3), torch.randn(1, 8, 2), 300)
x, upstream = torch.randn(3, 200), torch.randn(3, 300)

def check(backend, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(backend.decode(weight, torch.float32), reference.decode(weight, torch.float32))
            assert torch.equal(backend.linear(x, weight, None), reference.linear(x, weight, None))
            ours, theirs = (part.codebook_grad(x, upstream, weight) for part in (backend, reference))
            assert all(torch.equal(one, two) for one, two in zip(ours, theirs))
    found = [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
    assert len(found) == len(warned) and all(word in text for word, text in zip(warned, found)), found

for name, program in json.load(sys.stdin).items():
    if os.fork() == 0:
        try:
            exec(program, dict(globals()))
            status = "passed"
        except BaseException:
            status = traceback.format_exc()
        print(json.dumps([name, status]), flush=True)
        os._exit(0)
    os.wait()
"""
FAILURES = {
    "numba is absent": """
sys.modules["numba"] = None
check(cpu, [])
""",
    "numba is broken": """
sys.modules["llvmlite"] = None
check(cpu, ["Reinstall numba"])
""",
    "a kernel does not compile": """
from cluscomp_peft import jit
def callback(*arguments, **options):
    raise RuntimeError("unknown machine")
jit.callback = callback
check(cpu, ["unknown machine"])
""",
    "Triton is absent": """
sys.modules["triton"] = None
from cluscomp_peft.ops.backends import cuda
check(cuda, [])
""",
    "Triton is broken": """
import importlib.abc
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "triton":
            raise OSError("libtriton.so is cut off")
sys.meta_path.insert(0, Broken())
sys.modules.pop("triton", None)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from cluscomp_peft.ops.backends import cuda
assert "libtriton.so is cut off" in str(caught[-1].message)
check(cuda, [])
""",
    "kernels cannot be launched": """
from cluscomp_peft.ops.backends import cuda
class Kernel:
    def __getitem__(self, grid):
        def launch(*arguments, **options):
            raise RuntimeError("out of resource: shared memory")
        return launch
cuda.available = lambda device: True
cuda._device = lambda device: cuda.Device((9, 0), 4)
cuda.table.linear = cuda.table.codebook_grad = lambda *arguments: None
for name in ("decode", "fused_linear", "finish", "segment_grad"):
    setattr(cuda.triton_kernels, name, Kernel())
torch.cuda.device_of = lambda tensor: warnings.catch_warnings()
check(cuda, ["'decode' fails here", "'fused_linear' fails here", "'segment_grad' fails here"])
""",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What became of each case of FAILURES: "passed" or an error."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(FAILURES), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.skipif(INTERPRETED or not hasattr(os, "fork"), reason="needs no interpreter, and a system that forks")
@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_is_left_to_the_reference_with_one_warning(outcomes, name):
    assert outcomes[name] == "passed", outcomes[name]


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_running_out_of_memory_is_no_reason_to_give_kernels_up():
    from cluscomp_peft.ops.backends.cuda import failures

    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(torch.OutOfMemoryError):
            failures.attempt("decode", 0, exhausted)
        assert failures.attempt("decode", 0, lambda: 5) == 5
