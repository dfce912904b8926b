"""What is clustered, and how: one immutable object that every way to a clustered model holds.

cluscomp compress, from_pretrained     ClusCompQuantizationConfig.policy
get_peft_model on a dense model        ClusCompConfig.policy
cluscomp plan                          that of the quantization config

targets(model)      which layers are clustered                 spec_for(name, out, in)     how a matrix is stored
embeddings_of(model)  and which embeddings and heads           embedding_specs(model)      how these are stored
coverage(model)     how much that is, and what stays dense     cluster(name, layer, spec)  K-means of one matrix
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..clustering import QUALITIES, kmeans
from ..codes import ClusterSpec, pack
from ..dense import weight_of
from ..linear import ClusteredLinear
from .budget.allocation import choose_spec
from .budget.coverage import coverage_line
from .budget.embeddings import Vocabulary, vocabularies
from .budget.targets import (
    default_targets,
    dense_linears,
    linear_weights,
    refuse_linears_of_their_own,
    refuse_some_experts,
)
from .matrix.cluster import cut_into_vectors

__all__ = [
    "CODEBOOK_DTYPES",
    "DEFAULT_BITS",
    "DTYPE_IN_MEMORY",
    "DTYPE_ON_DISK",
    "EMBEDDING_BITS",
    "WITHOUT_TEXT",
    "WITH_MOMENTS",
    "Policy",
]

DEFAULT_BITS = 4.0
EMBEDDING_BITS = 5.0  # where a user asks for clustered embeddings and names no bits
CODEBOOK_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# The two defaults of `codebook_dtype`. A checkpoint has one dtype for all codebooks, whatever dtypes its layers have,
# and of the two half-precision formats float16 rounds a centroid eight times finer than bfloat16. A dense model that
# is clustered in memory is about to be trained, and saved with what stays dense: there "auto" gives every codebook the
# dtype of the weight that it replaces, so that a cast of the whole model or a merge finds what it expects.
DTYPE_ON_DISK = "float16"
DTYPE_IN_MEMORY = "auto"

# What is said where a dense model is clustered in memory, matrix by matrix.
WITH_MOMENTS = (
    "clustered by K-means that weighs errors by the inputs of each layer on calibration text; `cluscomp compress` "
    "does more with it and loses less at the same bits: compress the model with it first where quality matters"
)
WITHOUT_TEXT = (
    "clustered without calibration text, which loses more than `cluscomp compress` does at the same bits: compress "
    "the model with it first where quality matters"
)


@dataclass(frozen=True)
class Policy:
    """What is clustered, and how.

    Args:
        bits (`float`, *optional*): True bits per weight, codebooks and scales included. 4 where neither bits nor size
            nor (g, n) are given.
        size (`int`, *optional*): Bytes that a whole checkpoint may take, instead of bits.
        group_size (`int`, *optional*): g, weights per code, for every matrix; goes with `num_clusters`.
        num_clusters (`int`, *optional*): n, centroids per codebook.
        scales (`bool`, *optional*): Store a scale per input and output channel. None: where sensitivities
            share out the bits and they cost at most 0.05; K-means of weights alone loses more with them.
        codebook_dtype (`str`): "float16", "bfloat16" or "float32", of codebooks and scales; "auto" is the dtype of
            each weight.
        quality (`str`): Of K-means: "fast", "default" or "best".
        seed (`int`): Of K-means.
        target_modules (`tuple[str]`, *optional*): Names, or ends of names, of the layers to cluster, or of parameters
            that hold the experts of a mixture. None: every linear layer and expert inside the blocks.
        exclude_modules (`tuple[str]`): Names, or ends of names, of layers to leave dense.
        embeddings (`float`, *optional*): True bits per weight of the input embedding and the output head, whatever
            the linear layers get; tied ones are stored once. None: they stay dense.
        cap_clusters (`bool`): Where `num_clusters` is more than the groups of a matrix, take as many as there are
            groups, which loses nothing, instead of refusing the matrix.

    Raises:
        ValueError: If a value is out of range.
    """

    bits: float | None = None
    size: int | None = None
    group_size: int | None = None
    num_clusters: int | None = None
    scales: bool | None = None
    codebook_dtype: str = DTYPE_ON_DISK
    quality: str = "default"
    seed: int = 0
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    embeddings: float | None = None
    cap_clusters: bool = False

    def __post_init__(self) -> None:
        if self.bits is None and self.size is None and self.group_size is None and self.num_clusters is None:
            object.__setattr__(self, "bits", DEFAULT_BITS)
        for name in ("group_size", "num_clusters"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
        for name in ("bits", "embeddings"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name} must be a number, got {value!r}.")
        if (self.group_size is None) != (self.num_clusters is None):
            raise ValueError(
                f"group_size and num_clusters go together, got group_size={self.group_size} and "
                f"num_clusters={self.num_clusters}; give both, or only bits."
            )
        if self.group_size is not None and self.num_clusters is not None:
            ClusterSpec(self.group_size, self.num_clusters)
        for name, usual in (("bits", DEFAULT_BITS), ("embeddings", None)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 8:
                cure = "" if usual is None else f"; leave it out for {usual:g}"
                raise ValueError(
                    f"{name} must be between 1 and 8 (true bits per weight, codebooks included), got {value}{cure}."
                )
        if not isinstance(self.codebook_dtype, str) or self.codebook_dtype not in ("auto", *CODEBOOK_DTYPES):
            known = ", ".join(("auto", *CODEBOOK_DTYPES))
            raise ValueError(f"codebook_dtype must be one of {known}, got {self.codebook_dtype!r}.")
        if not isinstance(self.quality, str) or self.quality not in QUALITIES:
            raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {self.quality!r}.")

    # -- which layers

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers of a dense model to cluster, by name, in its order.

        Raises:
            ValueError: If no layer matches, a name in `target_modules` matches none, experts are fused, or only some
                of those in one parameter are named.
        """
        if self.target_modules is None:
            refuse_linears_of_their_own(model)
            layers = chosen = default_targets(model)
        else:
            layers = dict(dense_linears(model))
            chosen = {name: layer for name, layer in layers.items() if _matches(name, self.target_modules)}
            for target in self.target_modules:
                if not any(_matches(name, [target]) for name in layers):
                    raise ValueError(_unmatched(model, target))
        chosen = {name: layer for name, layer in chosen.items() if not _matches(name, self.exclude_modules)}
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no linear layer left to cluster; check exclude_modules.")
        refuse_some_experts(model, chosen)
        return chosen

    def embeddings_of(self, model: nn.Module) -> dict[str, Vocabulary]:
        """The weights of input embedding and output head to cluster, by the name under which each is stored; none
        where the policy leaves them dense.

        Raises:
            ValueError: If the model has none that can be clustered.
        """
        if self.embeddings is None:
            return {}
        found = vocabularies(model)
        if not found:
            raise ValueError(f"{type(model).__name__} has no embedding that can be clustered; leave out embeddings.")
        return {
            entry.name: entry
            for entry in found
            if not any(_matches(name, self.exclude_modules) for name in (entry.name, *entry.tied))
        }

    def coverage(self, model: nn.Module, names: Collection[str]) -> str:
        """One line: how much of a dense model is clustered where the layers `names` are, and why the rest is not."""
        excluded = {name for name, _ in dense_linears(model) if _matches(name, self.exclude_modules)}
        entries = [entry for name, entry in self.embeddings_of(model).items() if name in names]
        tied = [name for entry in entries for name in entry.tied]
        line = coverage_line(model, {*names, *tied}, excluded=excluded)
        shown = [" = ".join((entry.name, *entry.tied)) for entry in entries]
        return f"{line}; embeddings clustered: {', '.join(shown)}" if shown else line

    # -- how each is stored

    def codebook_dtype_for(self, weight: torch.Tensor) -> torch.dtype:
        """Of codebook and scales of a weight."""
        return weight.dtype if self.codebook_dtype == "auto" else CODEBOOK_DTYPES[self.codebook_dtype]

    def spec_for(
        self, name: str, out_features: int, in_features: int, codebook_dtype: torch.dtype | None = None
    ) -> ClusterSpec:
        """How one matrix is stored, whatever the others take: (g, n) as given, or what is best within `bits`.

        Args:
            name (`str`): What errors call it.
            out_features, in_features (`int`): Its shape.
            codebook_dtype (`torch.dtype`, *optional*): Of codebook and scales; needed where the policy says "auto".

        Raises:
            ValueError: If the matrix does not fit the settings.
        """
        return choose_spec(
            in_features,
            out_features,
            bits=self.bits,
            group_size=self.group_size,
            num_clusters=self.num_clusters,
            scales=bool(self.scales),
            codebook_itemsize=(codebook_dtype or CODEBOOK_DTYPES[self.codebook_dtype]).itemsize,
            cap=self.cap_clusters,
            name=name,
        )

    def specs(self, model: nn.Module) -> dict[str, ClusterSpec]:
        """How each of the [`targets`] is stored, by name.

        Raises:
            ValueError: If no layer matches, or a matrix does not fit the settings.
        """
        found = {}
        for name, layer in self.targets(model).items():
            weight = weight_of(layer)
            out_features, in_features = weight.shape
            found[name] = self.spec_for(name, out_features, in_features, self.codebook_dtype_for(weight))
        return found

    def embedding_specs(self, model: nn.Module) -> dict[str, ClusterSpec]:
        """How each of the [`embeddings_of`] a model is stored, by name.

        Raises:
            ValueError: If it has none, or one does not fit the bits.
        """
        found = {}
        for name, entry in self.embeddings_of(model).items():
            weight = weight_of(entry.module)
            found[name] = choose_spec(
                weight.shape[1],
                weight.shape[0],
                bits=self.embeddings,
                scales=True,  # half the loss of SmolLM2 at 4 bits, for 0.03 of them
                codebook_itemsize=self.codebook_dtype_for(weight).itemsize,
                name=name,
            )
        return found

    # -- clustering one

    def cluster(
        self,
        name: str,
        dense: nn.Module | torch.Tensor,
        spec: ClusterSpec,
        *,
        weight: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        threads: int | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> ClusteredLinear:
        """Clusters one matrix.

        Args:
            name (`str`): What errors call it.
            dense (`nn.Module` or `torch.Tensor`): `nn.Linear` or `Conv1D`, left as it is, its bias shared with the
                result; or a weight [out, in], floating point.
            spec ([`ClusterSpec`]): How to store it; `num_blocks` must be 1.
            weight (`torch.Tensor`, *optional*): [out, in], to store in place of the layer's own.
            importance (`torch.Tensor`, *optional*): [in], E[x_i²] of the layer's inputs.
            threads, progress: See `cluscomp_peft.clustering.kmeans`.

        Raises:
            ValueError: If the weight has NaN or infinite values, or values that the codebook's dtype cannot hold.
        """
        layer = dense if isinstance(dense, nn.Module) else None
        own = dense if isinstance(dense, torch.Tensor) else weight_of(dense).detach()
        codebook_dtype, dtype, out_features = self.codebook_dtype_for(own), own.dtype, own.shape[0]
        cut = cut_into_vectors(own if weight is None else weight, spec, codebook_dtype, importance, name)
        del dense, own, weight  # K-means is where memory peaks
        codebook, codes, _ = kmeans(
            cut.vectors,
            spec.num_clusters,
            weights=cut.weights,
            quality=self.quality,
            seed=self.seed,
            threads=threads,
            progress=progress,
        )
        return ClusteredLinear.from_parts(
            pack(codes.view(cut.in_features, -1), spec.code_bits),
            codebook.to(codebook_dtype)[None],
            cut.scale_in,
            cut.scale_out,
            None if layer is None else layer.bias,
            out_features,
            conv1d=isinstance(layer, Conv1D),
            dtype=dtype,
        )


def _unmatched(model: nn.Module, target: str) -> str:
    """Why an entry of `target_modules` finds no layer to cluster."""
    kept = [weight for weight in linear_weights(model) if weight.reason and _matches(weight.name, [target])]
    if kept:
        names = ", ".join(weight.name for weight in kept[:3]) + (", …" if len(kept) > 3 else "")
        return f"target_modules names {target!r}, but it stays dense ({names}): {kept[0].reason}."
    return f"target_modules names {target!r}, but no linear layer of {type(model).__name__} is or ends with it."


def _matches(name: str, targets: Collection[str]) -> bool:
    # Of experts.3.down_proj also by the name of the parameter that holds all of them, experts.down_proj.
    spellings = {name, re.sub(r"\.\d+(?=\.[^.]+$)", "", name)}
    return any(one == target or one.endswith(f".{target}") for target in targets for one in spellings)
