"""`ClusCompQuantizationConfig`: what `config.json` of a compressed checkpoint says about it, and how to make one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..compress.policy import CODEBOOK_DTYPES, DTYPE_ON_DISK, Policy

__all__ = ["FORMAT_VERSION", "ClusCompQuantizationConfig"]

FORMAT_VERSION = 1
_EMBEDDINGS_VERSION = 2  # what reads version 1 alone would take clustered embeddings for missing ones


@dataclass
class ClusCompQuantizationConfig(QuantizationConfigMixin):
    """Passed to `from_pretrained` with a dense checkpoint, it clusters the model while it loads; read back from a
    compressed checkpoint, it says which matrices are clustered and how.

    Args:
        bits (`float`, *optional*): True bits per weight that no matrix exceeds, codebooks and scales included. Default
            4 unless `group_size` and `num_clusters` are given.
        group_size (`int`, *optional*): g, weights per code, for every matrix; goes with `num_clusters`.
        num_clusters (`int`, *optional*): n, centroids per codebook.
        scales (`bool`, *optional*): Store a scale per input and output channel. None: where sensitivities
            share out the bits and they cost at most 0.05; K-means of weights alone loses more with them.
        codebook_dtype (`str`): "float16", "bfloat16" or "float32", of codebooks and scales.
        seed (`int`): Of K-means.
        quality (`str`): Of K-means: "fast", "default" or "best".
        target_modules (`list[str]`, *optional*): Names, or ends of names, of the layers to cluster. None: every linear
            layer but the output head.
        exclude_modules (`list[str]`, *optional*): Names, or ends of names, of layers to leave dense.
        embeddings (`float`, *optional*): True bits per weight of the input embedding and the output head, whatever
            `bits` says; tied ones are stored once. None: they stay dense.
        version (`int`): Of the format: 1, or 2 where embeddings are clustered. Filled in.
        layout (`dict`): Name patterns of the clustered matrices and how each is stored; see `cluscomp_peft.layout`.
            Filled in by the quantizer.
        fingerprint (`str`, *optional*): Digest of all codes. Filled in by the quantizer, checked when loading.

    Raises:
        ValueError: If a value is out of range or of another type, or the version is newer than this package.
    """

    bits: float | None = None
    group_size: int | None = None
    num_clusters: int | None = None
    scales: bool | None = None
    codebook_dtype: str = DTYPE_ON_DISK
    seed: int = 0
    quality: str = "default"
    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    embeddings: float | None = None
    version: int = FORMAT_VERSION
    layout: dict[str, dict[str, Any]] = field(default_factory=dict)
    fingerprint: str | None = None
    quant_method: str = "cluscomp"

    def __post_init__(self) -> None:
        if self.version not in (FORMAT_VERSION, _EMBEDDINGS_VERSION):
            raise ValueError(
                f"this checkpoint has version {repr(self.version)[:40]} of the ClusComp format, but this "
                f"cluscomp_peft reads versions up to {_EMBEDDINGS_VERSION}; upgrade cluscomp_peft, or compress the "
                "model again."
            )
        if self.embeddings is not None:
            self.version = _EMBEDDINGS_VERSION
        tables = isinstance(self.layout, dict) and all(isinstance(entry, dict) for entry in self.layout.values())
        if not tables:
            raise ValueError(
                f"layout must be an object that says for each name how it is stored, got {str(self.layout)[:60]!r}; "
                "config.json is damaged, download or compress the model again."
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
            ):
                raise ValueError(f"{name} must be a list of names, got {str(value)[:60]!r}.")
        if not isinstance(self.codebook_dtype, str) or self.codebook_dtype not in CODEBOOK_DTYPES:
            known = ", ".join(CODEBOOK_DTYPES)
            raise ValueError(f"codebook_dtype must be one of {known}, got {self.codebook_dtype!r}.")
        self.bits = self.policy.bits

    @property
    def policy(self) -> Policy:
        """What is clustered, and how."""
        return Policy(
            bits=self.bits,
            group_size=self.group_size,
            num_clusters=self.num_clusters,
            scales=self.scales,
            codebook_dtype=self.codebook_dtype,
            quality=self.quality,
            seed=self.seed,
            target_modules=None if self.target_modules is None else tuple(self.target_modules),
            exclude_modules=tuple(self.exclude_modules or ()),
            embeddings=self.embeddings,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of codebooks and scales."""
        return CODEBOOK_DTYPES[self.codebook_dtype]

    def to_dict(self) -> dict[str, Any]:
        """The public fields, as `config.json` takes them."""
        return {item.name: copy.deepcopy(getattr(self, item.name)) for item in fields(self)}
