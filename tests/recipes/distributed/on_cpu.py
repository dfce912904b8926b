"""Runs a script whose `accelerate launch` asks for FSDP or DeepSpeed on processes without an accelerator.

    accelerate launch --config_file recipes/configs/accelerate/fsdp2.yaml --num_processes 2 \\
        tests/distributed/on_cpu.py recipes/sft.py …

accelerate turns to these engines only where it sees a GPU (or the like), although both work over gloo as well. This
tells its state of the processes and of the plugin that the launcher described; the rest is accelerate's own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import runpy
import signal
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer
from trl import SFTTrainer

from cluscomp_peft.placement import shape_of

_init, _prepare_backend = AcceleratorState.__init__, PartialState._prepare_backend


def _asked(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _init_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    fresh = AcceleratorState._shared_state == {}
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def _prepare_gloo(self: PartialState, cpu: bool = False, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return _prepare_backend(self, True, *args, **kwargs)


def enable() -> None:
    """Lets accelerate use the engine that the launcher's environment names."""
    if _asked("FSDP"):
        AcceleratorState.__init__ = _init_with_fsdp
    if _asked("DEEPSPEED"):
        import deepspeed

        PartialState._prepare_backend = _prepare_gloo
        # Reductions in shared memory, for processes on CPUs alone: a minute to compile, and nothing of ours.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def report(trainer: Any, folder: str) -> None:
    """Writes to FOLDER/rank*.json: bytes of codes in this process, their total, a digest of what is trained."""
    held = total = 0
    digest = hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            digest.update(_whole(parameter).cpu().numpy().tobytes())
        if name.endswith(".codes"):
            total += math.prod(shape_of(parameter))
            held += _held(parameter)
    rank = trainer.args.process_index
    facts = {"codes": held, "all_codes": total, "trained": digest.hexdigest(), "world": trainer.args.world_size}
    with open(os.path.join(folder, f"rank{rank}.json"), "w") as file:
        json.dump(facts, file)


def _held(parameter: torch.Tensor) -> int:
    """Bytes of a parameter's codes in this process."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    # ZeRO-3 leaves nothing in the parameter but where it is gathered.
    return parameter.numel() or parameter.ds_tensor.numel()


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, gathered; every process calls this."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def observe() -> None:
    """What the tests' variables ask for: ON_CPU_REPORT=folder, ON_CPU_KILL=rank:step."""
    train, compute_loss = Trainer.train, SFTTrainer.compute_loss
    folder, kill = os.environ.get("ON_CPU_REPORT"), os.environ.get("ON_CPU_KILL")

    def train_and_report(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        report(self, str(folder))
        return result

    def compute_loss_or_die(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        result = compute_loss(self, *args, **kwargs)
        if kill == f"{self.args.process_index}:{self.state.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    if folder:
        Trainer.train = train_and_report
    if kill:
        SFTTrainer.compute_loss = compute_loss_or_die


if __name__ == "__main__":
    enable()
    observe()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
