"""Runs a script whose `accelerate launch` asks for FSDP or DeepSpeed on processes without an accelerator.

    accelerate launch --config_file recipes/configs/accelerate/fsdp2.yaml --num_processes 2 \\
        tests/distributed/on_cpu.py recipes/sft.py …

accelerate turns to these engines only where it sees a GPU (or the like), although both work over gloo as well. This
tells its state of the processes and of the plugin that the launcher described; the rest is accelerate's own.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

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
        PartialState._prepare_backend = _prepare_gloo


if __name__ == "__main__":
    enable()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
