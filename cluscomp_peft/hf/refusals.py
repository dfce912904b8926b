"""What `from_pretrained` can be asked for and a clustered model cannot give, said before a weight is read; and what a
checkpoint may not hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..clustered_weight import ClusteredWeight
from ..compress.stream.headers import read_headers
from ..offloading import stored
from ..upstream.peft import has_tuner_layers
from ..upstream.transformers import tensor_parallel_size

__all__ = [
    "refuse_adapters",
    "refuse_non_finite",
    "refuse_offloading",
    "refuse_packed",
    "refuse_tensor_parallel",
    "refuse_training",
]


def refuse_adapters(names: Iterable[str]) -> None:
    """Raises a ValueError if one of the clustered layers of a model is the base of an adapter.

    Its deltas belong to codes; under them a dense weight would be no base that they can be added to.
    """
    for name in names:
        if name.rpartition(".")[2] == "base_layer":
            raise ValueError(
                f"{name.removesuffix('.base_layer')} has an adapter, which needs the codes: a model with adapters is "
                "not dequantized. Call merge_and_unload(), or unload() for the base alone, and dequantize() what it "
                "returns."
            )


def refuse_non_finite(layers: Iterable[tuple[str, ClusteredWeight]]) -> None:
    """Raises a ValueError if codebooks or scales that a checkpoint brought have NaN or infinite values."""
    for name, layer in layers:
        for key in ("codebook", "scale_in", "scale_out"):
            value = stored(layer, key)
            if value is not None and not value.is_meta and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{name}.{key} has NaN or infinite values in the checkpoint: it is damaged, or was merged with a "
                    "broken adapter. Download or compress it again."
                )


def refuse_offloading(device_map: Any) -> None:
    """Raises a ValueError if weights that are to be clustered while they load would be offloaded.

    Args:
        device_map: As `from_pretrained` got or inferred it; "auto" and the like pass, they are not resolved yet.
    """
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError(
            f"a model is clustered where it runs, but this device_map offloads a part of it (it names "
            f"{', '.join(sorted(devices))}). Compress the model once with `cluscomp compress`, which needs memory for "
            "one block at a time, and load the result with the same device_map."
        )


def refuse_packed(files: Iterable[str]) -> None:
    """Raises a ValueError if safetensors files hold weights in numbers of a byte or less, which clustering on the fly
    would take for plain ones: they are packed, or to be multiplied by scales. Masks are bytes too, and no weights.
    """
    for key, header in read_headers(path for path in files if path.endswith(".safetensors")).items():
        leaf = key.rpartition(".")[2]
        packed = header.dtype in ("U8", "I8") and ("weight" in leaf or leaf.endswith("_blocks"))
        if packed or header.dtype.startswith(("F8", "F4")):
            raise ValueError(
                f"{key} is {header.dtype} in the checkpoint, a packed format or one that takes scales; load the model "
                "as its own format has it, save it in bfloat16, and cluster that."
            )


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raises a ValueError if `from_pretrained` is about to cut the model's layers into pieces.

    A plan's "colwise" cuts outputs, which share codes in groups of g and lie packed across bytes: a piece would have
    to begin at a group and at a whole byte at once, and at an attention head too, in matrices whose g was chosen for
    their bits. transformers would leave such layers whole, load them, and fail in the first forward pass.
    """
    size = tensor_parallel_size(model.config)
    if size > 1:
        raise ValueError(
            f"a clustered model cannot be cut for tensor parallelism (tp_size={size}): its codes are packed in groups "
            'across the cuts. Leave tp_plan and tp_size out. To spread it over GPUs use device_map="auto" (one '
            "process); to train on several, FSDP2 or data parallelism."
        )


def refuse_training(model: nn.Module | None) -> None:
    """Raises a ValueError for a clustered model that a trainer is given without an adapter. Prompt tuning, which adds
    no layer, freezes all of its base."""
    if model is None or has_tuner_layers(model) or not any(p.requires_grad for p in model.parameters()):
        return
    raise ValueError(
        f"{type(model).__name__} is clustered and has no adapter, so a trainer has nothing to train: its codes and "
        "codebooks are frozen. Give it get_peft_model(model, ClusCompConfig()), or TRL's trainers "
        "peft_config=ClusCompConfig()."
    )
