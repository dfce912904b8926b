"""What `sft.py` and `dpo.py` share: their arguments, the compressed base, the data, and what is written at the end."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.report.record import read_report
from cluscomp_peft.hf.evaluate import true_bits
from cluscomp_peft.placement import is_sharded

# For models that come without one: turns in plain text, an end-of-sequence token after each answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass
class ScriptArguments:
    """What the scripts take besides the arguments of TRL's trainer."""

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
    calibration: str = field(
        default="auto",
        metadata={"help": "Dense model: text to compress by: a file, builtin, none (default: builtin)."},
    )
    rank: int = field(
        default=ClusCompConfig.rank,
        metadata={"help": "The knob for capacity: about as many numbers as LoRA of this rank. Merging stores them."},
    )
    num_blocks: int | None = field(
        default=None, metadata={"help": "Delta codebooks of every matrix, instead of rank; 1 adds no bits."}
    )
    train_scales: bool | None = field(default=None, metadata={"help": "Train per-channel scales."})
    delta_scale: float | None = field(default=None, metadata={"help": "Unit of the deltas; by default what fits."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Layers to train (default: all)."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train whole."})
    merge: bool = field(default=False, metadata={"help": "Also write base + adapter as a model of its own."})

    def adapter_config(self) -> ClusCompConfig:
        """The adapter that these arguments ask for."""
        return ClusCompConfig(
            task_type="CAUSAL_LM",
            rank=self.rank,
            num_blocks=self.num_blocks,
            train_scales=self.train_scales,
            delta_scale=self.delta_scale,
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
        )


class RunsAnywhere:
    """Goes before a config of TRL among the bases: computes in the model's dtype where autocast would do harm.

    Without an accelerator the Trainer refuses bf16, which TRL asks for unless told otherwise. Engines that deal
    parameters out take it as leave to cast them: codebooks to bf16, which moves centroids, and the deltas.
    """

    def __post_init__(self) -> None:
        fsdp, deepspeed = (
            os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true" for engine in ("FSDP", "DEEPSPEED")
        )
        alone = not torch.accelerator.is_available()
        if alone:
            self.use_cpu = not deepspeed  # which finds the CPU by itself, and would be turned off
        if alone or fsdp or deepspeed:
            if self.bf16 and not alone:
                warnings.warn(
                    "bf16=True would make FSDP and DeepSpeed cast codebooks and deltas; False is used, and everything "
                    "is computed in the dtype of the model.",
                    stacklevel=2,
                )
            self.bf16 = bool(self.bf16) and alone
        super().__post_init__()


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


class Base(NamedTuple):
    """What an adapter is trained on: where it is, true bits per weight, and what was loaded from there."""

    path: str
    bits: float
    model: Any
    tokenizer: Any


def load_base(script: ScriptArguments, output_dir: str, conversations: bool) -> Base:
    """The compressed model to train, made in `output_dir/base` first if it is dense; for `conversations` with a
    tokenizer that has a chat template.
    """
    own = os.path.join(output_dir, "base")
    with PartialState().main_process_first():
        path = compressed_base(script, own)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if conversations and tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        if path == own:
            tokenizer.save_pretrained(path)  # evaluation on the base shall read conversations as training did
    model = AutoModelForCausalLM.from_pretrained(path, dtype=script.dtype)
    return Base(path, true_bits(model), model, tokenizer)


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
        text = None if script.calibration == "none" else os.path.basename(script.calibration)
        text = made.get("calibration") if text == "auto" else text
        wanted = {
            **quantization.to_dict(),
            "source": script.model_name_or_path,
            "dtype": script.dtype,
            "calibration": text,
        }
        for key in ("source", "dtype", "bits", "group_size", "num_clusters", "scales", "calibration"):
            if made.get(key) != wanted[key]:
                raise SystemExit(
                    f"{folder} was made with {key}={made.get(key)!r}, not {wanted[key]!r}; remove it or choose "
                    "another --output_dir."
                )
        return folder
    compress_checkpoint(
        script.model_name_or_path, folder, quantization, dtype=script.dtype, calibration=script.calibration
    )
    return folder


def load_splits(script: ScriptArguments) -> tuple[Dataset, Dataset | None]:
    """Data to train on and, if any are named, to evaluate on."""
    train = load_data(script.dataset_name, script.dataset_config, script.dataset_train_split)
    if script.dataset_test is None:
        return train, None
    if os.path.isfile(script.dataset_test):
        return train, load_data(script.dataset_test, None, "train")
    return train, load_data(script.dataset_name, script.dataset_config, script.dataset_test)


def load_data(name: str, config: str | None, split: str) -> Dataset:
    """A file, or a split of a data set of the hub."""
    if os.path.isfile(name):
        kind = "json" if name.removesuffix(".xz").endswith((".jsonl", ".json")) else "text"
        return load_dataset(kind, data_files=name, split="train")
    return load_dataset(name, name=config, split=split)


def train_and_save(trainer: Any, script: ScriptArguments, base: Base) -> None:
    """Trains, writes the adapter, the losses and, with `--merge`, the merged model, and says where they are."""
    folder = trainer.args.output_dir
    if trainer.accelerator.is_main_process:
        trainer.model.print_trainable_parameters()
        trainer.add_callback(ExplosionWarning())
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model(folder)
    trainer.save_state()
    done = [f"adapter in {folder}, base in {base.path} at {base.bits:.3f} true bits per weight"]
    if script.merge and trainer.accelerator.is_main_process:
        merged_dir = os.path.join(folder, "merged")
        merged = adapted(trainer, script, base).merge_and_unload(safe_merge=True)
        merged.save_pretrained(merged_dir)
        base.tokenizer.save_pretrained(merged_dir)
        done.append(f"merged in {merged_dir} at {true_bits(merged):.3f} true bits per weight")
    trainer.accelerator.print("\n".join(done))
    trainer.accelerator.end_training()


def adapted(trainer: Any, script: ScriptArguments, base: Base) -> PeftModel:
    """The trained model in one process: as it is, or loaded again where it is spread over several."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return model
    whole = AutoModelForCausalLM.from_pretrained(base.path, dtype=script.dtype)
    return PeftModel.from_pretrained(whole, trainer.args.output_dir)
