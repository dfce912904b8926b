"""CUDA C++ compiled at run time by NVRTC, the compiler that comes with torch, and launched through the driver.

    source + macros ──NVRTC──► machine code ──cuModuleLoadData──► function ──cuLaunchKernel──► on torch's stream

Triton writes all other kernels; it cannot address shared memory, which a table of centroids wants to lie in. Nothing
but torch's own libraries is needed: no toolkit, no headers, no C++ compiler. Machine code is kept in a folder of the
user's cache, named after everything it depends on; where that cannot be written it is compiled anew in each process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

import torch

from .failures import TransientError

__all__ = ["Function", "compile_source", "launch_fields"]

_INVALID_CONTEXT = 201
_TRANSIENT = (2, *range(900, 910))  # out of memory; what a capture into a graph does not allow
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def compile_source(source: str, macros: dict[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code (a cubin) of CUDA C++ for a device of this compute capability.

    Raises:
        OSError: If there is no NVRTC.
        RuntimeError: If the compiler refuses, with its words.
    """
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    compiler = _nvrtc()
    version = (ctypes.c_int(), ctypes.c_int())
    compiler.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    key = repr((source, options, version[0].value, version[1].value))
    path = _cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = _compile(compiler, source, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)  # another process sees all of it or nothing
    except OSError:
        pass
    return code


def _compile(compiler: ctypes.CDLL, source: str, options: list[str]) -> bytes:
    program = ctypes.c_void_p()
    _check_compiler(
        compiler, compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    )
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if compiler.nvrtcCompileProgram(program, len(options), given) != 0:
            size = ctypes.c_size_t()
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {log.value.decode(errors='replace')}")
        size = ctypes.c_size_t()
        _check_compiler(compiler, compiler.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check_compiler(compiler, compiler.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _check_compiler(compiler: ctypes.CDLL, status: int) -> None:
    if status != 0:
        compiler.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {compiler.nvrtcGetErrorString(status).decode()}")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    if torch.version.cuda is None:
        raise OSError("this torch was built without CUDA, which NVRTC comes with.")
    major = torch.version.cuda.split(".")[0]
    names = [f"nvrtc64_{major}0_0.dll"] if os.name == "nt" else [f"libnvrtc.so.{major}", "libnvrtc.so"]
    packages = importlib.util.find_spec("nvidia")
    folders = [] if packages is None else [Path(place) for place in packages.submodule_search_locations or ()]
    beside = [path for folder in folders for name in names for path in folder.glob(f"*/lib/{name}")]
    for name in (*names, *beside):  # as torch has loaded it, or as its package lies beside it
        try:
            if isinstance(name, Path):
                for part in name.parent.glob("libnvrtc-builtins.so.*"):  # which it looks for by name
                    ctypes.CDLL(str(part))
            return ctypes.CDLL(str(name))
        except OSError as error:
            last = error
    raise last


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "cluscomp_peft" / "cuda"


def launch_fields(arguments: dict[str, type]) -> type[ctypes.Structure]:
    """The structure whose fields are a kernel's arguments, in order."""
    return type("Arguments", (ctypes.Structure,), {"_fields_": list(arguments.items())})


class Function:
    """A kernel on a device: call it with grid, threads of a block, bytes of shared memory and its arguments.

    Args:
        code (`bytes`): Machine code.
        name (`str`): Of an `extern "C"` kernel in it.
        arguments: Its arguments as a [`launch_fields`] structure.
        device (`torch.device`): Where it will run.
        shared (`int`): The most bytes of dynamic shared memory that a launch will ask for.
    """

    def __init__(
        self, code: bytes, name: str, arguments: type[ctypes.Structure], device: torch.device, shared: int = 0
    ) -> None:
        self._device = device
        with torch.cuda.device(device):
            _enter(device)
            self._module = ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), code))
            self._function = ctypes.c_void_p()
            _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
            if shared > 48 << 10:
                _check(_driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared))
        self._arguments = arguments
        self._offsets = [getattr(arguments, field[0]).offset for field in arguments._fields_]
        self._pointers = ctypes.c_void_p * len(self._offsets)

    def occupancy(self, threads: int, shared: int) -> int:
        """Blocks of threads with `shared` bytes each that a multiprocessor holds, at least 1."""
        count = ctypes.c_int()
        _check(
            _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(count), self._function, threads, ctypes.c_size_t(shared)
            )
        )
        return max(1, count.value)

    def __call__(self, grid: tuple[int, int], threads: int, shared: int, *values: int) -> None:
        """Launches on torch's current stream of the device, which must be the current device."""
        assert len(values) == len(self._offsets)
        arguments = self._arguments(*values)  # of this call alone: other threads launch, too
        start = ctypes.addressof(arguments)
        pointers = self._pointers(*(start + offset for offset in self._offsets))
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device.index))
        given = (self._function, *grid, 1, threads, 1, 1, shared, stream, pointers, None)
        status = _driver().cuLaunchKernel(*given)
        if status == _INVALID_CONTEXT:
            _enter(self._device)
            status = _driver().cuLaunchKernel(*given)
        _check(status)


def _enter(device: torch.device) -> None:
    """Makes torch's context of the device current in this thread, which may not have used it yet."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if context.value is None:
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(device.index)))
        _check(_driver().cuCtxSetCurrent(context))


def _check(status: int) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        kind = TransientError if status in _TRANSIENT else RuntimeError
        raise kind(f"CUDA driver: {(text.value or b'unknown error').decode()} ({status})")
