"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .jobs import GIB

if TYPE_CHECKING:
    from . import Plan

__all__ = ["render"]


def render(plan: Plan) -> str:
    """The plan as aligned tables of plain text; sizes in GiB."""
    settings = plan.settings
    words = [
        f"batch {settings.batch} x {settings.seqlen} tokens",
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
    shown = [job for key, job in plan.jobs.items() if key not in ("qlora", "full")]
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
    lines += ["", row("the same finetuning otherwise", "GiB"), "-" * (width + 10)]
    own = f"codebooks, {plan.true_bits:.2f} bits"
    lines += [row(own, _gib(plan.jobs["finetune"].total))]
    lines += [row(plan.jobs[key].name, _gib(plan.jobs[key].total)) for key in ("qlora", "full")]
    if plan.memory is not None:
        lines += ["", *_fits(plan)]
    notes = ["(in parentheses: at another moment than the peak)", *plan.notes]
    return "\n".join([*lines, "", *notes])


def _fits(plan: Plan) -> list[str]:
    assert plan.memory is not None
    lengths = list(next(iter(plan.fits.values())))
    lines = [f"finetuning in {_gib(plan.memory)} GiB; * fits"]
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
    return lines


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
