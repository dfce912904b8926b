"""`ClusteredEmbedding`: an embedding that stores codes, a codebook and scales, and decodes the rows it looks up alone.

Its weight [vocabulary, hidden] is that of a linear layer from `hidden` to `vocabulary`, grouped along the vocabulary.
So an output head that is tied to it computes with the very same codes, and the two are stored once:

    tokens ──► embed_tokens.codes ──► rows ──► blocks ──► x ──► lm_head.codes, the same parameters ──► logits

They are tied as transformers ties weights, parameter by parameter ([`tied_layer`]): saving, sharding, offloading and
copying treat them as they treat the weight of a dense model.

The dtype of a transformers model is that of its first floating-point parameter, which is one of the embedding. So
`scale_in` stands first here, always there, and has the dtype of the model instead of that of the codebook.
"""

from __future__ import annotations

import copy

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import ops
from .clustered_weight import BASE_TENSORS, ClusteredWeight
from .codes import ClusterSpec
from .dense import is_dense_linear
from .linear import ClusteredLinear
from .offloading import offload_on_error
from .upstream.accelerate import offload_hook
from .upstream.transformers import mark_loaded

__all__ = ["ClusteredEmbedding", "clustered_layer", "is_dense_embedding", "tied_layer"]


def is_dense_embedding(module: nn.Module) -> bool:
    """Whether the module is an embedding that can be clustered: an `nn.Embedding`, or a subclass with nothing but a
    weight to learn, which may do to the rows that it looked up what it likes (Gemma multiplies them by a number)."""
    return isinstance(module, nn.Embedding) and module._parameters.keys() == {"weight"} and not module._modules


class ClusteredEmbedding(ClusteredWeight):
    """A frozen embedding in codes.

    Args:
        dense (`nn.Embedding`): What it stands for; its weight may be on the meta device.
        spec ([`ClusterSpec`]): How the weight [vocabulary, hidden], seen as [out, in], is stored; with `scale_in`.
        codebook_dtype, device: As [`ClusteredWeight`] takes them.

    Attributes:
        num_embeddings, embedding_dim (`int`): Vocabulary and hidden size.
        rows (`nn.Module`, *optional*): Where the dense class is a subclass of `nn.Embedding`, one of it without a
            weight. Its own `forward` runs on the rows that are decoded, as if they were all there are.
    """

    def __init__(
        self,
        dense: nn.Embedding,
        spec: ClusterSpec,
        *,
        codebook_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        if not spec.scale_in:
            raise ValueError("a clustered embedding has a scale for each input channel, but its spec has none.")
        super().__init__(
            dense.embedding_dim,
            dense.num_embeddings,
            spec,
            codebook_dtype=codebook_dtype,
            dtype=dense.weight.dtype,
            device=device,
        )
        self.scale_first()
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.padding_idx = dense.padding_idx
        self.rows = None if type(dense) is nn.Embedding and dense.max_norm is None else _without_weight(dense)

    def scale_first(self) -> None:
        """Puts `scale_in` before the other parameters, in the dtype of the model."""
        parameters = dict(self._parameters)
        scale = parameters.pop("scale_in")
        assert scale is not None
        if scale.dtype != self.weight_dtype:
            scale = nn.Parameter(scale.to(self.weight_dtype), requires_grad=False)
        self._parameters.clear()
        self._parameters.update(scale_in=scale, **parameters)

    def stored_bytes(self) -> int:
        """Bytes of codes, codebooks and scales."""
        assert self.scale_in is not None
        more = self.scale_in.element_size() - self.codebook.element_size()
        return super().stored_bytes() + more * self.in_features

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows [..., hidden] of tokens [...], in the model's dtype."""
        if offload_hook(self) is None:
            return self._forward(tokens)
        with offload_on_error(self):
            return self._forward(tokens)

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = ops.PackedWeight(self.codes, self.codebook, self.out_features, self.scale_in, self.scale_out)
        found = ops.decode_rows(weight, tokens.reshape(-1), self.weight_dtype)
        if self.rows is None:
            return found.view(*tokens.shape, self.embedding_dim)
        rows = _with_weight(self.rows, found)
        return rows(torch.arange(len(found), device=tokens.device).view(tokens.shape))

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The embedding with the decoded weight in `dtype`, of the class that it had; it looks up the same rows."""
        if self.rows is None:
            with torch.device("meta"):
                dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        else:
            dense = copy.deepcopy(self.rows)
            del dense.weight
        dense._parameters["weight"] = nn.Parameter(self.decode(dtype), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        spec = ", ".join(f"{key}={value}" for key, value in self.spec.to_dict().items())
        return f"{self.num_embeddings}, {self.embedding_dim}, {spec}"


def clustered_layer(dense: nn.Module, made: ClusteredLinear) -> ClusteredWeight:
    """The layer that takes the place of a dense embedding or linear layer, of the tensors of `made`.

    Args:
        dense (`nn.Module`): An embedding, or a linear layer, whose bias is shared.
        made ([`ClusteredLinear`]): Its weight in codes; not to be used any more.
    """
    layer = _empty_layer(dense, made)
    for name in BASE_TENSORS:
        layer._parameters[name] = made._parameters[name]
    if isinstance(layer, ClusteredEmbedding):
        layer.scale_first()
    return layer


def tied_layer(dense: nn.Module, source: ClusteredWeight) -> ClusteredWeight:
    """The layer that takes the place of a dense one whose weight is tied to that which `source` stands for.

    Args:
        dense (`nn.Module`): An embedding or a linear layer; its bias stays its own.
        source ([`ClusteredWeight`]): Whose parameters it shares.
    """
    layer = clustered_layer(dense, source)  # type: ignore[arg-type]
    layer.is_tied = True
    return layer


def _empty_layer(dense: nn.Module, like: ClusteredWeight) -> ClusteredWeight:
    if isinstance(dense, nn.Embedding):
        return ClusteredEmbedding(dense, like.spec, device="meta")
    layer = ClusteredLinear(
        like.in_features,
        like.out_features,
        like.spec,
        dtype=like.weight_dtype,
        device="meta",
        conv1d=isinstance(dense, Conv1D),
    )
    assert is_dense_linear(dense)
    layer._parameters["bias"] = dense._parameters["bias"]
    return layer


def _without_weight(dense: nn.Embedding) -> nn.Embedding:
    """A copy without the weight, whose name then holds an ordinary tensor."""
    weight = dense._parameters.pop("weight")
    try:
        rows = remove_hook_from_module(copy.deepcopy(dense))
    finally:
        dense._parameters["weight"] = weight
    rows.weight = _no_rows(torch.empty(0, dense.embedding_dim))
    return rows


def _with_weight(rows: nn.Embedding, weight: torch.Tensor) -> nn.Embedding:
    """The same module with a weight: another object, for several threads may look up at once."""
    made = object.__new__(type(rows))
    made.__dict__.update(rows.__dict__)
    made.__dict__["weight"] = weight
    return made


def _no_rows(like: torch.Tensor) -> torch.Tensor:
    """What is there while nothing is looked up; it says that it is loaded, for there is nothing to load."""
    empty = like.new_empty(0, like.shape[1])
    mark_loaded(empty)
    return empty
