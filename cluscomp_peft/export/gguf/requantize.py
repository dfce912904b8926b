"""Types that llama.cpp's own library makes of a file in F16, by `cyllama`, whose wheels hold it: K-quants and IQ4."""

from __future__ import annotations

import gguf

__all__ = ["LIBRARY_TYPES", "check_library", "requantize"]

LIBRARY_TYPES = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip


def check_library(kind: str) -> None:
    """Raises a ValueError if `cyllama` is not installed."""
    try:
        import cyllama.llama.llama_cpp  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--type {kind} is made by llama.cpp: install cluscomp_peft[llama-cpp], or take Q8_0, or make a file of "
            "type F16 and quantise it with llama.cpp's llama-quantize."
        ) from error


def requantize(source: str, target: str, kind: str) -> None:
    """Writes a GGUF file of another type; both are paths.

    Raises:
        OSError: If llama.cpp could not.
    """
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    parameters = llama_cpp.LlamaModelQuantizeParams()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    try:
        status = llama_cpp.model_quantize(source, target, parameters)
    except RuntimeError as error:
        raise OSError(f"llama.cpp could not quantise {source} to {kind}: {error}") from error
    if status:
        raise OSError(f"llama.cpp could not quantise {source} to {kind} (status {status}).")
