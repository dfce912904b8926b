"""The arguments of `cluscomp finetune sft` and `dpo`: ours, and every one of TRL's trainer, from flags or YAML."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import TrlParser

from ..quiet import watched
from ..tuner.config import ClusCompConfig
from ..usage import nearest, with_names

__all__ = ["Arguments", "RunsAnywhere", "parse"]


@dataclass
class Arguments:
    """What a job takes besides the arguments of TRL's trainer."""

    model_name_or_path: str = field(metadata={"help": "Compressed or dense model: a folder or hub id."})
    dataset_name: str = field(metadata={"help": "Hub id, or a .jsonl, .json or .txt file.", "aliases": ["--data"]})
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
    json: bool = field(
        default=False, metadata={"help": "One JSON object on standard output; the trainer's lines go to the other."}
    )

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

    bf16: bool | None
    dataloader_pin_memory: bool
    disable_tqdm: bool | None
    use_cpu: bool

    def __post_init__(self) -> None:
        fsdp, deepspeed = (
            os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true" for engine in ("FSDP", "DEEPSPEED")
        )
        alone = not torch.accelerator.is_available()
        if self.disable_tqdm is None and not watched():
            self.disable_tqdm = True  # a line for every log instead
        if alone:
            self.dataloader_pin_memory = False  # torch warns that there is nothing to pin it for
            self.use_cpu = not deepspeed  # which finds the CPU by itself, and would be turned off
        if alone or fsdp or deepspeed:
            if self.bf16 and not alone:
                warnings.warn(
                    "bf16=True would make FSDP and DeepSpeed cast codebooks and deltas; False is used, and everything "
                    "is computed in the dtype of the model.",
                    stacklevel=2,
                )
            self.bf16 = bool(self.bf16) and alone
        super().__post_init__()  # type: ignore[misc]


def parse(kind: str, training: Any, arguments: Sequence[str] | None = None) -> tuple[Arguments, Any]:
    """Arguments of a job, and those of its trainer.

    Args:
        kind (`str`): Of the job, as the command calls it.
        training: Dataclass of the trainer's arguments.
        arguments (sequence of `str`, *optional*): Words of the command line; those before the first flag are the model
            and the output folder. By default those of this process.

    Raises:
        SystemExit: With status 2, if they cannot be understood; the usage and the nearest flag are printed.
    """
    classes: Any = (Arguments, training)  # HfArgumentParser's annotation names one class only
    parser = TrlParser(
        classes,
        prog=f"cluscomp finetune {kind}",
        usage=f"cluscomp finetune {kind} MODEL OUT --data FILE [--config FILE.yaml] [--FLAG VALUE ...]",
        description=f"Flags are those below, of which most are TRL's own ({training.__mro__[2].__name__}).",
    )
    words = None if arguments is None else with_names(arguments, "--model_name_or_path", "--output_dir")
    script, settings, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    if unknown:
        known = re.findall(r"--[\w-]+", parser.format_help())
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(unknown[0], known)}")
    return script, settings
