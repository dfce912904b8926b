"""`cluscomp finetune dpo`: preferences (arXiv 2305.18290) by TRL's DPOTrainer, on the adapter's own base as reference.

    loss = −log σ(β · [log π(chosen) / π_ref(chosen) − log π(rejected) / π_ref(rejected)])

π is the model with the adapter, π_ref the same model with the adapter disabled: the codes are there once and serve
both, so the reference takes no memory at all, and the loss of the first step is ln 2 because an adapter starts as
nothing. (DPO without adapters holds a second model.) `rewards/margins` in the log is what the bracket times β is on
average; it starts at 0 and grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import DPOConfig, DPOTrainer

from ..quiet import one_object
from .arguments import RunsAnywhere, parse
from .base import load_base
from .data import load_splits
from .training import train_and_save

__all__ = ["DPOArguments", "main"]

_COLUMNS = ("prompt", "chosen", "rejected")


@dataclass
class DPOArguments(RunsAnywhere, DPOConfig):
    """TRL's `DPOConfig` with the rate that is usual for adapters."""

    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up, in steps or as a share of them."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first loss, which is the base's own."})


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the job that the words of a command line describe.

    Raises:
        ValueError: If model, data and settings do not fit.
    """
    script, training = parse("dpo", DPOArguments, arguments)
    with one_object(script.json) as result:
        train, test = load_splits(script)
        for data in filter(None, (train, test)):
            # TRL also reads pairs without a prompt, and takes what they have in common for it.
            if any(name not in data.column_names for name in _COLUMNS[1:]):
                raise ValueError(
                    f"{script.dataset_name} has the columns {', '.join(data.column_names)}; DPO needs "
                    f"{', '.join(_COLUMNS)}. Rename what holds them; for texts without preferences use sft."
                )
        base = load_base(script, training.output_dir, conversations=isinstance(train[0]["chosen"], list))
        result.update(train_and_save(DPOTrainer, script, training, base, train, test))
