"""What the steps of smoke.py share: a device, a checkpoint, and a few questions to a model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from random_models import Shape, build, prepare, random_tokens, save_checkpoint, train_step
from timing import is_cuda
from torch import nn
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusteredLinear

METHOD = "cluscomp-4"
LARGE = Shape(hidden=2048, intermediate=5632, layers=6, heads=16, kv_heads=4, vocab=32000)
SMALL = Shape(hidden=512, intermediate=1024, layers=1, heads=4, kv_heads=2, vocab=256)
TINY = Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocab=128)
LENGTHS = (1, 5, 40, 100)  # one token, several in the kernels of few, and so many that the weight is decoded


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


class Steps:
    """A device, a compressed checkpoint, and what the steps share."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self.shape = LARGE if is_cuda(device) else TINY

    @cached_property
    def checkpoint(self) -> str:
        """A clustered random model on disk; an earlier process may have left it."""
        path, unfinished = self.folder / "model", self.folder / "unfinished"
        if not path.exists():
            save_checkpoint(build(self.shape, METHOD, self.device), METHOD, unfinished)
            unfinished.rename(path)
        return str(path)

    def load(self, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
        settings = {"device_map": self.device, **settings}
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype, **settings)

    def tokens(self, length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        return random_tokens(self.shape, batch, length, self.device)

    def trained(self, steps: int = 3) -> tuple[Any, list[float]]:
        """A model with an adapter after a few checkpointed steps in bf16, and the losses."""
        model, optimizer = prepare(self.load(), METHOD, checkpointing=True)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        losses = [train_step(model, optimizer, self.tokens(96, 2)) for _ in range(steps)]
        return model, [float(loss) for loss in losses]


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    return model(input_ids=tokens, use_cache=False).logits


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def clustered(model: nn.Module) -> list[ClusteredLinear]:
    return [module for module in model.modules() if isinstance(module, ClusteredLinear)]
