"""Compiled functions: code on disk belongs to the sources that it was made from; what cannot be kept or made is done
without."""

import re
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("numba")

INNER = "import numba\n@numba.njit\ndef inner(x):\n    return x + {number}\n"
OUTER = """
import importlib.util
from numba import types
from .inner import inner
from tests import warm

# The module alone: importing the package takes seconds, and so would every test here.
spec = importlib.util.spec_from_file_location("jit", {jit!r})
jit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jit)
callback, njit = jit.callback, jit.njit

@njit(nogil=True)
def outer(x):
    return inner(x)

def called(x):
    return inner(x)

def run():
    import ctypes
    address = callback(types.int64(types.int64), called)
    first = outer(100), ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(100)
    return first, sum(outer._cache_hits.values())
"""


@pytest.fixture
def compiling(tmp_path):
    """Writes a package whose compiled functions take in one of another file, and runs it in a process of its own:
    what two functions say, and whether the code was on disk."""
    package = tmp_path / "pair"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "outer.py").write_text(OUTER.replace("{jit!r}", repr(str(ROOT / "cluscomp_peft" / "jit.py"))))

    def run(number: int, before: str = "") -> tuple[tuple[int, int], bool]:
        inner = package / "inner.py"
        if not inner.exists() or inner.read_text() != INNER.format(number=number):
            inner.write_text(INNER.format(number=number))
        done = subprocess.run(
            [
                warm.python("torch"),
                "-c",
                f"import tempfile, os, errno\n{before}\nfrom pair.outer import run\nprint(run())",
            ],
            env={"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr.strip(), done.stderr
        values, hits = eval(done.stdout)
        return values, bool(hits)

    run.cache = tmp_path / "cache"
    return run


def test_code_on_disk_is_used_until_a_source_of_it_changes(compiling):
    assert compiling(1) == ((101, 101), False)
    assert compiling(1) == ((101, 101), True)
    assert compiling(2) == ((102, 102), False)  # of a file that numba does not look at
    assert compiling(2) == ((102, 102), True)
    assert compiling(1) == ((101, 101), True)  # each version has files of its own


NO_PLACE = "def fail(*a, **k): raise OSError(errno.EROFS, 'read-only')\ntempfile.TemporaryFile = fail"
FULL = "def fail(*a, **k): raise OSError(errno.ENOSPC, 'full')\nos.replace = fail"


@pytest.mark.parametrize("trouble", [NO_PLACE, FULL], ids=["no place", "full"])
def test_what_cannot_be_kept_is_compiled_every_time(compiling, trouble):
    assert compiling(1, trouble) == ((101, 101), False)
    assert compiling(1, trouble) == ((101, 101), False)
    assert not [path for path in compiling.cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("suffix, damage", [("nbi", "cut"), ("nbi", "empty"), ("nbc", "cut"), ("nbc", "zeros")])
def test_damaged_files_are_compiled_anew_and_replaced(compiling, suffix, damage):
    compiling(1)
    files = list(compiling.cache.rglob(f"*.{suffix}"))
    assert len(files) == 2
    for path in files:
        content = path.read_bytes()
        half = len(content) // 2
        changed = {"cut": content[:half], "empty": b"", "zeros": content[:half] + bytes(len(content) - half)}
        path.write_bytes(changed[damage])
    assert compiling(1) == ((101, 101), False)
    assert compiling(1) == ((101, 101), True)


def test_no_function_is_kept_by_numba_itself():
    sources = {path: path.read_text() for path in (ROOT / "cluscomp_peft").rglob("*.py")}
    assert any("callback(" in source for source in sources.values())
    assert not [path for path, source in sources.items() if re.search(r"\bcache=True", source)]


def run_code(code: str, **environment: str) -> str:
    done = subprocess.run(
        [warm.python("torch"), "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LAYER = """
import torch
from cluscomp_peft import kmeans, ops
from cluscomp_peft.clustering.search import CentroidSearch
from cluscomp_peft.codes import pack
generator = torch.Generator().manual_seed(0)
codes = torch.randint(0, 64, (160, 100), generator=generator)
packed, book = pack(codes, 6), torch.randn(1, 64, 2, generator=generator)
def same():
    weight = book[0][codes].reshape(160, 200)
    x = torch.randn(64, 160, generator=generator)
    for tokens in (1, 7, 64):
        torch.testing.assert_close(ops.linear(x[:tokens], ops.PackedWeight(packed, book, 200)), x[:tokens] @ weight)
    inputs = book.clone().requires_grad_()
    ops.linear(x, ops.PackedWeight(packed, inputs, 200)).sum().backward()
    assert inputs.grad.isfinite().all() and inputs.grad.any()
"""

BROKEN = {
    "no library": """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "llvmlite.binding.ffi":
            raise OSError("Could not find/load shared object file")
sys.meta_path.insert(0, Broken())
""",
    "too new a numpy": """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "numba.core.types":
            raise ImportError("Numba needs NumPy 2.2 or less")
sys.meta_path.insert(0, Broken())
""",
    "unknown machine": """
import llvmlite.binding as binding
def fail(): raise RuntimeError("failed to get host cpu features")
binding.get_host_cpu_features = fail
""",
    "no compiler": """
import numba.core.compiler as compiler
def fail(*a, **k): raise ValueError("cannot compile")
compiler.compile_extra = compiler.CompilerBase.compile_extra = fail
import numba.core.caching as caching
caching.Cache.load_overload = lambda *a, **k: None  # what other tests have compiled
""",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_numba_leaves_everything_to_torch_and_says_so_once(kind):
    code = f"""
import warnings
{BROKEN[kind]}
{LAYER}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    same(), same()
    if {kind != "unknown machine"}:  # which numba itself can work on
        vectors = torch.randn(10000, 4)
        for _ in range(2):
            assert kmeans(vectors, 1000, iterations=1)[2].engine == "torch"
        points = vectors[:2000]
        assert torch.equal(CentroidSearch(points)(points[:300]), torch.arange(300))
        try:
            kmeans(vectors, 1000, engine="cpu")
        except Exception:
            pass
        else:
            raise AssertionError("an engine that was asked for by name must not be replaced")
said = [str(w.message) for w in caught]
print(sum("CPU kernels cannot be compiled" in text for text in said))
print(sum("compiled engine 'cpu'" in text for text in said))
"""
    words = run_code(code, NUMBA_CACHE_DIR="/dev/null/none").split()
    assert words == ["1", "0" if kind == "unknown machine" else "1"]


def test_an_error_of_progress_is_not_taken_for_a_broken_engine():
    from cluscomp_peft import kmeans

    def stop(*_):
        raise ValueError("enough")

    vectors = torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="enough"):
            kmeans(vectors, 1000, progress=stop)
        assert kmeans(vectors, 1000, iterations=1)[2].engine == "cpu"
