"""How good the compressed model is on a text of the user's: `cluscomp compress --eval FILE`.

    stem ─► dense block 0 ─────► dense block 1 ─────► … ─► tail ─► loss of the dense model
    stem ─► compressed block 0 ► compressed block 1 ► … ─► tail ─► loss of the compressed one

Both go through the model together, a block at a time, after the shards are written: neither is ever whole in memory.
Windows are those of `cluscomp evaluate`, and so are the losses, up to rounding where the command computes in another
dtype. A block's outputs stand on disk, two files for each model, written in turn.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ...linear import ClusteredLinear
from ...progress import Progress
from ..calibration.activations import Stream
from ..calibration.blocks import BlockModel
from .journal import Journal
from .shards import read_matrices
from .split import Shard

__all__ = ["MOST_TOKENS", "HeldOut", "measure_losses"]

MOST_TOKENS = 1 << 16  # the loss of so many is known to about a hundredth of a nat
_BATCH_TOKENS = 4096
_MODELS = ("dense", "compressed")


@dataclass(frozen=True)
class HeldOut:
    """A text that nothing is fitted to.

    Args:
        name (`str`): What people call it.
        windows (`list[torch.Tensor]`): [1, length] int64; the last one may be shorter.
        blocks ([`BlockModel`]): The dense model.
    """

    name: str
    windows: list[torch.Tensor]
    blocks: BlockModel

    @property
    def parts(self) -> list[list[torch.Tensor]]:
        """Batches [batch, length], those of one length together."""
        first, last = self.windows[0], self.windows[-1]
        whole = torch.cat([window for window in self.windows if window.shape == first.shape])
        batches = list(whole.split(max(1, _BATCH_TOKENS // whole.shape[1])))
        return [batches] if last.shape == first.shape else [batches, [last]]

    @property
    def digest(self) -> str:
        return hashlib.sha256(torch.cat(self.windows, 1).numpy().tobytes()).hexdigest()


@torch.no_grad()
def measure_losses(held_out: HeldOut, shards: Sequence[Shard], journal: Journal) -> dict[str, Any]:
    """Loss and perplexity of the dense and the compressed model; what an earlier run measured on the same text stays.

    Args:
        held_out ([`HeldOut`]): Text and dense model.
        shards: All of the compressed model, written.
        journal ([`Journal`]): Of their folder.

    Returns:
        `dict`: text, tokens (predicted ones), dense and compressed (nats per token), dense_perplexity,
        compressed_perplexity, and seconds.

    Raises:
        CannotCalibrate: If the model cannot be taken apart into blocks.
        ValueError: If a loss is NaN or infinite.
    """
    known = journal.content.get("evaluation")
    if known is not None and known["digest"] == held_out.digest:
        return {key: value for key, value in known.items() if key != "digest"} | {"text": held_out.name}
    started = time.perf_counter()
    outside = read_matrices([shard for shard in shards if shard.index is None and shard.matrices], journal.folder)
    model = held_out.blocks
    weights = {"dense": {}, "compressed": {name: layer.decode(model.dtype) for name, layer in outside.items()}}
    passes = [_Pass(model, weights, batches, journal.folder, number) for number, batches in enumerate(held_out.parts)]
    of_block = {shard.index: shard for shard in shards if shard.index is not None}
    with Progress("Evaluating", len(model), unit="block") as bar:
        for index in range(len(model)):
            with model.loaded(index):
                for one in passes:
                    one.run("dense", index)
                _install(model, of_block[index], journal.folder)
                for one in passes:
                    one.run("compressed", index)
            bar.advance()
            bar.step(f"block {index + 1} of {len(model)}")
    tokens = sum(window.shape[1] - 1 for window in held_out.windows)
    result: dict[str, Any] = {"text": held_out.name, "tokens": tokens}
    for name in _MODELS:
        result[name] = sum(one.loss(name) for one in passes) / tokens
        if not math.isfinite(result[name]):
            raise ValueError(
                f"the loss of the {name} model on {held_out.name} is NaN or infinite: weights are damaged, or the "
                "dtype is too narrow. Compress it with --dtype float32."
            )
        result[f"{name}_perplexity"] = math.exp(min(result[name], 700))
    for one in passes:
        one.remove()
    result["seconds"] = time.perf_counter() - started
    journal.commit(evaluation={**result, "digest": held_out.digest})
    return result


def _install(model: BlockModel, shard: Shard, folder: str) -> None:
    """Puts the clustered layers of a block, which is loaded, in the place of the dense ones."""
    for name, layer in read_matrices([shard], folder).items():
        dense: Any = model.model.get_submodule(name)
        parts = layer.codes, layer.codebook, layer.scale_in, layer.scale_out
        whole = ClusteredLinear.from_parts(*parts, dense.bias, layer.out_features, isinstance(dense, Conv1D))
        model.model.set_submodule(name, whole.to(model.device))


class _Pass:
    """Batches of one length on their way through both models, at the boundary of two blocks."""

    def __init__(
        self,
        model: BlockModel,
        weights: Mapping[str, Mapping[str, torch.Tensor]],
        batches: list[torch.Tensor],
        folder: str,
        number: int,
    ) -> None:
        self.model, self.weights, self.batches = model, weights, batches
        self.streams: dict[str, list[Stream]] = {}
        for name in _MODELS:
            with model.replaced(weights[name]):
                example = model.stem(batches[0])
                shape = [len(batch) for batch in batches], *example.shape[1:], model.dtype
                paths = [os.path.join(folder, f"{name}.held-out.{number}.{turn}") for turn in (0, 1)]
                self.streams[name] = [Stream(path, *shape) for path in paths]
                self.streams[name][0].write(model.stem(batch) for batch in batches)

    def run(self, name: str, index: int) -> None:
        """Block `index`, which is loaded."""
        now, then = self.streams[name][index % 2], self.streams[name][1 - index % 2]
        then.write(self.model.run(index, part.to(self.model.device)) for part in now)

    def loss(self, name: str) -> float:
        """Summed over the predicted tokens, in nats."""
        outputs = self.streams[name][len(self.model) % 2]
        with self.model.replaced(self.weights[name]):
            return sum(self.model.loss(batch, hidden) for batch, hidden in zip(self.batches, outputs, strict=True))

    def remove(self) -> None:
        for stream in (stream for streams in self.streams.values() for stream in streams):
            os.remove(stream.path)
