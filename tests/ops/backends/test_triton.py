"""The ops' CUDA kernels: in Triton's interpreter, compiled without a GPU, and on one.

The interpreter must be asked for before Triton is imported, so those tests run in a process of their own, which
`tests/test_interpreter.py` starts. It rounds to bf16 by truncation and cannot multiply bf16
tiles, so fp16 stands for both there.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cluscomp_peft import ops
from cluscomp_peft.codes import code_bits, num_groups, pack
from cluscomp_peft.ops.backends import reference
from cluscomp_peft.ops.backends.cuda import triton_tuning
from tests.grids import grid, quick
from tests.ops.harness import INTERPRETED, needs_triton

ROOT = Path(__file__).resolve().parents[3]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
direct = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
CASES = {
    "plain": {},
    "blocks": dict(blocks=3),
    "scale_in": dict(scale_in=True),
    "scale_out": dict(scale_out=True),
    "residual": dict(residual=True),
    "everything": dict(blocks=2, scale_in=True, scale_out=True, residual=True),
}


@pytest.fixture
def cuda():
    return importlib.import_module("cluscomp_peft.ops.backends.cuda")


@pytest.fixture
def kernels():
    return importlib.import_module("cluscomp_peft.ops.backends.cuda.triton_kernels")


def parts(
    group_size: int,
    clusters: int,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    blocks: int = 1,
    scale_in: bool = False,
    scale_out: bool = False,
    residual: bool = False,
) -> ops.PackedWeight:
    """A weight of `shape` [out, in]."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(group_size * clusters)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    codes = torch.randint(0, clusters, (in_features, num_groups(out_features, group_size)), generator=generator)
    return ops.PackedWeight(
        pack(codes, code_bits(clusters)).to(device),
        normal(blocks, clusters, group_size),
        out_features,
        1 + normal(in_features) / 4 if scale_in else None,
        1 + normal(out_features) / 4 if scale_out else None,
        # As of a Conv1D layer: a view whose rows are not contiguous.
        normal(in_features, out_features).t() if residual else None,
    )


def normal(
    *size: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 1
) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


FLOATING = ("codebook", "scale_in", "scale_out", "residual")


def wide(given: ops.PackedWeight, dtype: torch.dtype = torch.float64, device: str = "cpu") -> ops.PackedWeight:
    """The same numbers in another dtype."""
    floats = {name: getattr(given, name) for name in FLOATING}
    floats = {name: value.to(device, dtype) for name, value in floats.items() if value is not None}
    return given._replace(codes=given.codes.to(device), **floats)


def check_decode(cuda, given: ops.PackedWeight, dtype: torch.dtype) -> None:
    weight = cuda.decode(given, dtype)
    assert weight.dtype == dtype and weight.is_contiguous()
    assert torch.equal(weight, reference.decode(given, dtype))


def check_linear(cuda, given: ops.PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Scales that are folded into x and the sums (`table.py`) leave weights unrounded and round x: either is right."""
    y = cuda.linear(x, given, bias)
    folded = not INTERPRETED and x.dtype == torch.bfloat16 and len(x) <= 64 and given.residual is None
    if folded and (given.scale_in is not None or given.scale_out is not None):
        weight = reference.decode(given, torch.float32).double()
        exact = F.linear(x.double(), weight, None if bias is None else bias.to(x.dtype).double())
        magnitude = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.to(x.dtype).double().abs())
        eps = torch.finfo(x.dtype).eps
        assert ((y.double() - exact).abs() <= 1.01 * eps / 2 * exact.abs() + 1.01 * eps * magnitude).all()
        return y
    weight = reference.decode(given, x.dtype)
    offset = None if bias is None else bias.to(x.dtype).double()
    exact = F.linear(x.double(), weight.double(), offset)
    magnitude = F.linear(x.double().abs(), weight.double().abs(), None if offset is None else offset.abs())
    assert y.dtype == x.dtype and y.shape == exact.shape
    # One rounding of the result, and fp32's of the sum.
    rounding = 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
    assert ((y.double() - exact).abs() <= 1.01 * rounding * exact.abs() + 1e-6 * magnitude + 1e-7).all()
    return y


def check_grad(cuda, given: ops.PackedWeight, x: torch.Tensor, upstream: torch.Tensor, tolerance: float) -> tuple:
    grads = cuda.codebook_grad(x, upstream, given)
    exact = reference.codebook_grad(x.cpu().double(), upstream.cpu().double(), wide(given))
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        assert (ours.cpu() - theirs).norm() <= tolerance * theirs.norm()
    return grads


@interpreted
@grid(group_size=quick([*range(1, 17), 33, 64], 1, 3, 16, 33))
def test_decode_takes_every_group_size_and_code_width(cuda, monkeypatch, group_size):
    monkeypatch.setattr(triton_tuning, "decode_tile", lambda padded: triton_tuning.DecodeTile(4, 8, 4))
    for bits in range(1, 17):
        case = list(CASES.values())[(group_size + bits) % len(CASES)]
        shape = (11 * group_size - group_size // 2, 3)  # 11 codes: each bit of a byte is the first of one
        given = parts(group_size, 2**bits - (bits > 1), shape, torch.float16, **case)
        check_decode(cuda, given, torch.float16 if bits % 2 else torch.float32)


@interpreted
@grid(case=CASES, size=[(1, (130, 65)), (3, (200, 130)), (16, (135, 1)), (4, (1, 70))])
def test_decode_tiles_meet(cuda, case, size):
    group_size, shape = size
    check_decode(cuda, parts(group_size, 13, shape, **case), torch.float32)


@interpreted
def test_decode_rounds_to_bf16_before_the_gather_where_it_may(cuda):
    check_decode(cuda, parts(3, 13, (40, 20)), torch.bfloat16)


@interpreted
@grid(tokens=[1, 2, 5, 16], layout=[(1, 3, "scale_in"), (3, 300, "plain"), (4, 2**14, "blocks")])
def test_few_tokens_are_multiplied_tile_by_tile(cuda, monkeypatch, tokens, layout):
    group_size, clusters, case = layout
    monkeypatch.setattr(cuda, "decode", None)
    shape = (90, 70)
    for dtype in (torch.float32, torch.float16):
        given = parts(group_size, clusters, shape, torch.float16, **CASES[case])
        check_linear(cuda, given, normal(tokens, 70, dtype=dtype), normal(90, seed=2))


@interpreted
@pytest.mark.parametrize("tokens", [1, 3])
def test_splits_of_the_input_channels_add_up(cuda, tokens):
    in_features, out_features = 1100, 20
    given = parts(3, 13, (out_features, in_features), blocks=2, scale_in=True, scale_out=True)
    groups = num_groups(out_features, 3)
    device = cuda._device(torch.device("cpu"))
    tile = triton_tuning.fused_tile(4, groups, in_features, tokens, device)
    assert tile.share < in_features
    for bias in (None, normal(out_features)):
        check_linear(cuda, given, normal(tokens, in_features), bias)


def check_widths(cuda, given: ops.PackedWeight, tokens: int, dtype: torch.dtype) -> None:
    # What merging leaves, against a layer whose adapter is active, in fp32.
    before = wide(given, torch.float32, given.device)
    x = normal(tokens, given.in_features, dtype=dtype, device=given.device)
    y = cuda.linear(x, given, None)
    assert torch.equal(y, cuda.linear(x, before, None))


@interpreted
def test_more_tokens_a_residual_or_none_are_left_to_the_dense_product(cuda):
    given = parts(3, 13, (40, 30), torch.float16, scale_out=True)
    dense = parts(3, 13, (40, 30), torch.float16, residual=True)
    for kept, size in ((given, (17, 30)), (given, (3, 6, 30)), (given, (0, 30)), (dense, (2, 30)), (dense, (30,))):
        x = normal(*size, dtype=torch.float16)
        y = cuda.linear(x, kept, normal(40))
        assert torch.equal(y, reference.linear(x, kept, normal(40)))


@interpreted
@grid(case=CASES, layout=[(1, 2, (9, 70)), (3, 13, (140, 66)), (7, 600, (150, 5))])
def test_codebook_grad_sums_segments(cuda, case, layout):
    group_size, clusters, shape = layout
    given = parts(group_size, clusters, shape, **case)
    check_grad(cuda, given, normal(37, shape[1]), normal(37, shape[0], seed=2), 1e-6)


@interpreted
@grid(group_size=quick(range(1, 17), 1, 5, 16))
def test_codebook_grad_takes_every_group_size(cuda, group_size):
    given = parts(group_size, 2**group_size - (group_size > 1), (50, 9), torch.float16, scale_in=True)
    half = torch.float16
    check_grad(cuda, given, normal(20, 9, dtype=half), normal(20, 50, dtype=half, seed=2), 1e-6)


@interpreted
def test_codebook_grad_splits_many_tokens_and_takes_mixed_dtypes(cuda):
    given = parts(3, 13, (20, 6), scale_in=True, scale_out=True)
    x, upstream = normal(700, 6, dtype=torch.float16), normal(700, 20, seed=2)
    assert triton_tuning.grad_tile(700, 6, 20, 4, cuda._device(x.device)).share < 700
    check_grad(cuda, given, x, upstream, 1e-6)


@interpreted
def test_codebook_grad_does_not_depend_on_the_order(cuda, monkeypatch):
    given = parts(3, 5, (200, 130), scale_in=True, scale_out=True)
    x, upstream = normal(20, 130), normal(20, 200, seed=2)
    grads = []
    for copies in (1, 3, 64):
        monkeypatch.setattr(triton_tuning, "copies", lambda entries, copies=copies: copies)
        grads.append(cuda.codebook_grad(x, upstream, given))
    for other in grads[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads[0], other, strict=True))


@interpreted
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_codebook_grad_keeps_its_digits_at_every_magnitude(cuda, size):
    given = parts(3, 13, (40, 30), scale_in=True)
    x, upstream = normal(20, 30), normal(20, 40, seed=2) * size
    x[:, 3] *= 1000  # an outlier channel, as language models have them
    grads = check_grad(cuda, given, x, upstream, 1e-6)
    assert all(grad.isfinite().all() for grad in grads)


@interpreted
def test_no_gradient_is_zero_and_overflow_is_seen(cuda):
    given = parts(3, 13, (40, 30), scale_in=True)
    for upstream in (torch.zeros(20, 40), torch.zeros(0, 40)):
        grads = cuda.codebook_grad(normal(len(upstream), 30), upstream, given)
        assert [grad.shape for grad in grads] == [(1, 13, 3), (30,), (0,)]
        assert not any(grad.any() for grad in grads)
    for value in (float("inf"), float("nan")):
        upstream = normal(20, 40)
        upstream[3, 5] = value
        grad = cuda.codebook_grad(normal(20, 30), upstream, given)[0]
        assert not grad.isfinite().any()


@direct
def test_what_the_kernels_do_not_serve_goes_to_the_reference(cuda):
    assert not cuda.available(torch.device("cpu"))
    given = parts(3, 13, (40, 30), torch.float64, **CASES["everything"])
    x, upstream = normal(4, 30, dtype=torch.float64), normal(4, 40, dtype=torch.float64)
    weight = cuda.decode(given, torch.float64)
    assert torch.equal(weight, reference.decode(given, torch.float64))
    assert torch.equal(cuda.linear(x, given, None), F.linear(x, weight))
    for dtype in (torch.float64, torch.float32):
        grads = cuda.codebook_grad(x.to(dtype), upstream.to(dtype), given)
        exact = reference.codebook_grad(x.to(dtype), upstream.to(dtype), given)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, exact, strict=True))


@direct
@needs_triton
def test_a_triton_that_does_not_run_is_reported_and_not_used(cuda):
    with pytest.warns(UserWarning, match=r"cannot run on cpu .* C compiler"):
        assert not cuda._works.__wrapped__(torch.device("cpu"))


@direct
def test_sums_in_fp32_stay_so_under_autocast(cuda):
    given = parts(3, 13, (40, 30))
    x, upstream = normal(4, 30), normal(4, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = cuda.codebook_grad(x, upstream, given)
    assert torch.equal(grads[0], reference.codebook_grad(x, upstream, given)[0])


@direct
@pytest.mark.parametrize("groups, in_features", [(1, 1), (1024, 4096), (3584, 4096), (7, 28672), (128_256, 8192)])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("padded", [1, 4, 64])
def test_tiles_cover_the_matrix(groups, in_features, tokens, padded):
    device = triton_tuning.Device((9, 0), 132)
    tile = triton_tuning.fused_tile(padded, groups, in_features, tokens, device)
    splits = -(-in_features // tile.share)
    assert tile.share % tile.channels == 0 and (splits - 1) * tile.share < in_features
    assert tile.groups * padded >= 16 and tile.channels >= 16 and splits <= 65535
    grad = triton_tuning.grad_tile(4096, in_features, groups, 2, device)
    assert grad.share % grad.tokens == 0 and -(-4096 // grad.share) <= 65535
    assert 1 <= triton_tuning.copies(groups * padded) <= 64


# Compiled for a device that need not be there.

_POINTERS = {"codes": "*u8", "quantum": "*fp32", "sums": "*i64", "sums_in": "*fp32", "sums_out": "*fp32"}


def build(kernel, pointers: dict[str, str | None], constants: dict, capability: int, **options):
    """Compiles a kernel; every pointer and size is a multiple of 16, as they mostly are."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {name: None for name, kind in pointers.items() if kind is None}
    signature = {}
    for name in kernel.arg_names:
        signature[name] = "constexpr" if name in constants else (_POINTERS | pointers).get(name, "i32")
    attributes = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if name not in constants
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, **options})


_DTYPES = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16}
_SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # bytes of a block


def weights_of(group_size: int, bits: int, blocks: int) -> dict:
    padded = 1 << (group_size - 1).bit_length()
    span = max((k * bits % 8 + bits + 7) // 8 for k in range(8))
    return dict(G=group_size, P=padded, BITS=bits, SPAN=span, BLOCKS=blocks)


@direct
@needs_triton
@pytest.mark.parametrize(
    "capability, kind, table, scales, group_size, bits, blocks",
    [
        (90, "*bf16", "*bf16", None, 4, 12, 1),
        (80, "*fp16", "*fp32", "*fp16", 3, 16, 16),
        (80, "*fp32", "*fp32", "*fp32", 16, 11, 2),
    ],
)
def test_decode_compiles(kernels, tmp_path, monkeypatch, capability, kind, table, scales, group_size, bits, blocks):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = weights_of(group_size, bits, blocks)
    tile = triton_tuning.decode_tile(constants["P"])
    pointers = dict(table=table, scale_in=scales, scale_out=scales, residual=scales, weight=kind)
    constants |= dict(CHANNELS=tile.channels, GROUPS=tile.groups)
    built = build(kernels.decode, pointers, constants, capability, num_warps=tile.warps)
    assert built.metadata.shared <= _SHARED[86]
    # Centroids are gathered and weights written by wide instructions.
    assert "st.global.v4.b32" in built.asm["ptx"]
    assert "ld.global.v2.b32" in built.asm["ptx"] or "ld.global.v4.b32" in built.asm["ptx"]


@direct
@needs_triton
@pytest.mark.parametrize(
    "capability, kind, table, scales, group_size, bits, tokens",
    [
        (90, "*bf16", "*bf16", None, 4, 12, 1),
        (80, "*fp16", "*fp32", "*fp16", 3, 14, 1),
        (90, "*bf16", "*bf16", None, 4, 12, 16),
        (80, "*bf16", "*fp32", "*bf16", 16, 16, 16),
        (80, "*fp32", "*fp32", None, 1, 3, 16),
    ],
)
def test_fused_linear_compiles(
    kernels, tmp_path, monkeypatch, capability, kind, table, scales, group_size, bits, tokens
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = weights_of(group_size, bits, 2)
    device = triton_tuning.Device((capability // 10, 0), 132)
    tile = triton_tuning.fused_tile(constants["P"], 1024, 4096, tokens, device)
    pointers = dict(x=kind, table=table, scale_in=scales, scale_out=scales, bias=None, y="*fp32")
    constants |= dict(CHANNELS=tile.channels, GROUPS=tile.groups, TOKENS=tile.tokens)
    built = build(kernels.fused_linear, pointers, constants, capability, num_warps=tile.warps, num_stages=tile.stages)
    assert built.metadata.shared <= _SHARED[86]
    assert ("mma.sync" in built.asm["ptx"]) == (tokens > 1 and kind != "*fp32")


@direct
@needs_triton
def test_finish_compiles(kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = dict(partial="*fp32", bias="*bf16", y="*bf16")
    assert "st.global" in build(kernels.finish, pointers, dict(BLOCK=512), 80).asm["ptx"]


@direct
@needs_triton
@grid(
    launch=quick(
        {
            "90": (90, "*bf16", None, 4, 12, 1),
            "80": (80, "*bf16", "*fp32", 3, 16, 16),
            "86": (86, "*fp32", "*fp32", 5, 8, 1),
        },
        "90",
    )
)
def test_segment_grad_compiles(kernels, tmp_path, monkeypatch, cuda, launch):
    capability, kind, scales, group_size, bits, blocks = launch
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = triton_tuning.Device(divmod(capability, 10), 132)
    tile = triton_tuning.grad_tile(2048, 4096, 4096, _DTYPES[kind].itemsize, device)
    pointers = dict(x=kind, grad_output=kind, table="*fp32", scale_in=scales, scale_out=scales, residual=scales)
    constants = weights_of(group_size, bits, blocks)
    del constants["P"]
    constants |= dict(CHANNELS=tile.channels, OUTPUTS=tile.outputs, TOKENS=tile.tokens, PRECISION=cuda._PRECISION)
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    built = build(kernels.segment_grad, pointers, constants, capability, **options)
    assert built.metadata.shared <= _SHARED[capability]
    assert "mma" in built.asm["ptx"] and ".add.u64" in built.asm["ptx"]


# On a device.


@pytest.mark.gpu
@needs_triton
class TestOnTheDevice:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize(
        "group_size, bits", [(1, 4), (2, 7), (3, 8), (4, 12), (5, 16), (8, 15), (16, 11), (64, 6)]
    )
    def test_decode(self, cuda, case, group_size, bits):
        for dtype in _DTYPES.values():
            given = parts(group_size, 2**bits, (1000, 777), torch.float16, "cuda", **case)
            check_decode(cuda, given, dtype)

    @pytest.mark.parametrize("case", ["plain", "blocks", "scale_in", "scale_out"])
    @pytest.mark.parametrize("group_size, bits", [(1, 4), (3, 8), (4, 12), (8, 15), (16, 11)])
    @pytest.mark.parametrize("tokens", [1, 2, 16])
    def test_few_tokens(self, cuda, case, group_size, bits, tokens):
        for dtype in _DTYPES.values():
            given = parts(group_size, 2**bits, (1000, 2048), torch.float16, "cuda", **CASES[case])
            x, bias = normal(tokens, 2048, dtype=dtype, device="cuda"), normal(1000, device="cuda")
            y = check_linear(cuda, given, x, bias)
            assert torch.equal(y, cuda.linear(x, given, bias))

    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("group_size", [1, 3, 4, 8, 16])
    @pytest.mark.parametrize("tokens", [1, 4])
    def test_the_dtype_of_the_codebook_does_not_show(self, cuda, tokens, group_size, scaled):
        given = parts(group_size, 500, (40, 4096), torch.float16, "cuda", scale_in=scaled, blocks=2)
        for dtype in _DTYPES.values():
            check_widths(cuda, given, tokens, dtype)

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("group_size, bits", [(1, 1), (3, 8), (4, 12), (7, 16), (16, 11)])
    def test_codebook_grad(self, cuda, case, group_size, bits):
        for dtype in _DTYPES.values():
            given = parts(group_size, 2**bits, (1000, 520), torch.float16, "cuda", **case)
            x = normal(700, 520, dtype=dtype, device="cuda")
            upstream = normal(700, 1000, dtype=dtype, device="cuda", seed=2)
            grads = check_grad(cuda, given, x, upstream, 3e-5)
            again = cuda.codebook_grad(x, upstream, given)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, again, strict=True))

    @pytest.mark.parametrize("tokens", [3, 40])
    def test_the_ops_choose_the_kernels_and_train(self, cuda, monkeypatch, tokens):
        seen = []
        serves = cuda._serves
        monkeypatch.setattr(cuda, "_serves", lambda *given: seen.append(serves(*given)) or seen[-1])
        given = parts(3, 50, (90, 64), torch.float32, "cuda", scale_in=True, scale_out=True)
        leaves = (given.codebook, given.scale_in, given.scale_out)
        for leaf in leaves:
            leaf.requires_grad_()
        x = normal(tokens, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
        y = ops.linear(x, given)
        y.backward(normal(tokens, 90, dtype=torch.bfloat16, device="cuda"))
        assert len(seen) >= 3 and all(seen)
        expected = reference.linear(x, given, None)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        assert all(leaf.grad.isfinite().all() for leaf in leaves)

    def test_codes_of_another_device(self, cuda):
        if torch.cuda.device_count() < 2:
            pytest.skip("one device")
        given = parts(3, 50, (90, 64), torch.float32, "cuda:1", scale_in=True)
        check_decode(cuda, given, torch.bfloat16)
        check_linear(cuda, given, normal(3, 64, device="cuda:1"), None)
        check_grad(cuda, given, normal(30, 64, device="cuda:1"), normal(30, 90, device="cuda:1"), 3e-5)
