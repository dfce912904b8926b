"""`cluscomp finetune sft`: supervised finetuning by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from ..quiet import one_object
from .arguments import RunsAnywhere, parse
from .base import load_base
from .data import load_splits
from .training import train_and_save

__all__ = ["SFTArguments", "main"]


@dataclass
class SFTArguments(RunsAnywhere, SFTConfig):
    """TRL's `SFTConfig` with the rate and schedule that suit codebooks, and a loss on whole texts."""

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up, in steps or as a share of them."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first loss, which is the base's own."})
    completion_only_loss: bool | None = field(
        default=False,
        metadata={"help": "Train on completions alone. By default prompts count too, as in `cluscomp evaluate`."},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the job that the words of a command line describe.

    Raises:
        ValueError: If model, data and settings do not fit.
    """
    script, training = parse("sft", SFTArguments, arguments)
    with one_object(script.json) as result:
        train, test = load_splits(script)
        base = load_base(script, training.output_dir, conversations="messages" in train.column_names)
        result.update(train_and_save(SFTTrainer, script, training, base, train, test))
