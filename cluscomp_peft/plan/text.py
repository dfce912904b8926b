"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..progress import duration
from .parts import GIB

if TYPE_CHECKING:
    from . import Plan
    from .settings import Settings

__all__ = ["render"]

_COMPARED = ("finetune_alone", "qlora", "full")


def render(plan: Plan) -> str:
    """The plan as aligned tables of plain text; sizes in GiB."""
    settings = plan.settings
    several = settings.world_size > 1
    words = [
        _batch(settings),
        settings.dtype,
        f"rank {settings.rank}" if settings.num_blocks is None else f"{settings.num_blocks} delta codebooks a matrix",
        settings.optimizer,
        f"{'with' if settings.gradient_checkpointing else 'no'} gradient checkpointing",
        settings.device,
    ]
    lines = [
        f"{plan.model}: {plan.parameters / 1e9:.3f} B parameters; {plan.matrices} matrices with "
        f"{plan.weights / 1e9:.3f} B weights at {plan.true_bits:.3f} true bits",
        ", ".join(words),
    ]
    shown = [job for key, job in plan.jobs.items() if key not in _COMPARED]
    width = max(len(part.name) for job in shown for part in job.parts) + 2

    def row(name: str, text: str) -> str:
        return f"{name:<{width}}{text:>10}"

    for job in shown:
        lines += ["", row(job.name, "GiB"), "-" * (width + 10)]
        for part in job.parts:
            at_peak = part.moment in (None, job.peak)
            lines.append(row(part.name, _gib(part.bytes) if at_peak else f"({_gib(part.bytes)})"))
        lines.append(row("total", _gib(job.total)))
    lines += ["", row("on disk", "GiB"), "-" * (width + 10)]
    names = {"dense": "dense model", "compressed": "compressed model", "calibration": "activations while calibrating"}
    lines += [row(names[key], _gib(size)) for key, size in plan.disk.items()]
    title = "the same finetuning otherwise" if not several else "on one device, and otherwise"
    lines += ["", row(title, "GiB"), "-" * (width + 10)]
    own = f"codebooks, {plan.true_bits:.2f} bits"
    lines += [row(own, _gib(plan.jobs["finetune_alone" if several else "finetune"].total))]
    lines += [row(plan.jobs[key].name, _gib(plan.jobs[key].total)) for key in ("qlora", "full")]
    lines += _time(plan)
    if plan.memory is not None:
        lines += ["", *_fits(plan)]
    notes = ["(in parentheses: at another moment than the peak)", *plan.notes]
    return "\n".join([*lines, "", *notes])


def _time(plan: Plan) -> list[str]:
    time = plan.time
    if time is None:
        return []
    rate = (
        f"{time.flops_per_second / 1e12:.1f} T"
        if time.flops_per_second >= 1e12
        else f"{time.flops_per_second / 1e9:.1f} G"
    )
    return [
        "",
        f"finetuning on {time.tokens:,} tokens: about {duration(time.total)}, {duration(time.step)} a step",
        f"at {rate}FLOP/s: {time.why}",
    ]


def _fits(plan: Plan) -> list[str]:
    assert plan.memory is not None
    lengths = list(next(iter(plan.fits.values())))
    several = plan.settings.world_size > 1
    each = f" of each of {plan.settings.world_size} devices" if several else ""
    lines = [f"finetuning in {_gib(plan.memory)} GiB{each}; * fits"]
    lines.append(f"{'bits, tokens':<14}" + "".join(f"{length:>11}" for length in lengths))
    for bits, totals in plan.fits.items():
        cells = []
        for total in totals.values():
            mark = "*" if total is not None and total <= plan.memory else " "
            cells.append(f"{'-' if total is None else _gib(total):>10}{mark}")
        lines.append(f"{bits:<14g}" + "".join(cells))
    asked = plan.settings.bits
    if plan.longest:
        lines.append(f"longest sequence that fits at {asked:g} bits: {plan.longest} tokens")
    else:
        lines.append(
            f"at {asked:g} bits not even 64 tokens fit: fewer bits, a smaller batch, --optimizer adamw_8bit or "
            "--chunked-loss take less"
        )
    return [*lines, *_spread(plan)]


def _batch(settings: Settings) -> str:
    """What a device works on at once, and all of them together."""
    batch = f"batch {settings.batch} x {settings.seqlen} tokens"
    if settings.world_size == 1:
        return batch
    together = settings.batch * settings.world_size
    return (
        f"{batch} on each of {settings.world_size} devices with {settings.engine} (global batch {together}, "
        f"{together * settings.seqlen} tokens, times accumulation)"
    )


def _spread(plan: Plan) -> list[str]:
    """The fewest devices on which each engine would fit."""
    assert plan.memory is not None
    if not plan.spread:
        return []
    found = []
    for engine, totals in plan.spread.items():
        size = next((size for size, total in totals.items() if total <= plan.memory), None)
        if size is not None:
            found.append(f"  --world-size {size:<3}--engine {engine:<6} takes {_gib(totals[size])} GiB of each device")
    asked = f"{plan.settings.bits:g} bits, {plan.settings.seqlen} tokens"
    if not found:
        most = max(next(iter(plan.spread.values())))
        return [f"{asked}: no engine fits them on up to {most} devices, each has activations of its own"]
    return [f"{asked} would fit several devices:", *found]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
