"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..hf.config import ClusCompQuantizationConfig
from ..tuner.config import ClusCompConfig

__all__ = ["DTYPES", "ENGINES", "OPTIMIZERS", "Settings"]

OPTIMIZERS = ("adamw", "adamw_8bit")
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LEAST = {"seqlen": 2, "batch": 1, "rank": 1, "num_blocks": 1, "samples": 1, "world_size": 1, "tokens": 1, "flops": 1}
_KNOWN = {"dtype": tuple(DTYPES), "optimizer": OPTIMIZERS, "device": ("cuda", "cpu")}


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Args:
        bits (`float`, *optional*): True bits per weight, 1 … 8; 4 by default. A compressed model has its own.
        seqlen (`int`): Tokens of a sequence.
        batch (`int`): Sequences at once, on each device.
        dtype (`str`): Of activations and of what stays dense: "bfloat16", "float16" or "float32".
        rank (`int`): Capacity of the adapter, see [`ClusCompConfig`].
        num_blocks (`int`, *optional*): Delta codebooks of every matrix, instead of `rank`.
        optimizer (`str`): "adamw" or "adamw_8bit".
        gradient_checkpointing (`bool`): Keep the inputs of blocks only, and compute the rest again.
        chunked_loss (`bool`): The loss never holds the logits of all tokens.
        device (`str`): "cuda" or "cpu".
        samples (`int`): Calibration sequences of the compression.
        world_size (`int`): Devices that finetuning is spread over.
        tokens (`int`): Of the whole training, for its time.
        flops (`float`, *optional*): FLOP/s that one device does in training, where they are known.
        engine (`str`, *optional*): How: "ddp" (the default for several), "fsdp2", "zero2" or "zero3"; None for one.

    Raises:
        ValueError: If a value is out of range.
    """

    bits: float | None = None
    seqlen: int = 1024
    batch: int = 1
    dtype: str = "bfloat16"
    rank: int = ClusCompConfig.rank
    num_blocks: int | None = None
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    chunked_loss: bool = False
    device: str = "cuda"
    samples: int = 128
    world_size: int = 1
    engine: str | None = None
    tokens: int = 1_000_000
    flops: float | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.world_size > 1 and self.engine is None:
            object.__setattr__(self, "engine", ENGINES[0])
        elif self.engine is not None and self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}.")
        elif self.engine is not None and self.world_size == 1:
            raise ValueError(
                f"engine {self.engine} spreads finetuning over devices, and world_size is 1; give --world-size 2 or "
                "more, or leave out --engine."
            )
        if self.bits is not None:
            ClusCompQuantizationConfig(bits=self.bits)  # says what is wrong with it
