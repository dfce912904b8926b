"""Reconstruction: codebooks and scales of one block, trained so that the block does what the dense one did.

    minimise over codebooks and scales   Σ ‖ block(x̂; C, s) − dense block(x) ‖²     codes stay

x̂ is what the compressed blocks before it hand on, x what the dense ones did, so that every block also repairs what
those before it left (ClusComp, arXiv 2503.13089, section 3.2). Adam steps are in units of what they change: a step of
rate 1 moves a centroid by the RMS of its codebook, a scale by its own RMS. The state with the least error on sequences
that are held out is kept, and training ends when it no longer falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ...linear import ClusteredLinear

__all__ = ["Reconstruction", "reconstruct"]

_PATIENCE = 4  # epochs without a new best
_WORTH = 1e-3  # a new best is at least this much lower


class Reconstruction:
    """Error of the block's output relative to the dense output's energy, before and after, and epochs trained."""

    def __init__(self, before: float, after: float, epochs: int) -> None:
        self.before, self.after, self.epochs = before, after, epochs


def reconstruct(
    run: Callable[[torch.Tensor], torch.Tensor],
    layers: Sequence[ClusteredLinear],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    *,
    held_out: int,
    epochs: int = 20,
    learning_rate: float = 0.01,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Reconstruction:
    """Trains the codebooks and scales of `layers`, which end in the dtype that they had.

    Args:
        run: The block: input [batch, length, hidden] to output.
        layers: Its clustered layers.
        inputs, targets: Batches [batch, length, hidden]; on any device, moved to the layers'.
        held_out (`int`): The last so many batches judge, and are not trained on.
        epochs (`int`): At most; the rate falls over them as a cosine.
        learning_rate (`float`): In units of the RMS of what is trained.
        seed (`int`): Of the order of batches.
        progress: Called after every epoch.

    Raises:
        ValueError: If an output is NaN or infinite.
    """
    if not layers:
        return Reconstruction(0.0, 0.0, 0)
    device, dtype = layers[0].codebook.device, layers[0].codebook.dtype
    parameters, rates = [], []
    for layer in layers:
        for name in ("codebook", "scale_in", "scale_out"):
            value = getattr(layer, name)
            if value is None:
                continue
            trained = nn.Parameter(value.detach().float(), requires_grad=True)
            layer.set_parameter(name, trained)
            rms = float(trained.detach().square().mean().sqrt())
            parameters.append(trained)
            rates.append(learning_rate * max(rms, 1e-12))
    training, judging = range(len(inputs) - held_out), range(len(inputs) - held_out, len(inputs))

    energy = sum(float(target.float().square().sum(dtype=torch.float64)) for target in targets) / len(targets)

    def error(batch: int) -> torch.Tensor:
        target = targets[batch].to(device).float()
        return (run(inputs[batch].to(device)).float() - target).square().sum() / max(energy, 1e-30)

    def judge() -> float:
        with torch.no_grad():
            return sum(float(error(batch)) for batch in judging) / len(judging)

    optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in parameters], betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    before = lowest = judge()
    if not math.isfinite(before):
        raise ValueError("the block's output is NaN or infinite on the calibration text; use another dtype or text.")
    best = [parameter.detach().clone() for parameter in parameters]
    waited = done = 0
    steps, step = epochs * len(training), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(training), generator=generator).tolist():
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = error(batch)
            step += 1
            if not bool(torch.isfinite(loss)):
                continue  # keep-best guards the result; one bad batch shall not end a long run
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done += 1
        now = judge()
        waited = 0 if now < lowest * (1 - _WORTH) else waited + 1
        if now < lowest:
            lowest, best = now, [parameter.detach().clone() for parameter in parameters]
        if progress is not None:
            progress()
        if waited >= _PATIENCE:
            break
    kept = iter(best)
    for layer in layers:
        for name in ("codebook", "scale_in", "scale_out"):
            if getattr(layer, name) is not None:
                layer.set_parameter(name, next(kept).to(dtype))
    return Reconstruction(before, lowest, done)
