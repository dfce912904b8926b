"""The CUDA C++ kernels, compiled without a GPU: they fit, and nothing of them lies in local memory."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluscomp_peft.ops.backends.cuda import adapters, failures, nvrtc, plans

# Bytes of shared memory that a block of threads may have, and multiprocessors: A100, RTX 3090, H100.
DEVICES = {(8, 0): (163 << 10, 108), (8, 6): (99 << 10, 82), (9, 0): (227 << 10, 132)}
# capability, in, out, codebooks, clusters, group size, scales, tokens
CASES = [
    ((9, 0), 4096, 14336, 1, 4096, 3, True, 1),
    ((8, 0), 4096, 1024, 1, 256, 2, False, 16),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ((9, 0), 4096, 14336, 1, 4096, 4, False, 1),
            ((9, 0), 4096, 4096, 16, 4096, 6, True, 1),
            ((9, 0), 4096, 14336, 1, 4096, 4, True, 64),
            ((9, 0), 4096, 14336, 1, 9000, 5, True, 5),
            ((9, 0), 300, 513, 1, 300, 16, True, 16),
            ((8, 0), 11008, 4096, 64, 1000, 8, True, 8),
            ((8, 0), 4096, 4096, 1, 16, 1, False, 2),
            ((8, 6), 576, 1536, 1, 500, 4, False, 8),
        ]
    ),
]


SMALL = plans.Case(0, torch.bfloat16, 64, 64, 1, 16, 4, torch.float16, (False, False), True)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Pretends that there is a device, and keeps what is compiled for it: a list of (kernel, bytes of shared memory,
    file)."""
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nvrtc._nvrtc.cache_clear()
    try:
        nvrtc._nvrtc()
    except OSError:
        pytest.skip("no NVRTC here")
    found = []

    class Function:
        def __init__(self, code, name, arguments, device, shared=0):
            path = tmp_path / f"{len(found)}.cubin"
            path.write_bytes(code)
            found.append((name, shared, path))

        def occupancy(self, threads, shared):
            return 1

    monkeypatch.setattr(nvrtc, "Function", Function)
    remembered = (plans._loaded, plans.planned, plans._shared_memory, plans._processors, adapters._plan)
    for function in remembered:
        function.cache_clear()
    monkeypatch.setattr(failures, "_failed", set())
    monkeypatch.setattr(failures, "_warned", set())
    yield found
    for function in (*remembered, nvrtc._nvrtc):
        function.cache_clear()


def pretend(monkeypatch, capability: tuple[int, int]) -> int:
    shared, processors = DEVICES[capability]
    properties = SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        shared_memory_per_block_optin=shared,
        multi_processor_count=processors,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return shared


def local_memory(path: Path) -> list[str]:
    """The instructions of a cubin that read or write local memory, which is where spilled registers go."""
    triton = importlib.util.find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("no disassembler here")
    listing = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in listing
    return re.findall(r"\b(?:STL|LDL)\b.*", listing)


@pytest.mark.parametrize("capability, inputs, outputs, blocks, clusters, group_size, scales, tokens", CASES)
def test_kernels_fit_and_spill_nothing(
    compiled, monkeypatch, capability, inputs, outputs, blocks, clusters, group_size, scales, tokens
):
    most = pretend(monkeypatch, capability)
    case = plans.Case(
        0, torch.bfloat16, inputs, outputs, blocks, clusters, group_size, torch.float16, (scales, scales), True
    )
    linear, scatter = plans.plan_linear(case, tokens), plans.plan_scatter(case)
    assert linear is not None and linear.shared <= most and linear.parts <= linear.slots
    assert scatter is None or scatter.shared <= most
    assert {name for name, _, _ in compiled} >= {"table_linear", "finish"}
    for name, shared, path in compiled:
        assert shared <= most
        assert not local_memory(path), name


def test_strips_cover_every_channel_once(compiled, monkeypatch):
    """By the formulas of scatter.cu; blocks that differ by a channel and pieces without rows among them."""
    pretend(monkeypatch, (9, 0))
    for inputs, blocks in [(4096, 1), (520, 1), (28672, 1), (4096, 16), (4096, 3), (11008, 64), (14336, 5), (77, 9)]:
        case = plans.Case(0, torch.bfloat16, inputs, 14336, blocks, 256, 4, torch.float16, (False, False), True)
        owner = [channel * blocks // inputs for channel in range(inputs)]
        seen, sums = [], {}
        for strip in plans.plan_scatter(case).strips:
            for line in range(strip.blocks * strip.pieces):
                block = strip.block + line // strip.pieces
                start = max(-(-block * inputs // blocks), strip.row) + line % strip.pieces * strip.share
                stop = min(start + strip.share, -(-(block + 1) * inputs // blocks), strip.row + strip.rows)
                seen += range(start, stop)
                assert {owner[channel] for channel in range(start, stop)} <= {block}
                assert 0 <= block < blocks  # whose codebook is read, rows or not
            sums[strip.block] = sums.get(strip.block, 0) + strip.last
            assert strip.add == (strip.row * blocks % inputs >= blocks and strip.blocks == 1)
        assert sorted(seen) == list(range(inputs))
        assert set(sums.values()) == {1}


def test_the_sums_of_adapters_compile(compiled, monkeypatch):
    pretend(monkeypatch, (9, 0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        adapters._plan(0, dtype)
    assert [name for name, _, _ in compiled] == ["effective", "effective_backward"] * 3


def test_what_the_compiler_says_reaches_the_user(compiled):
    with pytest.raises(RuntimeError, match=r"NVRTC: [\s\S]*nonsense"):
        nvrtc.compile_source("int f() { return nonsense; }", {}, (9, 0))


def plan_or_none(case: plans.Case) -> plans.LinearPlan | None:
    return failures.attempt("table_linear", (case, 1), lambda: plans.planned(plans.plan_linear, case, 1))


def test_what_cannot_be_compiled_is_said_once_and_not_tried_again(compiled, monkeypatch):
    pretend(monkeypatch, (9, 0))
    tries = []
    monkeypatch.setattr(plans, "_source", lambda name: tries.append(name) or "nonsense")
    with pytest.warns(UserWarning, match=r"'table_linear' fails here \(RuntimeError: NVRTC[\s\S]*a slower one"):
        assert plan_or_none(SMALL) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_or_none(SMALL) is None and len(tries) == 1
        assert plan_or_none(SMALL._replace(group_size=3)) is None and len(tries) == 2  # another may compile


def test_a_refusal_of_the_moment_is_not_remembered(compiled, monkeypatch):
    pretend(monkeypatch, (9, 0))

    def refuse(*_):
        raise failures.TransientError("out of memory (2)")

    with monkeypatch.context() as now:
        now.setattr(nvrtc, "Function", refuse)
        with pytest.warns(UserWarning, match="out of memory"):
            assert plan_or_none(SMALL) is None
    assert plan_or_none(SMALL) is not None


def test_compiled_code_is_kept_and_a_folder_that_cannot_be_written_is_no_error(compiled, monkeypatch, tmp_path):
    source = 'extern "C" __global__ void nothing() {}'
    code = nvrtc.compile_source(source, {}, (9, 0))
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.compile_source(source, {}, (9, 0)) == code
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.compile_source(source, {}, (9, 0))


def test_launches_of_several_threads_keep_their_arguments(monkeypatch):
    """Through a driver that looks at them late."""
    seen = set()

    class Driver:
        def cuLaunchKernel(self, *given):
            time.sleep(1e-4)
            pointers = given[9]
            where = ctypes.cast(pointers[0], ctypes.POINTER(ctypes.c_void_p))[0]
            seen.add((where, ctypes.cast(pointers[1], ctypes.POINTER(ctypes.c_int))[0], given[1:8]))
            return 0

        def __getattr__(self, name):
            return lambda *given: 0

    monkeypatch.setattr(nvrtc, "_driver", Driver)
    monkeypatch.setattr(nvrtc, "_enter", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    structure = nvrtc.launch_fields({"where": ctypes.c_void_p, "count": ctypes.c_int})
    function = nvrtc.Function(b"", "kernel", structure, torch.device("cuda", 0))
    calls = [(2**40 + k, k) for k in range(1, 200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda call: function((3, 2), 64, 10, *call), calls))
    assert seen == {(*call, (3, 2, 1, 64, 1, 1, 10)) for call in calls}
    with pytest.raises(AssertionError):
        function((3, 2), 64, 10, 2**40)
