"""Supervised finetuning of codebooks, in the style of TRL's own script: a YAML config, flags, or both.

    python recipes/sft.py --model_name_or_path MODEL --bits 4 --dataset_name train.jsonl --output_dir out
    python recipes/sft.py --config recipes/configs/small_cpu.yaml --learning_rate 1e-4

MODEL is a compressed checkpoint, or a dense one (folder or hub id), which is then compressed while it loads and kept
in `out/base`. The data are a hub id or a .jsonl/.json/.txt file (also .xz) with `text`, `messages`, or `prompt` and
`completion`. Every flag of TRL's SFTConfig works. What comes out:

    out/base            the compressed model, if MODEL was dense       cluscomp evaluate out/base --data valid.jsonl
    out                 the adapter                                    cluscomp evaluate out/base --adapter out …
    out/merged          with --merge: base + adapter, still compressed
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.hf.checkpoint import read_report
from cluscomp_peft.hf.compression import compress_checkpoint
from cluscomp_peft.hf.evaluate import true_bits

# For models that come without one: turns in plain text, an end-of-sequence token after each answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass
class ScriptArguments:
    """What this script takes besides TRL's `SFTConfig`."""

    model_name_or_path: str = field(metadata={"help": "Compressed or dense model: a folder or hub id."})
    dataset_name: str = field(metadata={"help": "Hub id, or a .jsonl, .json or .txt file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test: str | None = field(default=None, metadata={"help": "File or split to evaluate on."})
    dtype: str = field(default="auto", metadata={"help": "dtype of what is not clustered: auto, bfloat16, float32."})
    bits: float | None = field(default=None, metadata={"help": "Dense model: true bits per weight (default 4)."})
    group_size: int | None = field(default=None, metadata={"help": "Dense model: weights per code."})
    num_clusters: int | None = field(default=None, metadata={"help": "Dense model: centroids per codebook."})
    scales: bool | None = field(default=None, metadata={"help": "Dense model: store per-channel scales."})
    num_blocks: int = field(
        default=4,
        metadata={
            "help": "Delta codebooks per matrix: the knob for capacity. Merging stores them all; 1 adds no bits."
        },
    )
    train_scales: bool | None = field(default=None, metadata={"help": "Train per-channel scales."})
    delta_scale: float = field(default=ClusCompConfig.delta_scale, metadata={"help": "Unit of the deltas."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Layers to train (default: all)."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train whole."})
    merge: bool = field(default=False, metadata={"help": "Also write base + adapter as a model of its own."})


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's `SFTConfig` with the rate and schedule that suit codebooks, and a loss on whole texts."""

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up, in steps or as a share of them."})
    completion_only_loss: bool | None = field(
        default=False,
        metadata={"help": "Train on completions alone. By default prompts count too, as in `cluscomp evaluate`."},
    )

    def __post_init__(self) -> None:
        # TRL asks for bf16 unless told otherwise, which the Trainer refuses on a machine without an accelerator.
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = False if self.bf16 is None else self.bf16
        super().__post_init__()


def main() -> None:
    script, training = TrlParser((ScriptArguments, TrainingArguments)).parse_args_and_config()
    train = load_data(script.dataset_name, script.dataset_config, script.dataset_train_split)
    test = None
    if script.dataset_test is not None:
        is_file = os.path.isfile(script.dataset_test)
        test = (
            load_data(script.dataset_test, None, "train")
            if is_file
            else load_data(script.dataset_name, script.dataset_config, script.dataset_test)
        )
    own_base = os.path.join(training.output_dir, "base")
    with PartialState().main_process_first():
        base = compressed_base(script, own_base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if "messages" in train.column_names and tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        if base == own_base:
            tokenizer.save_pretrained(base)  # evaluation on the base shall read conversations as training did
    model = AutoModelForCausalLM.from_pretrained(base, dtype=script.dtype)
    base_bits = true_bits(model)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=ClusCompConfig(
            task_type="CAUSAL_LM",
            num_blocks=script.num_blocks,
            train_scales=script.train_scales,
            delta_scale=script.delta_scale,
            target_modules=script.target_modules,
            modules_to_save=script.modules_to_save,
        ),
    )
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    done = [f"adapter in {training.output_dir}, base in {base} at {base_bits:.3f} true bits per weight"]
    if script.merge:
        merged_dir = os.path.join(training.output_dir, "merged")
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload(safe_merge=True)
        merged.save_pretrained(merged_dir)
        tokenizer.save_pretrained(merged_dir)
        done.append(f"merged in {merged_dir} at {true_bits(merged):.3f} true bits per weight")
    trainer.accelerator.print("\n".join(done))


def compressed_base(script: ScriptArguments, folder: str) -> str:
    """The compressed checkpoint to train: the model itself, or what is made of a dense one in `folder`."""
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    if getattr(config, "quantization_config", None) is not None:
        return script.model_name_or_path
    quantization = ClusCompQuantizationConfig(
        bits=script.bits, group_size=script.group_size, num_clusters=script.num_clusters, scales=script.scales
    )
    if os.path.isdir(folder):
        # A run that was interrupted or is repeated: the base is there already, if it was made with these settings.
        made = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) or {}
        made = {**made, **read_report(folder)["summary"]}
        wanted = {**quantization.to_dict(), "source": script.model_name_or_path, "dtype": script.dtype}
        for key in ("source", "dtype", "bits", "group_size", "num_clusters", "scales"):
            if made.get(key) != wanted[key]:
                raise SystemExit(
                    f"{folder} was made with {key}={made.get(key)!r}, not {wanted[key]!r}; remove it or choose "
                    "another --output_dir."
                )
        return folder
    compress_checkpoint(script.model_name_or_path, folder, quantization, dtype=script.dtype)
    return folder


def load_data(name: str, config: str | None, split: str) -> Dataset:
    """A file, or a split of a data set of the hub."""
    if os.path.isfile(name):
        kind = "json" if name.removesuffix(".xz").endswith((".jsonl", ".json")) else "text"
        return load_dataset(kind, data_files=name, split="train")
    return load_dataset(name, name=config, split=split)


if __name__ == "__main__":
    main()
