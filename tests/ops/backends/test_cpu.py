"""The compiled CPU kernels against the reference: odd shapes, every width of codes, and the ways back to it."""

import subprocess
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cluscomp_peft import ops
from cluscomp_peft.codes import code_bits, num_groups, pack, unpack
from cluscomp_peft.ops.backends import cpu, reference
from cluscomp_peft.ops.backends.cpu import arguments, threads
from tests import warm

pytest.importorskip("numba")

FLOATING = ("codebook", "scale_in", "scale_out", "residual")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Small matrices take the kernels too."""
    monkeypatch.setattr(cpu, "_SMALL", 1)


def parts(
    shape=(70, 150),
    group_size=4,
    clusters=200,
    blocks=1,
    scale_in=False,
    scale_out=False,
    residual=None,
    dtype=torch.float32,
    seed=0,
    damaged=False,
) -> ops.PackedWeight:
    """A weight; `residual` is its dtype. Damaged codes are bytes at random."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    codes = torch.randint(0, clusters, (in_features, num_groups(out_features, group_size)), generator=generator)
    codes[-1] = clusters - 1
    packed = pack(codes, code_bits(clusters))
    return ops.PackedWeight(
        torch.randint(0, 256, packed.shape, dtype=torch.uint8, generator=generator) if damaged else packed,
        normal(blocks, clusters, group_size).to(dtype),
        out_features,
        1 + normal(in_features).to(dtype) / 4 if scale_in else None,
        1 + normal(out_features).to(dtype) / 4 if scale_out else None,
        None if residual is None else normal(out_features, in_features).to(residual),
    )


def tokens(*size: int, dtype=torch.float32, seed=5) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> bool:
    """Whether the error is at most `tolerance` of the norm of the exact result."""
    return bool((ours.double() - exact.double()).norm() <= tolerance * exact.double().norm() + 1e-30)


layouts = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 150), st.integers(1, 300)),
        "group_size": st.integers(1, 20) | st.integers(1, 64),
        "clusters": st.integers(1, 16).flatmap(lambda bits: st.integers(2 ** (bits - 1) + 1, 2**bits)),
        "blocks": st.sampled_from([1, 1, 2, 3, 7]),
        "scale_in": st.booleans(),
        "scale_out": st.booleans(),
        "residual": st.sampled_from([None, None, torch.float32, torch.bfloat16, torch.float16]),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "seed": st.integers(0, 99),
        "damaged": st.booleans(),
    }
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
some = settings(max_examples=60, deadline=None, derandomize=True)


@some
@drawn(layout=layouts, dtype=dtypes)
def test_decode_is_the_reference_bit_for_bit(layout, dtype):
    given = parts(**layout)
    weight = cpu.decode(given, dtype)
    assert weight.dtype == dtype and weight.is_contiguous()
    assert torch.equal(weight, reference.decode(given, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width_of_codes_decodes(bits, dtype):
    given = parts((8 * bits + 5, 137), 1 + bits % 5, 2**bits)
    assert torch.equal(cpu.decode(given, dtype), reference.decode(given, dtype))


@pytest.mark.parametrize("group_size", [*range(1, 18), 31, 32, 33, 48, 63, 64])
def test_every_group_size_decodes_and_multiplies(group_size):
    given, x = parts((150, 67), group_size, 19), tokens(3, 67)
    assert torch.equal(cpu.decode(given, torch.bfloat16), reference.decode(given, torch.bfloat16))
    for count in (1, 3):
        exact = reference.linear(x[:count].double(), given, None)
        assert near(cpu.linear(x[:count], given, None), exact, 1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_rounding_is_torchs_at_the_edges(scaled):
    special = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-41, -0.0, 0.0, 1.00390625, 1.01171875, 1.0039063, 65520]
    )
    given = parts((24, 40), 2, 6)
    given = given._replace(codebook=special.view(1, 6, 2))
    if scaled:
        given = given._replace(scale_in=torch.ones(40), scale_out=torch.ones(24))
    for dtype in (torch.float32, *HALVES):
        ours, theirs = cpu.decode(given, dtype), reference.decode(given, dtype)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(0.5, 7, -7), theirs.nan_to_num(0.5, 7, -7))
        assert torch.equal(ours.signbit() & (ours == 0), theirs.signbit() & (theirs == 0))


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, *HALVES])
@pytest.mark.parametrize("group_size", [*range(1, 18), 31, 32, 33, 64])
def test_tables_are_the_codebooks_as_torch_rounds_them(group_size, source, target):
    """Two blocks of 12 clusters, in memory that ends with the last of them."""
    numbers = torch.randn(2 * 12 * group_size, generator=torch.Generator().manual_seed(0))
    numbers[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-41, -0.0, 1.00390625])[: len(numbers)]
    codebook = numbers.to(source).view(2, 12, group_size)
    codes = pack(torch.randint(0, 12, (10, 3)), 4)
    table = arguments.arguments_for(ops.PackedWeight(codes, codebook, 3 * group_size), target)._centroids
    assert torch.equal(table.isnan(), codebook.isnan())
    assert torch.equal(table.nan_to_num(0.5, 7, -7), codebook.to(target).nan_to_num(0.5, 7, -7))


class Seen(TorchDispatchMode):
    """The names of the ops that a dispatch mode sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Watched(torch.Tensor):
    """A subclass that notes what is called with it."""

    calls: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_who_looks_on_sees_one_op():
    """Without a gradient the op is left out, for its dispatch takes as long as a small matrix; nobody must miss it."""
    given, x = parts(), tokens(1, 150)
    with torch.no_grad():
        plain = ops.linear(x, given)
        with Seen() as seen:
            assert torch.equal(ops.linear(x, given), plain)
        assert seen.names[0] == "cluscomp.linear.default"
        watched = given._replace(codes=given.codes.as_subclass(Watched))
        assert torch.equal(ops.linear(x, watched), plain)
        assert torch.ops.cluscomp.linear.default in Watched.calls
        graph = make_fx(lambda x: ops.linear(x, given))(x)
        assert torch.equal(graph(2 * x), ops.linear(2 * x, given))
        compiled = torch.compile(lambda x: ops.linear(x, given), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain)
        many = torch.stack([x, 2 * x, -x])
        each = torch.vmap(lambda x: ops.linear(x, given))(many)
        assert torch.equal(each, ops.linear(many, given))
    given.codebook.requires_grad_()
    y = ops.linear(x, given)
    assert torch.equal(y, plain) and y.grad_fn is not None
    with torch.inference_mode():
        assert torch.equal(ops.linear(x, given), plain)


@some
@drawn(layout=layouts, dtype=dtypes, count=st.integers(0, 40), bias=st.booleans())
def test_linear_follows_the_reference(layout, dtype, count, bias):
    given, (out_features, in_features) = parts(**layout), layout["shape"]
    x = tokens(count, in_features, dtype=dtype)
    bias = tokens(out_features, seed=9) if bias else None
    y = cpu.linear(x, given, bias)
    assert y.shape == (count, out_features) and y.dtype == dtype
    expected = reference.linear(x, given, bias)
    if count > cpu.MAX_FEW_TOKENS or given.residual is not None:
        assert torch.equal(y, expected)
    # A few tokens are summed in fp32 in another order, and with scales from a weight that is not rounded.
    wide = given._replace(
        **{name: getattr(given, name).double() for name in FLOATING if getattr(given, name) is not None}
    )
    exact = reference.linear(x.double(), wide, None if bias is None else bias.to(dtype).double())
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert near(y, exact, limit)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_few_tokens_are_at_least_as_exact_as_the_dense_layer(count):
    given = parts((256, 600), 3, 300)
    x = tokens(count, 600, dtype=torch.bfloat16)
    weight = reference.decode(given, torch.bfloat16)
    exact = x.double() @ weight.double().t()
    ours = (cpu.linear(x, given, None).double() - exact).norm()
    assert ours <= 1.05 * (F.linear(x, weight).double() - exact).norm()


@some
@drawn(layout=layouts, dtype=dtypes, count=st.integers(0, 40), matrix_units=st.booleans())
def test_codebook_grad_follows_the_reference(layout, dtype, count, matrix_units):
    given, (out_features, in_features) = parts(**layout), layout["shape"]
    x, upstream = tokens(count, in_features, dtype=dtype), tokens(count, out_features, dtype=dtype, seed=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_multiplies_bf16", lambda: matrix_units)
        ours = cpu.codebook_grad(x, upstream, given)
    exact = reference.codebook_grad(x, upstream, given)
    # With matrix units every element of dL/dW is rounded (2⁻⁹ of it at most) before it enters the sums.
    limit = 4e-3 if dtype == torch.bfloat16 and matrix_units else 1e-5
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.is_contiguous()
        bound = (x.double().abs().t() @ upstream.double().abs()).norm() if theirs.numel() else 0
        assert near(mine, theirs, limit) or (mine - theirs).norm() <= limit * bound


def test_tiles_of_the_gradient_change_only_the_order_of_sums(monkeypatch):
    given = parts((70, 150), blocks=3, scale_in=True, scale_out=True, residual=torch.float32)
    x, upstream = tokens(9, 150), tokens(9, 70, seed=6)
    exact = reference.codebook_grad(x.double(), upstream.double(), given)
    for size in (1, 70 * 4 * 7):
        monkeypatch.setattr(cpu, "_TILE_BYTES", size)
        for mine, theirs in zip(cpu.codebook_grad(x, upstream, given), exact, strict=True):
            assert near(mine, theirs, 1e-5)


@pytest.mark.parametrize("matrix_units", [False, True])
def test_codebook_grad_in_bf16_loses_less_than_a_bf16_sum(matrix_units, monkeypatch):
    monkeypatch.setattr(cpu, "_multiplies_bf16", lambda: matrix_units)
    given = parts((96, 64), 3, 4)
    x, upstream = tokens(50, 64, dtype=torch.bfloat16), tokens(50, 96, dtype=torch.bfloat16, seed=6)
    exact = reference.codebook_grad(x.double(), upstream.double(), given)[0]
    error = (cpu.codebook_grad(x, upstream, given)[0] - exact).norm()
    grad = (x.t() @ upstream).reshape(-1, 3)
    naive = torch.zeros(4, 3, dtype=torch.bfloat16).index_add_(0, unpack(given.codes, 2, 32).reshape(-1), grad)
    assert error < (2e-3 if matrix_units else 1e-6) * exact.norm()
    assert error < (naive - exact).norm() / 5


def test_python_threads_do_the_work_where_torch_has_no_openmp(monkeypatch):
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    given = parts((512, 300))
    assert torch.equal(cpu.decode(given, torch.bfloat16), reference.decode(given, torch.bfloat16))


def test_calls_from_several_threads_do_not_disturb_each_other():
    cases = [(parts((256, 200), seed=seed), tokens(1 + seed, 200, seed=seed)) for seed in range(4)]
    expected = [cpu.linear(x, given, None) for given, x in cases]
    wrong = []

    def work(k):
        for _ in range(20):
            if not torch.equal(cpu.linear(cases[k][1], cases[k][0], None), expected[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_matrices_of_one_shape_share_their_tables_without_a_trace(monkeypatch):
    monkeypatch.setattr(arguments, "_KEPT", arguments._Kept())
    monkeypatch.setattr(arguments, "_KEPT_SHAPES", 2)
    shapes = [(70, 150), (64, 128), (33, 40)]
    matrices = [parts(shape, seed=seed) for shape in shapes for seed in range(3)]
    for _ in range(2):
        for given in matrices:
            x, codes = tokens(3, given.in_features), given.codes
            assert near(cpu.linear(x, given, None), reference.linear(x, given, None), 1e-6)
            assert torch.equal(cpu.decode(given, torch.float32), reference.decode(given, torch.float32))
            given.codebook.mul_(-2)  # in place, as training does
            codes[0], codes[1] = codes[1].clone(), codes[0].clone()
    assert len(arguments._KEPT.shapes) == 2


def test_tables_that_are_kept_keep_no_codes():
    given = parts((70, 150))
    gone = weakref.ref(given.codes)
    cpu.decode(given, torch.float32)
    cpu.linear(tokens(3, 150), given, None)
    del given
    assert gone() is None


def test_gradients_agree_through_autograd_and_the_compiler():
    given = parts((96, 160), scale_in=True, scale_out=True)
    leaves = [part.requires_grad_() for part in (given.codebook, given.scale_in, given.scale_out)]
    x, upstream = tokens(2, 160).requires_grad_(), tokens(2, 96, seed=6)

    def grads(function):
        return torch.autograd.grad(function(x, given), [x, *leaves], upstream)

    exact = upstream.double() @ reference.decode(given, torch.float64).detach()
    eager = grads(ops.linear)
    assert near(eager[0], exact, 1e-5)
    torch.compiler.reset()
    compiled = grads(torch.compile(ops.linear, fullgraph=True, backend="aot_eager"))
    for one, two in zip(compiled, eager, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("case", ["fp64", "no numba", "transposed residual", "small"])
def test_what_the_kernels_do_not_know_goes_to_the_reference(case, monkeypatch):
    given, dtype = parts(), torch.float32
    if case == "fp64":
        dtype = torch.float64
    elif case == "no numba":
        monkeypatch.setattr(cpu, "compiled", lambda: None)
    elif case == "transposed residual":
        given = given._replace(residual=tokens(150, 70).t())
    else:
        monkeypatch.setattr(cpu, "_SMALL", 70 * 150 + 1)
    monkeypatch.setattr(cpu, "run", None)
    x, upstream = tokens(4, 150, dtype=dtype), tokens(4, 70, dtype=dtype, seed=6)
    assert torch.equal(cpu.decode(given, dtype), reference.decode(given, dtype))
    assert torch.equal(cpu.linear(x, given, None), reference.linear(x, given, None))
    if case != "transposed residual":
        ours, theirs = cpu.codebook_grad(x, upstream, given), reference.codebook_grad(x, upstream, given)
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_numba_is_imported_by_the_first_large_matrix_and_may_be_absent():
    program = (
        "import sys, torch; from cluscomp_peft.codes import pack; from cluscomp_peft import ops\n"
        "def run(size):\n"
        "    codes = pack(torch.zeros(size, size, dtype=torch.int32), 3)\n"
        "    return ops.linear(torch.ones(1, size), ops.PackedWeight(codes, torch.ones(1, 8, 1), size))\n"
        "assert run(8).eq(8).all() and 'numba' not in sys.modules\n"
        "sys.modules['numba'] = None\n"
        "assert run(256).eq(256).all()"
    )
    done = subprocess.run([warm.python("torch"), "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
