"""The compressed model that a job trains an adapter on, made of a dense one first where that is what it was given."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..compress.checkpoint import compress_checkpoint
from ..compress.report.record import read_report
from ..compress.report.verdict import verdict
from ..compress.stream.headers import check_folder
from ..hf.config import ClusCompQuantizationConfig
from ..hf.evaluate import true_bits
from .arguments import Arguments

__all__ = ["Base", "load_base"]

# For models that come without one: turns in plain text, an end-of-sequence token after each answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_SETTINGS = ("source", "dtype", "bits", "group_size", "num_clusters", "scales", "calibration")


class Base(NamedTuple):
    """What an adapter is trained on: where it is, true bits per weight, and what was loaded from there."""

    path: str
    bits: float
    model: Any
    tokenizer: Any


def load_base(script: Arguments, output_dir: str, conversations: bool) -> Base:
    """The compressed model to train, made in `output_dir/base` first if it is dense.

    Args:
        script ([`Arguments`]): Which model, and how to compress a dense one.
        output_dir (`str`): Of the job.
        conversations (`bool`): Give the tokenizer a chat template if it has none.

    Raises:
        ValueError: If `output_dir/base` was made with other settings, or the model cannot be read or compressed.
    """
    own = os.path.join(output_dir, "base")
    with PartialState().main_process_first():
        path = _compressed(script, own)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if conversations and tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        if path == own:
            tokenizer.save_pretrained(path)  # evaluation on the base shall read conversations as training did
    model = AutoModelForCausalLM.from_pretrained(path, dtype=script.dtype)
    return Base(path, true_bits(model), model, tokenizer)


def _compressed(script: Arguments, folder: str) -> str:
    """The compressed checkpoint to train: the model itself, or what is made of a dense one in `folder`."""
    source = script.model_name_or_path
    check_folder(source)
    if getattr(AutoConfig.from_pretrained(source), "quantization_config", None) is not None:
        return source
    config = ClusCompQuantizationConfig(
        bits=script.bits, group_size=script.group_size, num_clusters=script.num_clusters, scales=script.scales
    )
    if os.path.isdir(folder):
        _refuse_another(script, config, folder)
        return folder
    summary = compress_checkpoint(source, folder, config, dtype=script.dtype, calibration=script.calibration)
    for line in (line for lines in verdict(summary, summary["losses"], folder) for line in lines):
        print(line)
    return folder


def _refuse_another(script: Arguments, config: ClusCompQuantizationConfig, folder: str) -> None:
    """A run that was interrupted or is repeated has its base already, if that was made with the same settings."""
    made = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) or {}
    made = {**made, **read_report(folder)["summary"]}
    text = None if script.calibration == "none" else os.path.basename(script.calibration)
    text = made.get("calibration") if text == "auto" else text
    given = {"source": script.model_name_or_path, "dtype": script.dtype, "calibration": text}
    wanted = {**config.to_dict(), **given}
    for key in _SETTINGS:
        if made.get(key) != wanted[key]:
            raise ValueError(
                f"{folder} was made with {key}={made.get(key)!r}, not {wanted[key]!r}; remove it or choose another "
                "--output_dir."
            )
