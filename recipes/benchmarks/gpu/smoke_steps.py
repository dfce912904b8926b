"""The steps of smoke.py: what users do with a model, each from the saved checkpoint on, so that none needs another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import smoke_serving
import smoke_training
from harness import environment
from report import Report
from smoke_base import Steps
from timing import forget_peak, quiet

# What compiles for long comes last.
ALL: tuple[Callable[[Steps], dict], ...] = (
    smoke_training.kernels_run,
    smoke_training.load,
    smoke_training.train,
    smoke_training.train_twice,
    smoke_training.merge,
    smoke_training.save_and_load_an_adapter,
    smoke_training.two_adapters,
    smoke_serving.capture_a_layer,
    smoke_serving.capture_a_training_layer,
    smoke_serving.generate,
    smoke_training.scale_gradients_in_fp16,
    smoke_serving.offload_to_the_host,
    smoke_training.cluster_on_the_device,
    smoke_serving.compile_a_layer,
    smoke_serving.compile_the_model,
    smoke_serving.generate_with_a_static_cache,
)


def run(device: str, folder: str, report: Report, names: list[str] | None) -> None:
    """All steps, or those named."""
    quiet()
    report.note(environment=environment(device))
    steps = Steps(device, Path(folder))
    known = {step.__name__.replace("_", " "): step for step in ALL}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"no such steps: {', '.join(unknown)}; there are {', '.join(known)}.")
    for name, step in known.items():
        if names is None or name in names:
            report.run(name, lambda step=step: step(steps))
            forget_peak(device)
