"""Codes for the dense layers of a model that is about to be adapted.

In a process group every process builds the same adapter, so the matrices are dealt out: each is clustered once, and
its codes are broadcast. They are those that one process would have made. Weights that ZeRO-3 partitioned are gathered
one by one for that, each process keeping those that it clusters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..codes import ClusterSpec
from ..compress.architecture import read_tokenizer, refuse_calibration
from ..compress.calibration.errors import CannotCalibrate
from ..compress.calibration.importance import input_importance
from ..compress.calibration.text import AUTO, BUILTIN, NONE
from ..dense import is_dense_linear, weight_of, weight_shape
from ..linear import ClusteredLinear
from ..placement import gathered, is_partitioned, is_whole
from .config import ClusCompConfig
from .planning import check_weight, spec_of

__all__ = ["Codes", "Importance", "cluster_layers", "empty_layer", "find_importance"]


class Codes(NamedTuple):
    """What an adapter on a dense weight needs: packed codes [in, width], uint8, None if they are to be loaded."""

    spec: ClusterSpec
    packed: torch.Tensor | None


class Importance(NamedTuple):
    """What calibration text says of the inputs of dense layers: E[x²], name to [in]. missing: Why it says nothing."""

    moments: Mapping[str, torch.Tensor]
    missing: str | None = None


def find_importance(model: nn.Module, layers: Mapping[str, nn.Module], config: ClusCompConfig) -> Importance:
    """Of the dense ones of the layers whose weights are in memory, by one pass of the model over a little text.

    Raises:
        ValueError: If `config.calibration` names a text that cannot be read, or that cannot calibrate the model.
    """
    dense = {name: layer for name, layer in layers.items() if is_dense_linear(layer)}
    if not dense or config.calibration == NONE:
        return Importance({}, 'calibration="none"')
    source = getattr(model, "name_or_path", "") or type(model).__name__
    try:
        if not isinstance(model, PreTrainedModel):
            raise CannotCalibrate(f"{source} is no model of transformers")
        refuse_calibration(model, source)
        if not all(is_whole(parameter) for layer in dense.values() for parameter in layer.parameters()):
            raise CannotCalibrate("this process does not have all of the weights")
        tokenizer = read_tokenizer(model.name_or_path) if model.name_or_path else None
        text = BUILTIN if config.calibration == AUTO else config.calibration
        return Importance(input_importance(model, tokenizer, source, dense, text))
    except CannotCalibrate as error:
        if config.calibration != AUTO:
            raise ValueError(f'{error.reason}; choose calibration="none".') from error
        return Importance({}, error.reason)


def cluster_layers(
    layers: Mapping[str, nn.Module], config: ClusCompConfig, importance: Mapping[str, torch.Tensor]
) -> dict[str, ClusteredLinear] | dict[str, Codes]:
    """Clusters the dense ones of the layers whose weights are in memory.

    Where `torch.distributed` is initialised, all processes have to call this, with the same model and config.

    Args:
        layers: Name to layer.
        config ([`ClusCompConfig`]): How.
        importance: E[x²] of the inputs of layers, name to [in], as far as it is known.

    Returns:
        `dict`: Name to `ClusteredLinear`, or with `base="dense"` to [`Codes`].

    Raises:
        ValueError: If the processes have different models, or weights have numbers that codebooks cannot hold.
    """
    dense = {name: layer for name, layer in layers.items() if is_dense_linear(layer)}
    here = {name: layer for name, layer in dense.items() if layer.weight.device.type != "meta"}
    rank, owners = _deal(list(dense), complete=len(here) == len(dense))
    mine = dict(here)
    for name, owner in owners.items():
        # Processes gather together and cluster apart, so what was partitioned is copied first.
        if name in here:
            mine[name] = _whole(name, here[name], config)
        if owner != rank:
            mine.pop(name, None)
    # disable=None: silent where nobody watches a terminal
    bar = tqdm(list(mine), desc="Clustering", unit="matrix", disable=None if mine else True)
    made = {name: _cluster(name, _whole(name, mine.pop(name), config), config, importance.get(name)) for name in bar}
    for name, owner in owners.items():
        product = made[name] if name in made else _blank(name, dense[name], config)
        for tensor in _tensors(product):
            _broadcast(tensor, owner)
        made[name] = product
    return made


def empty_layer(dense: nn.Module, spec: ClusterSpec, codebook_dtype: torch.dtype) -> ClusteredLinear:
    """A clustered layer in the shape of a dense one, NaN-filled, its bias shared."""
    out_features, in_features = weight_shape(dense)
    template = ClusteredLinear(in_features, out_features, spec, codebook_dtype=codebook_dtype, device="meta")
    parts = {
        key: None
        if value is None
        else torch.full_like(value, math.nan if value.is_floating_point() else 0, device=dense.weight.device)
        for key, value in template._parameters.items()
        if key != "bias"
    }
    return ClusteredLinear.from_parts(
        **parts,
        bias=dense.bias,
        out_features=out_features,
        conv1d=isinstance(dense, Conv1D),
        dtype=dense.weight.dtype,
    )


def _deal(names: list[str], complete: bool) -> tuple[int, dict[str, int]]:
    """This process, and which process clusters what; nothing is dealt out where there is one only."""
    if not names or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return 0, {}
    hands: list[tuple[list[str], bool]] = [([], False)] * dist.get_world_size()
    dist.all_gather_object(hands, (names, complete))
    if any(other != names for other, _ in hands):
        raise ValueError(
            f"the processes adapt different layers: {[len(other) for other, _ in hands]} dense ones on ranks 0 to "
            f"{len(hands) - 1}. Give all of them the same model and config."
        )
    able = [rank for rank, (_, has_weights) in enumerate(hands) if has_weights]
    return dist.get_rank(), dict(zip(names, cycle(able), strict=False)) if able else {}


def _whole(name: str, dense: nn.Module, config: ClusCompConfig) -> nn.Module:
    """The layer, or a copy that has all of its partitioned weight; for that all processes have to call this."""
    if not is_partitioned(dense.weight):
        return dense
    with gathered(dense.weight):
        check_weight(name, dense, config)
        whole = copy.copy(dense)
        weight = nn.Parameter(dense.weight.detach().clone(), requires_grad=False)
        whole._parameters = {**dense._parameters, "weight": weight}
    return whole


def _cluster(
    name: str, dense: nn.Module, config: ClusCompConfig, importance: torch.Tensor | None
) -> ClusteredLinear | Codes:
    spec = spec_of(name, dense, config)
    layer = config.policy.cluster(name, dense, spec, importance=importance)
    return layer if config.base == "clustered" else Codes(spec, layer.codes.detach())


def _blank(name: str, dense: nn.Module, config: ClusCompConfig) -> ClusteredLinear | Codes:
    """Room for what another process clusters."""
    spec = spec_of(name, dense, config)
    if config.base == "clustered":
        return empty_layer(dense, spec, config.policy.codebook_dtype_for(weight_of(dense)))
    out_features, in_features = weight_shape(dense)
    packed = torch.empty(in_features, spec.code_bytes(out_features), dtype=torch.uint8, device=dense.weight.device)
    return Codes(spec, packed)


def _tensors(product: ClusteredLinear | Codes) -> Iterable[torch.Tensor]:
    if isinstance(product, Codes):
        return [] if product.packed is None else [product.packed]
    return [value for key, value in product._parameters.items() if key != "bias" and value is not None]


def _broadcast(tensor: torch.Tensor, owner: int) -> None:
    """Overwrites the tensor by that of process `owner`; by way of the accelerator if the group talks there only."""
    data = tensor.detach()
    if data.device.type == "cpu" and "cpu:" not in dist.get_backend_config():
        data = data.to(torch.accelerator.current_accelerator())
    dist.broadcast(data, owner)
    if data.device != tensor.device:
        tensor.detach().copy_(data)
