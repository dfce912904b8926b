"""Compressing by calibration text: activations pass from block to block, on disk, while the blocks are compressed.

    dense.0 ──► dense block i ──► dense.1               targets of block i, inputs of the dense block i + 1
    compressed.0 ──► compressed block i ──► compressed.1

A block needs what the one before it hands on, so blocks are compressed in turn, by one process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...codes import ClusterSpec
from ...linear import ClusteredLinear
from ...progress import Stages
from ..calibration.activations import Stream
from ..calibration.blocks import BlockModel
from ..calibration.inputs import BlockInputs
from ..matrix.block import BlockSettings, compress_block
from .journal import Journal

__all__ = ["CalibratedBlocks", "Calibration"]

_BATCH_TOKENS = 4096
_BATCHES = 8  # at least, where there are as many sequences: one of them is held out


@dataclass(frozen=True)
class Calibration:
    """Tokens to compress by, and the model that they pass through.

    Args:
        windows (`torch.Tensor`): [sequences, length] int64.
        blocks ([`BlockModel`], *optional*): The dense model; None where only the batches matter.
    """

    windows: torch.Tensor
    blocks: BlockModel | None = None

    @property
    def batches(self) -> list[torch.Tensor]:
        sequences, length = self.windows.shape
        return list(self.windows.split(max(1, min(_BATCH_TOKENS // length, sequences // _BATCHES))))

    @property
    def held_out(self) -> int:
        """Batches at the end that nothing is fitted to, as long as there are more: an eighth, one at least."""
        return max(1, len(self.batches) // 8)

    @property
    def fitted(self) -> list[torch.Tensor]:
        """The batches that codes and codebooks are fitted to."""
        return self.batches[: max(1, len(self.batches) - self.held_out)]


class CalibratedBlocks:
    """The blocks and the activations at their boundaries.

    Two files a stream, written in turn: what a block reads is never what it writes, so a block that was interrupted
    finds its inputs as they were.

    Args:
        journal ([`Journal`]): Of the folder that holds the streams; says whether they are there.
        calibration ([`Calibration`]): Tokens, and the model, a block of which is in memory at a time.
        outside (*optional*): Clustered layers outside of the blocks, by name: the activations of the compressed model
            begin with its own embeddings, and its loss is that of its own head.
    """

    def __init__(
        self, journal: Journal, calibration: Calibration, outside: Mapping[str, ClusteredLinear] | None = None
    ) -> None:
        assert calibration.blocks is not None
        self.model, self.calibration, self.outside = calibration.blocks, calibration, dict(outside or {})
        batches = calibration.batches
        self.held_out = calibration.held_out
        with torch.no_grad():
            # Also on resuming: the stem notes the arguments of the blocks, which differ by the size of a batch alone.
            example = self.model.stem(batches[0])
            self.model.stem(batches[-1])
        shape = ([len(batch) for batch in batches], *example.shape[1:], self.model.dtype)
        self.dense, self.compressed = (
            [Stream(os.path.join(journal.folder, f"{name}.{turn}"), *shape) for turn in (0, 1)]
            for name in ("dense", "compressed")
        )
        if "blocks_ready" not in journal.content:
            with torch.no_grad():
                self.dense[0].write(self.model.stem(batch) for batch in batches)
                with self.model.replaced(self._decoded()):
                    self.compressed[0].write(self.model.stem(batch) for batch in batches)
            journal.commit(blocks_ready=True)

    def compress(
        self, index: int, specs: dict[str, ClusterSpec], settings: BlockSettings, progress: Callable[[int], object]
    ) -> tuple[dict[str, ClusteredLinear], dict[str, Any]]:
        """Block `index`; afterwards the activations behind it are on disk. The report has seconds by stage."""
        now, then, stages = index % 2, 1 - index % 2, Stages()
        model, device = self.model, self.model.device
        with torch.no_grad(), model.loaded(index):
            originals = {name: model.model.get_submodule(name) for name in specs}
            fitted = max(1, len(self.dense[now]) - self.held_out)
            inputs = BlockInputs(model, index, originals, self.dense[now], fitted)
            with stages.stage("calibrating"):
                self.dense[then].write(inputs.outputs())
            layers: dict[str, ClusteredLinear] = {}
            report: dict[str, Any] = {}
            if specs:
                layers, report = compress_block(
                    model,
                    index,
                    specs,
                    inputs,
                    self.compressed[now],
                    self.dense[then],
                    self.held_out,
                    settings,
                    progress,
                    stages,
                )
            with stages.stage("calibrating"):
                self.compressed[then].write(model.run(index, part.to(device)) for part in self.compressed[now])
        return layers, {**report, "stages": stages.seconds}

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Next-token loss in nats on the batches that are held out, of the dense and the compressed model."""
        turn = len(self.model) % 2
        result: dict[str, float] = {}
        # A single block decides in which form the tail wants its output, and may not have run in this process.
        with self.model.loaded(len(self.model) - 1):
            self.model.run(len(self.model) - 1, self.dense[turn][0].to(self.model.device))
        for name, stream in (("dense", self.dense[turn]), ("compressed", self.compressed[turn])):
            with self.model.replaced(self._decoded() if name == "compressed" else {}):
                result[name] = self._loss(stream)
            if not math.isfinite(result[name]):
                raise ValueError(
                    f"the loss of the {name} model is NaN or infinite on the calibration text: weights outside the "
                    "blocks are damaged, or the dtype is too narrow. Compress it with --dtype float32, or calibrate "
                    "on other text."
                )
        return result

    def _loss(self, stream: Stream) -> float:
        """Mean over the tokens that are held out, of what comes behind the last block."""
        batches, total, tokens = self.calibration.batches, 0.0, 0
        for number in range(len(batches) - self.held_out, len(batches)):
            total += self.model.loss(batches[number], stream[number])
            tokens += batches[number][:, 1:].numel()
        return total / tokens

    def _decoded(self) -> dict[str, torch.Tensor]:
        """The weights of clustered layers outside of the blocks."""
        return {name: layer.decode(self.model.dtype) for name, layer in self.outside.items()}
