"""Preference finetuning of codebooks by DPO (arXiv 2305.18290), in the style of TRL's own script.

    python recipes/dpo.py --model_name_or_path MODEL --bits 4 --dataset_name pairs.jsonl --output_dir out

MODEL is a compressed checkpoint, or a dense one, which is then compressed first, as in `sft.py`; usually what `sft.py
--merge` wrote. The data are a hub id or a .jsonl/.json file (also .xz) with `prompt`, `chosen` and `rejected`: texts,
or lists of messages. Every flag of TRL's DPOConfig works, from flags or `--config FILE.yaml`. What comes out is what
`sft.py` leaves: `out` (the adapter), `out/base` if MODEL was dense, `out/merged` with --merge.

    loss = −log σ(β · [log π(chosen) / π_ref(chosen) − log π(rejected) / π_ref(rejected)])

π is the model with the adapter, π_ref the same model with the adapter disabled: the codes are there once and serve
both, so the reference takes no memory at all, and the loss of the first step is ln 2 because an adapter starts as
nothing. (DPO without adapters holds a second model.) `rewards/margins` in the log is what the bracket times β is on
average; it starts at 0 and grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from finetuning import RunsAnywhere, ScriptArguments, load_base, load_splits, train_and_save
from trl import DPOConfig, DPOTrainer, TrlParser

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass
class TrainingArguments(RunsAnywhere, DPOConfig):
    """TRL's `DPOConfig` with the rate that is usual for adapters."""

    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up, in steps or as a share of them."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first loss, which is the base's own."})


def main() -> None:
    script, training = TrlParser((ScriptArguments, TrainingArguments)).parse_args_and_config()
    train, test = load_splits(script)
    for data in filter(None, (train, test)):
        # TRL also reads pairs without a prompt, and takes what they have in common for it.
        missing = [name for name in COLUMNS[1:] if name not in data.column_names]
        if missing:
            raise SystemExit(
                f"{script.dataset_name} has the columns {', '.join(data.column_names)}; DPO needs "
                f"{', '.join(COLUMNS)}. Rename what holds them; for texts without preferences use sft.py."
            )
    base = load_base(script, training.output_dir, conversations=isinstance(train[0]["chosen"], list))
    trainer = DPOTrainer(
        model=base.model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=base.tokenizer,
        peft_config=script.adapter_config(),
    )
    train_and_save(trainer, script, base)


if __name__ == "__main__":
    main()
