"""How a checkpoint is split into shards: one for each decoder block, then pieces of everything else.

A [`Shard`] describes a file before it is made: names, shapes and specs, no weights and no model. It is small, so that
it can be sent to another process, which reads the weights itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...codes import ClusterSpec
from ...dense import weight_of
from ...upstream.transformers import tied_weights
from ..calibration.blocks import find_blocks
from .source import DenseCheckpoint

__all__ = ["Matrix", "Shard", "read_matrix", "split_into_shards"]

_SHARD_BYTES = 1 << 26  # of tensors outside the blocks; one tensor may be larger


@dataclass(frozen=True)
class Matrix:
    """A weight that is clustered.

    Args:
        name (`str`): Of the layer in the model.
        key (`str`): Of the weight in the checkpoint.
        spec ([`ClusterSpec`]): How it is stored.
        shape (`tuple[int, int]`): [out, in].
        conv1d (`bool`): The checkpoint holds it as [in, out].
    """

    name: str
    key: str
    spec: ClusterSpec
    shape: tuple[int, int]
    conv1d: bool

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Shard:
    """What one file of the compressed checkpoint will hold.

    Args:
        file (`str`): Its name.
        keys (`list[str]`): Of the tensors of the source that go into it.
        matrices (`list[Matrix]`): Those of them that are clustered, in the order of the model.
        index (`int`, *optional*): Of the block, if it is one. block (`str`, *optional*): The name of that block.
    """

    file: str
    keys: list[str]
    matrices: list[Matrix]
    index: int | None = None
    block: str | None = None

    @property
    def weights(self) -> int:
        """Weights that are clustered."""
        return sum(matrix.weights for matrix in self.matrices)


def split_into_shards(model: nn.Module, source: DenseCheckpoint, specs: dict[str, ClusterSpec]) -> list[Shard]:
    """A shard for each block, in the order of the model, then shards of everything else.

    Blocks that have no tensor of their own, because they share those of other blocks, get no shard. A weight that is
    stored once more under the name of a layer tied to it is left out where it is clustered.

    Raises:
        ValueError: If the checkpoint lacks a weight that `specs` names, or holds two for layers that are tied.
    """
    twice = _stored_twice(model, source, specs)
    found = find_blocks(model)
    owners: dict[str, int] = {}
    if found is not None:
        prefix, blocks = found
        for index, block in enumerate(blocks):
            for name in block.state_dict():
                key = source.find(f"{prefix}.{index}.{name}")
                for held in [] if key is None else [key, *source.keys_of(key)]:
                    owners[held] = index
    matrices = [_matrix(model, source, name, spec) for name, spec in specs.items()]
    count = 0 if found is None else len(found[1])
    parts: dict[int | None, list[list[str]]] = {number: [[]] for number in range(count)}
    rest: list[list[str]] = []
    size = _SHARD_BYTES
    for key in _written(source, matrices):
        if key in twice:
            continue
        if key in owners:
            parts[owners[key]][0].append(key)
            continue
        if size + source.num_bytes(key) > _SHARD_BYTES:
            rest.append([])
            size = 0
        rest[-1].append(key)
        size += source.num_bytes(key)
    parts[None] = rest
    pieces = [(owner, keys) for owner, lists in parts.items() for keys in lists if keys]
    shards = []
    for number, (owner, keys) in enumerate(pieces):
        present = set(keys)
        shards.append(
            Shard(
                file=f"model-{number + 1:05d}-of-{len(pieces):05d}.safetensors",
                keys=keys,
                matrices=[matrix for matrix in matrices if matrix.key in present],
                index=owner,
                block=None if owner is None or found is None else f"{found[0]}.{owner}",
            )
        )
    return shards


def _written(source: DenseCheckpoint, matrices: list[Matrix]) -> list[str]:
    """The keys that go into shards, in the order of the source: an expert that is clustered takes the place of the
    tensors that it is made of."""
    experts: dict[str, list[str]] = {}
    for matrix in matrices:
        if matrix.key in source.assemblies:
            first, *others = source.keys_of(matrix.key)
            experts.setdefault(first, []).append(matrix.key)
            experts.update((other, experts.get(other, [])) for other in others)
    return [name for key in source.shapes for name in experts.get(key, [key])]


def read_matrix(source: DenseCheckpoint, matrix: Matrix) -> torch.Tensor:
    """The dense weight [out, in] as it is stored."""
    weight = source.read(matrix.key)
    return weight.t() if matrix.conv1d else weight


def _stored_twice(model: nn.Module, source: DenseCheckpoint, specs: dict[str, ClusterSpec]) -> set[str]:
    """Keys of weights that are those of clustered layers under the name of another that is tied to it."""
    found = set()
    for target, owner in tied_weights(model).items():
        key, first = source.find(target), source.find(owner)
        if owner.removesuffix(".weight") in specs and None not in (key, first) and key != first:
            if not torch.equal(source.read(str(key)), source.read(str(first))):
                raise ValueError(
                    f"{source.folder} holds two different weights {first} and {key}, but its config.json says that "
                    "they are tied; set tie_word_embeddings to false there."
                )
            found.add(str(key))
    return found


def _matrix(model: nn.Module, source: DenseCheckpoint, name: str, spec: ClusterSpec) -> Matrix:
    key = source.weight_key(name)
    if key is None:
        raise ValueError(_absent(source, name, type(model).__name__))
    for held in source.keys_of(key):
        if source.dtypes[held].itemsize == 1:
            raise ValueError(
                f"{held} of {source.folder} is {str(source.dtypes[held]).removeprefix('torch.')}, whose numbers are "
                "to be multiplied by scales; save the model in bfloat16 with transformers first."
            )
    dense = model.get_submodule(name)
    out, inputs = weight_of(dense).shape
    return Matrix(name, key, spec, (out, inputs), isinstance(dense, Conv1D))


def _absent(source: DenseCheckpoint, name: str, kind: str) -> str:
    """Why a weight cannot be read from a checkpoint."""
    other = source.find(f"{name}.weight")
    if other is not None:
        return (
            f"{source.folder} stores {name}.weight as {other}, and transformers renames weights of that name, but not "
            "codes; leave the layer dense with exclude_modules."
        )
    return (
        f"{source.folder} lacks {name}.weight of {kind}, the class that its config.json names. If another tensor "
        "holds it together with other weights, it cannot be clustered: leave it dense with exclude_modules. If not, "
        "the weights are of another model or another class, or a file is missing."
    )
