"""What every backend of the ops promises alike: the reference, the CPU kernels, and Triton's in its interpreter."""

from __future__ import annotations

import functools

import pytest
import torch

from cluscomp_peft import ops
from cluscomp_peft.codes import code_bits, num_groups, pack, unpack
from cluscomp_peft.ops.backends import cpu, reference
from tests.ops.harness import BACKENDS, INTERPRETED, needs_triton, run_in_the_interpreter, use_backend

DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
IN, OUT = 40, 33
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def on_backend(request, monkeypatch):
    """Small matrices take the kernels too."""
    if "backend" in request.fixturenames:
        monkeypatch.setattr(cpu, "_SMALL", 1)
        use_backend(monkeypatch, request.getfixturevalue("backend"))


@needs_triton
def test_every_promise_in_the_interpreter():
    run_in_the_interpreter(__file__)


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(
    shape: tuple[int, int] = (OUT, IN),
    group_size: int = 3,
    clusters: int = 12,
    blocks: int = 1,
    scales: bool = False,
    codes: torch.Tensor | None = None,
) -> dict:
    """Arguments of `ops.linear` without x and bias; `codes` as integers, random by default."""
    out_features, in_features = shape
    if codes is None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, clusters, (in_features, num_groups(out_features, group_size)), generator=generator)
    return {
        "codes": pack(codes, code_bits(clusters)),
        "codebook": normal(blocks, clusters, group_size),
        "scale_in": 1 + normal(in_features, seed=2) / 4 if scales else None,
        "scale_out": 1 + normal(out_features, seed=3) / 4 if scales else None,
        "out_features": out_features,
    }


# -- results


@each_backend
@pytest.mark.parametrize("graph", [None, "x", "codebook"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (20,), (2, 3), (2, 20), (2, 2, 3), (0, 2)])
def test_results_belong_to_the_caller_who_may_change_them(backend, lead, dtype, bias, graph):
    given, x = parts(scales=graph == "x"), normal(*lead, IN, dtype=dtype)
    offset = normal(OUT, seed=4) if bias else None
    leaves = {"x": x, "codebook": given["codebook"]}
    if graph is not None:
        leaves[graph].requires_grad_()
    run = functools.partial(ops.linear, x, **given, bias=offset)
    y, expected = run(), run() + 1
    assert not y._is_view() and y.is_contiguous() and y.dtype == dtype and y.shape == (*lead, OUT)
    y.add_(1)
    assert torch.equal(y, expected)
    if graph is not None:
        for result in (torch.relu(expected), torch.relu_(y)):
            result.square().sum().backward()
            if result is not y:
                first, leaves[graph].grad = leaves[graph].grad, None
        assert torch.equal(leaves[graph].grad, first)


# -- codes beyond the codebook


@each_backend
@pytest.mark.parametrize("count", [1, 3, 16, 20])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 9, 12])
def test_codes_beyond_the_codebook_are_its_last_one(backend, bits, count):
    """Bytes at random, in every field and behind the last: read, multiplied, and their gradient collected."""
    generator = torch.Generator().manual_seed(bits)
    clusters = 2**bits - 1 if bits % 2 else 2 ** (bits - 1) + 1
    blocks, group_size, scales = 1 + bits % 2, 1 + bits % 4, bits % 3 == 0
    given = parts((OUT, IN), group_size, clusters, blocks, scales)
    given["codes"] = torch.randint(0, 256, given["codes"].shape, dtype=torch.uint8, generator=generator)
    groups = num_groups(OUT, group_size)
    found = unpack(given["codes"], bits, groups)
    assert ops.has_stray_codes(given["codes"], clusters, groups) and (found >= clusters).any()
    mended = {**given, "codes": pack(found.clamp(max=clusters - 1), bits)}
    assert not ops.has_stray_codes(mended["codes"], clusters, groups)
    x, upstream = normal(count, IN), normal(count, OUT, seed=5)
    assert torch.equal(ops.decode(**given), ops.decode(**mended))
    assert torch.equal(ops.linear(x, **given), ops.linear(x, **mended))
    wide = {key: value.double() if key not in ("codes", "out_features") and value is not None else value
            for key, value in mended.items()}  # fmt: skip
    del given["out_features"], wide["out_features"]
    exact = reference.codebook_grad(x.double(), upstream.double(), **wide, residual=None)
    for grad, right in zip(ops.codebook_grad(x, upstream, **given), exact, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-4)


@each_backend
@pytest.mark.parametrize("clusters", [3, 5, 128, 200, 2**9 - 1])
def test_one_stray_code_is_found(backend, clusters):
    codes = torch.full((IN, OUT), clusters - 1)
    for place in ((0, 0), (IN - 1, OUT - 1), (7, 11)):
        assert not ops.has_stray_codes(pack(codes, code_bits(clusters)), clusters, OUT)
        codes[place] = 2 ** code_bits(clusters) - 1
        assert ops.has_stray_codes(pack(codes, code_bits(clusters)), clusters, OUT) == (clusters != 128)
        codes[place] = clusters - 1
