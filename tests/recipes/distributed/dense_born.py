"""SFTTrainer with an adapter on a dense model, which `recipes/sft.py` would compress first.

    python tests/distributed/dense_born.py --kind clustered --model_name_or_path MODEL --dataset_name DATA …

`on_cpu.py` runs it on several processes. Flags of TRL's SFTConfig work.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer, TrlParser

from cluscomp_peft import ClusCompConfig


@dataclass
class Arguments:
    """Besides those of TRL."""

    model_name_or_path: str
    dataset_name: str
    kind: str = field(default="clustered", metadata={"help": "ClusCompConfig.base"})
    dtype: str = "float32"
    adapter: str | None = field(default=None, metadata={"help": "To go on with, instead of a new one."})


@dataclass
class OnCPU(SFTConfig):
    """Without autocast."""

    def __post_init__(self) -> None:
        self.bf16 = False
        super().__post_init__()


def main() -> None:
    arguments, training = TrlParser((Arguments, OnCPU)).parse_args_and_config()
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=arguments.dtype)
    config = None
    if arguments.adapter is None:
        config = ClusCompConfig(task_type="CAUSAL_LM", base=arguments.kind, group_size=3, num_clusters=12, scales=True)
    else:
        model = PeftModel.from_pretrained(model, arguments.adapter, is_trainable=True)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=load_dataset("json", data_files=arguments.dataset_name, split="train"),
        peft_config=config,
    )
    trainer.train()
    trainer.save_model(training.output_dir)
    trainer.save_state()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
