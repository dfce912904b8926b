"""What a dense checkpoint says it is: the class that config.json names, its tokenizer, its generation settings.

Which matrices a model has, and what they are called, depends on the class: BART read as a decoder has no encoder, and
BERT read as a language model a head that its checkpoint lacks. So the class is the one that `architectures` names, and
everything that can fail is read before any work is done.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from ..upstream.transformers import build_from_config, causal_class_name
from .calibration.errors import CannotCalibrate

__all__ = [
    "check_generation_config",
    "empty_model",
    "model_class",
    "read_tokenizer",
    "refuse_calibration",
    "refuse_evaluation",
    "stored_dtype",
    "write_generation_config",
]

_GENERATION = "generation_config.json"


def model_class(config: Any, source: str) -> Any:
    """The class that a config names; where it names none, the causal language model of its type.

    Raises:
        ValueError: If transformers has no such class.
    """
    # Only now: transformers imports the quantizer, which imports this module, before it has any model.
    from transformers import PreTrainedModel

    names = list(getattr(config, "architectures", None) or [])
    if not names:
        name = causal_class_name(config.model_type)
        if name is None or getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"config.json of {source} names no class in `architectures`, and a model of type {config.model_type} "
                "may be of several; add the one that its weights were saved with."
            )
        names = [name]
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"config.json of {source} names the class {names[0]!r}, which transformers {transformers.__version__} "
            "does not have; models with code of their own cannot be compressed."
        )
    kind: type = found.config_class  # type: ignore[attr-defined]
    if not isinstance(config, kind):
        raise ValueError(
            f"config.json of {source} is of a {config.model_type} model, but names the class {found.__name__}, which "
            f"is made from a {kind.__name__}; it was changed, or belongs to other weights."
        )
    return found


def empty_model(config: Any, source: str) -> Any:
    """The model of a config with its parameters on the meta device and real buffers. The config stays as it is: some
    classes change the one that they are given."""
    made = model_class(config, source)
    with init_empty_weights(include_buffers=False):
        return build_from_config(made, config)


def read_tokenizer(source: str) -> Any:
    """The tokenizer of a model; None if it has none that can be read here."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception:
        return None  # of sounds or images, or of token ids alone; only calibration text would need one


def refuse_calibration(model: Any, source: str) -> None:
    """Raises [`CannotCalibrate`] for a model that does not continue text: calibration predicts the next token."""
    if getattr(model.config, "is_encoder_decoder", False):
        what = "is an encoder and a decoder"
    elif not model.can_generate():
        what = "does not predict next tokens"
    elif model.main_input_name != "input_ids":
        what = f"reads {model.main_input_name} instead of text"
    else:
        return
    raise CannotCalibrate(f"{type(model).__name__} of {source} {what}, so text cannot calibrate it")


def refuse_evaluation(
    config: Any, source: str, why: str = "evaluate measures the loss of a decoder that predicts next tokens"
) -> None:
    """Raises a ValueError, which says `why`, for a model that does not predict next tokens."""
    made = model_class(config, source)
    if getattr(config, "is_encoder_decoder", False) or not made.can_generate():
        raise ValueError(f"{source} is a {made.__name__}, but {why}.")


def check_generation_config(folder: str) -> None:
    """Raises a ValueError if the generation settings of a folder are no JSON object."""
    path = os.path.join(folder, _GENERATION)
    if not os.path.lexists(path):
        return
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("it is no file")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); mend or remove it.") from error


def write_generation_config(model: Any, folder: str, work: str) -> None:
    """The settings of the source as they are, or those that config.json implies."""
    path = os.path.join(folder, _GENERATION)
    if os.path.exists(path):
        shutil.copyfile(path, os.path.join(work, _GENERATION))
    elif getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(work)


def stored_dtype(dtype: str, config: Any, dense: Any) -> torch.dtype:
    """Of what stays dense: the one asked for, that of the config, or the one of most bytes."""
    if dtype != "auto":
        return getattr(torch, dtype)
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    sizes: dict[torch.dtype, int] = {}
    for key, kind in dense.dtypes.items():
        if kind.is_floating_point:
            sizes[kind] = sizes.get(kind, 0) + dense.num_bytes(key)
    return max(sizes, key=lambda kind: sizes[kind])
