"""How much memory compressing, finetuning and serving a model take, without doing any of it.

Only `config.json` is read. The model is built on the meta device, where tensors have shapes and no data; its linear
layers are replaced by clustered ones, and one block runs there forward and backward while a ledger counts every tensor
that is made and freed. So activations are those that autograd really keeps, whatever the model's family:

    finetuning = codes + codebooks + what stays dense                              as the checkpoint stores them
               + deltas · (4 + 4 + states)           fp32, gradients, 8 bytes of AdamW (2 of its 8-bit kind)
               + inputs of all blocks                 n · batch · seqlen · hidden; without checkpointing all they keep
               + the larger of  one block at work     what it keeps, one decoded weight, tiles, gradients on the way
                                logits and loss       batch · seqlen · vocabulary in fp32, and copies
    serving    = codes + codebooks + what stays dense + keys and values + one block without gradients
    framework    CUDA context and what its allocator cannot use; on a CPU the interpreter with its imports

Two things are put in by hand: attention counts as fused (it keeps q, k, v, its output and one fp32 number for each
row, never scores of seqlen²), and the ops of this package count what they take inside (the decoded weight, fp32
tiles). Where a model does not run on the meta device, its block counts as what its linear layers read and write
(`model.from_widths`). With several devices finetuning is what one of them takes; `sharding` says who holds what, and
`installed` asks the packages that are installed for their defaults, and `speed` how long finetuning takes. A forecast
is data, [`Job`]s of [`Part`]s; [`render`] makes text of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..compress.stream.pipeline import TOGETHER
from .jobs import (
    CUDA_CONTEXT,
    FRAGMENTATION,
    calibration_length,
    compress,
    compress_calibrated,
    disk,
    finetune,
    full,
    qlora,
    serve,
)
from .model import Model
from .parts import GIB, Job, Part
from .settings import ENGINES, OPTIMIZERS, Settings
from .sharding import engine_of
from .speed import Duration, training_time
from .text import render

__all__ = ["ENGINES", "OPTIMIZERS", "Duration", "Job", "Part", "Plan", "Settings", "plan", "render"]

_GRID_BITS = (4.0, 3.0, 2.5, 2.0)
_GRID_SEQLENS = (512, 1024, 2048, 4096, 8192)
_WORLD_SIZES = (2, 4, 8, 16, 32, 64)
_STEP = 64  # tokens that the longest sequence is a multiple of
_NO_LIMIT = 1 << 20  # tokens, for models without a number of positions


@dataclass(frozen=True)
class Plan:
    """A forecast.

    Args:
        model (`str`): Folder or hub id.
        settings ([`Settings`]): As asked, with `bits` filled in.
        parameters, weights, matrices (`int`): Of the model; in clustered matrices; those matrices.
        true_bits (`float`): Bits per weight of the clustered matrices.
        jobs: finetune, serve, compress (without and with calibration, for a dense model) and, to compare, qlora, full.
            With several devices finetune is of one of them; finetune_alone, qlora and full are of a single one.
        disk: Bytes of weight files before and after, and of activations that calibration keeps on disk meanwhile.
        memory (`int`, *optional*): Bytes that there are.
        fits: bits → seqlen → bytes of finetuning (None where the bits are out of reach); empty without `memory`.
        longest (`int`, *optional*): Tokens of the longest sequence that fits `memory` at the asked bits; 0 for none.
        spread: engine → devices → bytes of finetuning on each; empty where it fits `memory` as it was asked for.
        time ([`Duration`], *optional*): Of finetuning; None where nothing says how fast the device is.
        notes: What the numbers leave out or assume.
    """

    model: str
    settings: Settings
    parameters: int
    weights: int
    matrices: int
    true_bits: float
    jobs: dict[str, Job]
    disk: dict[str, int]
    memory: int | None
    fits: dict[float, dict[int, int | None]]
    longest: int | None
    spread: dict[str, dict[int, int]]
    time: Duration | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; all sizes in bytes."""
        jobs = {
            key: {"total": job.total, "peak": job.peak, "parts": [asdict(part) for part in job.parts]}
            for key, job in self.jobs.items()
        }
        time = None if self.time is None else asdict(self.time)
        return {**vars(self), "settings": asdict(self.settings), "jobs": jobs, "time": time}


def plan(path: str, settings: Settings | None = None, memory: int | None = None, *, measure: bool = False) -> Plan:
    """Forecasts the memory of compressing, finetuning and serving a model, and the time of finetuning.

    Args:
        path (`str`): Folder or hub id, dense or compressed; only its config is read.
        settings ([`Settings`], *optional*): Defaults otherwise.
        memory (`int`, *optional*): Bytes to look for settings that fit into.
        measure (`bool`): Run one layer for a second to see how fast this machine trains, if it is of the device asked
            for; see [`training_time`].

    Raises:
        ValueError: If there is no such model, it has no layers to cluster, or they do not fit the settings.
        OSError: If the hub does not know it.
    """
    settings = settings or Settings()
    model = Model(path, settings)
    settings = replace(settings, bits=settings.bits or model.default_bits)
    assert settings.bits is not None
    stored = model.stored(settings.bits)
    jobs = {"finetune": finetune(model, settings), "serve": serve(model, settings)}
    if not model.compressed:
        jobs["compress"] = compress(model, settings)
        jobs["compress_calibrated"] = compress_calibrated(model, settings)
    if settings.world_size > 1:
        jobs["finetune_alone"] = finetune(model, replace(settings, world_size=1, engine=None))
    jobs["qlora"], jobs["full"] = qlora(model, settings), full(model, settings)
    fits, longest, spread = {}, None, {}
    if memory is not None:
        fits = _grid(model, settings)
        longest = _longest(model, settings, memory)
        if jobs["finetune"].total > memory:
            spread = _spread(model, settings)
    return Plan(
        path,
        settings,
        model.parameters,
        stored.weights,
        len(stored.specs),
        8 * (stored.codes + stored.codebooks) / stored.weights,
        jobs,
        disk(model, settings),
        memory,
        fits,
        longest,
        spread,
        training_time(model, settings, measure),
        tuple(_notes(model, settings)),
    )


def _grid(model: Model, settings: Settings) -> dict[float, dict[int, int | None]]:
    assert settings.bits is not None
    bits = [settings.bits] if model.compressed else sorted({*_GRID_BITS, settings.bits}, reverse=True)
    lengths = sorted({length for length in _GRID_SEQLENS if length <= (model.limit or length)} | {settings.seqlen})

    def total(bits: float, seqlen: int) -> int | None:
        try:
            model.stored(bits)
        except ValueError:
            return None
        return finetune(model, replace(settings, bits=bits, seqlen=seqlen)).total

    return {row: {column: total(row, column) for column in lengths} for row in bits}


def _spread(model: Model, settings: Settings) -> dict[str, dict[int, int]]:
    sizes = sorted({size for size in _WORLD_SIZES if size >= settings.world_size} | {max(2, settings.world_size)})
    return {
        engine: {size: finetune(model, replace(settings, world_size=size, engine=engine)).total for size in sizes}
        for engine in ENGINES
    }


def _longest(model: Model, settings: Settings, memory: int) -> int:
    def total(steps: int) -> int:
        return finetune(model, replace(settings, seqlen=steps * _STEP)).total

    low, high = 1, max(1, (model.limit or _NO_LIMIT) // _STEP)
    least, most = total(low), total(high)
    if most <= memory or least > memory:
        return min(high * _STEP, model.limit or _NO_LIMIT) if most <= memory else 0
    while high - low > 1:
        # The total is piecewise linear in the length: guess by interpolation, and try the guess and the next step.
        guess = low + int((memory - least) / (most - least) * (high - low))
        for steps in (min(max(guess, low + 1), high - 1), min(max(guess + 1, low + 1), high - 1)):
            size = total(steps) if low < steps < high else None
            if size is not None and size <= memory:
                low, least = steps, size
            elif size is not None:
                high, most = steps, size
    return low * _STEP


def _notes(model: Model, settings: Settings) -> Iterable[str]:
    if model.limit is not None and settings.seqlen > model.limit:
        yield f"{settings.seqlen} tokens are more than the {model.limit} positions that the model was made for."
    for trouble in dict.fromkeys(model.troubles):
        yield f"{trouble}: its activations are an estimate from the widths of its linear layers."
    yield (
        "Activations: one block was run on the meta device, and what autograd keeps was counted. Attention counts as "
        "fused, sequences as not padded, sliding windows as full."
    )
    for use in model.training(settings.bits, settings.batch, settings.seqlen).values():
        kept = use.kept / settings.batch / settings.seqlen / 1024
        entered = use.hidden / settings.batch / settings.seqlen / 1024
        yield f"A block keeps {kept:.1f} KiB for each token until it has gone back; its input takes {entered:.1f} KiB."
    if settings.world_size > 1:
        assert settings.bits is not None
        yield from engine_of(model, model.stored(settings.bits), settings).notes()
        yield (
            "Of several devices only finetuning is spread, serving and compressing are what one machine takes. What "
            "loading takes and buffers of NCCL's own are not counted."
        )
    yield "Gradients of deltas count all along, as they do where several batches are accumulated."
    if settings.device == "cuda":
        yield (
            f"CUDA context ({CUDA_CONTEXT / GIB:g} GiB) and fragmentation ({FRAGMENTATION:.0%}) are allowances, not "
            "measured; a display takes more."
        )
    else:
        yield (
            "On Linux malloc keeps what was freed: up to one and a half times the activations more, unless "
            "MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are set to 65536 in the environment."
        )
    if not settings.chunked_loss:
        yield "Logits count as transformers' loss makes them; TRL's nll and fused losses: --chunked-loss."
    if not model.compressed:
        yield (
            f"Compressing: K-means of {TOGETHER / 1e6:.1f} M weights at once, or of the largest matrix; with "
            f"calibration {settings.samples} x {calibration_length(model)} tokens on {settings.device}."
        )
