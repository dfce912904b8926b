"""The file of a saved adapter, held against what it has to be before the model that it is for is touched.

    for each layer                     shape                        held against
    cluscomp_delta.codebook            [m · n, g]                   the config: rank or num_blocks
    cluscomp_delta.scale_in, …out      [in], [out]                  there if and only if the config trains them
    cluscomp_code_digest               [16] uint8                   the codes, those of the file or of the model
    codes, base_layer.codes            [in, width] uint8            the layout, n, and the config's fingerprint
    base_layer.codebook, scale_…       [k, n, g], [in], [out]       the layout and the config's codebook_fingerprint

Shapes and dtypes come from the file's header. Codes and codebooks that the file brings are read too: nothing else
could tell that a bit of them has flipped. Deltas have no digest, but must be finite.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import ops
from ..clustered_weight import VALUES
from ..codes import ClusterSpec, combine_fingerprints, fingerprint, num_groups, value_fingerprint
from ..dense import is_dense_linear, weight_shape
from ..upstream.peft import FILE_PREFIX
from .config import ClusCompConfig, Source
from .loading import digest_bytes

__all__ = ["Entry", "check_file", "entries_of", "find_file", "layers_of", "read_entries"]

_FLOATS = ("F64", "F32", "F16", "BF16")
# Numbers that an adapter may have for each weight of a layer, where only its config says how many.
_NUMBERS_PER_WEIGHT = 64


class Entry(NamedTuple):
    """A tensor of a file: its shape, its dtype as safetensors writes it, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


def check_file(config: ClusCompConfig, layers: Mapping[str, nn.Module], specs: Mapping[str, ClusterSpec]) -> None:
    """Holds the file of a saved adapter against its config and the layers that it is about to be loaded into.

    Args:
        config: Read from the adapter; where it does not know from where, only sizes are checked.
        layers: Name to layer, of every layer it will adapt.
        specs: How the codes of each are stored.

    Raises:
        ValueError: If a tensor is missing, too much, of another shape or dtype, or not the one that was saved.
    """
    path = None if config.source is None else find_file(config.source, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if path is None:
        _check_sizes(config, layers, specs)
        return
    entries = read_entries(path)
    fingerprints, codebooks = [], []
    for name, layer in layers.items():
        out_features, in_features = _shape_of_layer(layer)
        found = entries_of(entries, name)
        wanted = _wanted(config, specs[name], in_features, out_features)
        for key, (shape, floats) in wanted.items():
            if key not in found:
                raise ValueError(
                    f"{path} has no {name}.{key}: it is incomplete or belongs to another model; copy or download the "
                    "adapter again."
                )
            _check_entry(path, f"{name}.{key}", found[key], shape, floats)
        optional = {"cluscomp_units.values": ((2,), True), "cluscomp_code_digest": ((16,), False)}
        for key, (shape, floats) in optional.items():
            if key in found:
                _check_entry(path, f"{name}.{key}", found[key], shape, floats)
        extra = [key for key in found if not (key in wanted or key in optional or key.endswith("bias"))]
        if extra:
            raise ValueError(
                f"{path} has {name}.{extra[0]}, of which its adapter_config.json says nothing: one of the two is "
                "damaged or belongs to another adapter. Copy or download the adapter again."
            )
        codes = next((key for key in ("base_layer.codes", "codes") if key in wanted), None)
        digest = found.get("cluscomp_code_digest")
        saved = None if digest is None else digest.read()
        if codes is None:
            fingerprints.append("" if saved is None or not saved.any() else bytes(saved.tolist()).hex())
        else:
            values = found[codes].read()
            _check_codes(f"{path}: {name}", values, out_features, specs[name])
            fingerprints.append(fingerprint(values, out_features, specs[name]))
            if saved is not None and saved.any() and not torch.equal(saved, digest_bytes(fingerprints[-1])):
                raise ValueError(_damaged(path, f"the codes of {name}"))
            parts = [found[f"base_layer.{key}"].read() for key in VALUES if f"base_layer.{key}" in wanted]
            codebooks.append(value_fingerprint(parts) if config.base == "clustered" else "")
    strangers = [name for name in layers_of(entries) if name not in layers]
    if strangers:
        raise ValueError(
            f"{path} has numbers for {strangers[0]} and {len(strangers) - 1} more layers that it would not be loaded "
            "into: the adapter was made for another model, or its target_modules were changed."
        )
    if all(fingerprints) and config.fingerprint != combine_fingerprints(fingerprints):
        if config.carries_codes:
            raise ValueError(_damaged(path, "the codes"))
        raise ValueError(
            f"{path} belongs to another base than adapter_config.json beside it: the digests of its codes are not "
            f"{config.fingerprint}. Copy or download the adapter again."
        )
    if config.carries_codes:
        if config.codebook_fingerprint not in (None, combine_fingerprints(codebooks)):
            raise ValueError(_damaged(path, "the codebooks or scales"))


def find_file(source: Source, names: Sequence[str]) -> str | None:
    """The path of the first of these files beside a config; None if there is none."""
    for name in names:
        path = os.path.join(source.place, source.subfolder, name)
        if os.path.isfile(path):
            return path
    for name in () if os.path.isdir(source.place) else names:
        try:
            return hf_hub_download(source.place, name, subfolder=source.subfolder or None, **source.download)
        except (OSError, ValueError):  # PEFT is about to ask for it too, and says what is wrong
            continue
    return None


def _check_sizes(config: ClusCompConfig, layers: Mapping[str, nn.Module], specs: Mapping[str, ClusterSpec]) -> None:
    """Raises a ValueError if a saved config, whose file is not at hand, asks for more numbers than a layer can use."""
    for name, layer in layers.items():
        out_features, in_features = _shape_of_layer(layer)
        wanted = _wanted(config, specs[name], in_features, out_features)
        count = sum(torch.Size(shape).numel() for shape, _ in wanted.values())
        if count > _NUMBERS_PER_WEIGHT * (in_features * out_features + 1024):
            raise ValueError(
                f"the adapter's config asks for {count} numbers in {name}, which has {in_features * out_features} "
                f"weights; more than {_NUMBERS_PER_WEIGHT} for each are of no use. The adapter_config.json is damaged "
                "or belongs to another model."
            )


def _check_codes(name: str, codes: torch.Tensor, out_features: int, spec: ClusterSpec) -> None:
    """Raises a ValueError if packed codes [in, width] name centroids that the codebook does not have."""
    if ops.has_stray_codes(codes, spec.num_clusters, num_groups(out_features, spec.group_size)):
        raise ValueError(
            f"{name}: codes name centroids beyond the {spec.num_clusters} of its codebook; the file is damaged, copy "
            "or download it again."
        )


def _shape_of_layer(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a dense or clustered layer, or one with adapters."""
    return weight_shape(layer) if is_dense_linear(layer) else (layer.out_features, layer.in_features)


def _wanted(
    config: ClusCompConfig, spec: ClusterSpec, in_features: int, out_features: int
) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Key inside the layer to the shape, and whether the numbers are floating-point ones."""
    blocks = config.blocks_of(spec, in_features, out_features)
    wanted: dict[str, tuple[tuple[int, ...], bool]] = {
        "cluscomp_delta.codebook": ((blocks * spec.num_clusters, spec.group_size), True)
    }
    sides = {"scale_in": (in_features,), "scale_out": (out_features,)}
    for (key, shape), trained in zip(sides.items(), config.scales_of(spec), strict=True):
        if trained:
            wanted[f"cluscomp_delta.{key}"] = (shape, True)
    if not config.carries_codes:
        return wanted
    codes = (in_features, spec.code_bytes(out_features))
    if config.base == "dense":
        return {**wanted, "codes": (codes, False)}
    wanted["base_layer.codes"] = (codes, False)
    wanted["base_layer.codebook"] = ((spec.num_blocks, spec.num_clusters, spec.group_size), True)
    for key, shape in sides.items():
        if getattr(spec, key):
            wanted[f"base_layer.{key}"] = (shape, True)
    return wanted


def read_entries(path: str) -> dict[str, Entry]:
    """The tensors of a file by name; none is read."""
    if not path.endswith(".safetensors"):
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return {key: _entry(tensor) for key, tensor in tensors.items()}
        except Exception as error:
            raise ValueError(_unreadable(path, error)) from error
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            parts = {key: file.get_slice(key) for key in keys}
            shapes = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(_unreadable(path, error)) from error

    def reader(key: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)

        return read

    return {key: Entry(*shapes[key], reader(key)) for key in keys}


def _entry(tensor: torch.Tensor) -> Entry:
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    dtype = "U8" if tensor.dtype == torch.uint8 else names.get(tensor.dtype, str(tensor.dtype))
    return Entry(tuple(tensor.shape), dtype, lambda: tensor)


def entries_of(entries: Mapping[str, Entry], name: str) -> dict[str, Entry]:
    """What the file has of a layer, by the key inside it; older files call the digest `code_digest`."""
    found = {}
    for key, entry in entries.items():
        bare = key.removeprefix(FILE_PREFIX)
        if bare.startswith(f"{name}."):
            leaf = bare.removeprefix(f"{name}.")
            found["cluscomp_code_digest" if leaf == "code_digest" else leaf] = entry
    return found


def layers_of(entries: Iterable[str]) -> list[str]:
    """The layers that the file has deltas of."""
    ending = ".cluscomp_delta.codebook"
    return [key.removeprefix(FILE_PREFIX).removesuffix(ending) for key in entries if key.endswith(ending)]


def _check_entry(path: str, name: str, entry: Entry, shape: tuple[int, ...], floats: bool) -> None:
    if entry.shape != shape or (entry.dtype in _FLOATS) != floats or (not floats and entry.dtype != "U8"):
        kind = "floating-point numbers" if floats else "U8"
        raise ValueError(
            f"{path}: {name} is {entry.dtype} {list(entry.shape)}, but the model and adapter_config.json ask for "
            f"{kind} {list(shape)}: the adapter is damaged or belongs to another model. Copy or download it again."
        )

    if floats and not bool(entry.read().isfinite().all()):
        raise ValueError(
            f"{path}: {name} has NaN or infinite numbers: the adapter is damaged, or its training diverged. Copy or "
            "download it again, or take an earlier checkpoint."
        )


def _damaged(path: str, what: str) -> str:
    return (
        f"{path} is damaged: {what} are not those that the adapter was saved with, by the digest that is beside them. "
        "Copy or download the adapter again."
    )


def _unreadable(path: str, error: Exception) -> str:
    return f"{path} is damaged or cut off ({error}); copy or download the adapter again."
