"""From a trainer of TRL to files: the adapter, its losses, and where it is asked for the merged model."""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from ..compress.report.card import adapter_card, license_of
from ..compress.report.record import read_report
from ..compress.stream.folder import write_text
from ..export.merged import CARD_NAME, MERGED, write_merged
from ..hf.evaluate import true_bits
from ..placement import is_sharded
from .arguments import Arguments
from .base import Base

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ExplosionWarning", "train_and_save"]

_MORE = 0.05  # true bits that merging adds and that need no word


class ExplosionWarning(TrainerCallback):
    """Says what to do when the loss goes up instead of down.

    The first loss that is logged is the base's own, because an adapter starts as nothing (`logging_first_step`); after
    it every logged loss is held against that one. Batches differ, so only half as much again counts, and 0.5 nats.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._told = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None or self._told:
            return
        loss = float(loss)
        if self._first is None and math.isfinite(loss):
            self._first = loss
        first = math.nan if self._first is None else self._first
        if loss <= 1.5 * abs(first) + 0.5:
            return
        self._told = True
        warnings.warn(
            f"the loss was {first:.3g} at first and is {loss:.3g} after {state.global_step} steps: they are too long "
            f"for this model and data. Stop, and start again with --learning_rate {args.learning_rate / 4:.1g}; "
            "larger batches (--gradient_accumulation_steps) and a longer warm-up (--warmup_steps 0.2) help as well.",
            stacklevel=2,
        )


def train_and_save(
    kind: Any, script: Arguments, settings: Any, base: Base, train: Dataset, test: Dataset | None
) -> dict[str, Any]:
    """Trains, writes the adapter, the losses and, with `--merge`, the merged model, and says where they are.

    Args:
        kind: Class of TRL's trainer.
        script ([`Arguments`]): Of the job.
        settings: Arguments of the trainer.
        base ([`Base`]): What the adapter is trained on.
        train, test: Data to train on and, if any, to evaluate on.

    Returns:
        `dict`: adapter, base and merged (folders; merged is None without `--merge`), true_bits of the base and
        merged_bits (of the model that merging makes), trained (numbers), steps, and what the trainer measured:
        train_loss, eval_loss (None where nothing was evaluated), seconds. Empty in all processes but the first.
    """
    trainer = kind(
        model=base.model,
        args=settings,
        train_dataset=train,
        eval_dataset=test,
        processing_class=base.tokenizer,
        peft_config=script.adapter_config(),
    )
    folder, merged_dir, after, trained = settings.output_dir, None, base.bits, 0
    if trainer.accelerator.is_main_process:
        trainer.model.print_trainable_parameters()
        trained = trainer.model.get_nb_trainable_parameters()[0]
        after = true_bits(trainer.accelerator.unwrap_model(trainer.model))
        if after > base.bits + _MORE:
            print(
                f"merging will store {after:.3f} true bits per weight, {base.bits:.3f} are those of the base: lower "
                "--rank, or --num_blocks 1 adds none"
            )
        trainer.add_callback(ExplosionWarning())
    metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    trainer.save_model(folder)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        _write_card(trainer, base)
    done = [f"adapter in {folder}, base in {base.path} at {base.bits:.3f} true bits per weight"]
    if script.merge and trainer.accelerator.is_main_process:
        merged_dir = os.path.join(folder, "merged")
        merged = _whole(trainer, script, base).merge_and_unload(safe_merge=True)
        write_merged(merged, base.tokenizer, merged_dir, _name_of(merged_dir), base.path, MERGED)
        done.append(f"merged in {merged_dir} at {true_bits(merged):.3f} true bits per weight")
    trainer.accelerator.print("\n".join(done))
    trainer.accelerator.end_training()
    if not trainer.accelerator.is_main_process:
        return {}
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "adapter": folder,
        "base": base.path,
        "merged": merged_dir,
        "true_bits": base.bits,
        "merged_bits": after,
        "trained": trained,
        "steps": trainer.state.global_step,
        "train_loss": metrics.get("train_loss"),
        "eval_loss": evaluated[-1] if evaluated else None,
        "seconds": metrics.get("train_runtime"),
    }


def _whole(trainer: Any, script: Arguments, base: Base) -> PeftModel:
    """The trained model in one process: as it is, or loaded again where it is spread over several."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return model
    whole = AutoModelForCausalLM.from_pretrained(base.path, dtype=script.dtype)
    return PeftModel.from_pretrained(whole, trainer.args.output_dir)


def _write_card(trainer: Any, base: Base) -> None:
    """The adapter's card, in the place of PEFT's, which would name a folder of this machine as the base."""
    folder = trainer.args.output_dir
    summary = read_report(base.path)["summary"] if os.path.isdir(base.path) else {}
    story = f"It was trained by {type(trainer).__name__} for {trainer.state.global_step} steps."
    card = adapter_card(_name_of(folder), base.path, base.bits, summary, story, license_of(base.path))
    write_text(os.path.join(folder, CARD_NAME), card)


def _name_of(folder: str) -> str:
    return os.path.basename(os.path.abspath(folder))
