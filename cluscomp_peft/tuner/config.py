"""`ClusCompConfig`: the settings of a ClusComp adapter, and what a saved one says about the codes it belongs to.

A config is data: what this package knows of an adapter beyond its settings lives in the layers (`loading.py`).

    settings         given by the user; PEFT itself resolves `target_modules` and notes the base model's name
    saved facts      `layout`, `fingerprint`, `codebook_fingerprint`, `carries_codes`: in `adapter_config.json` only,
                     read off the model at each saving; a config that has them is that of a saved adapter
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from peft.config import PeftConfig
from peft.utils import PeftType

from ..codes import ClusterSpec
from ..compress.calibration.text import AUTO
from ..compress.policy import DTYPE_IN_MEMORY, Policy
from .arguments import explains_arguments
from .units import default_delta_scale

__all__ = ["ClusCompConfig", "SavedFacts", "Source", "config_of_sum"]

BASES = ("clustered", "dense")
_DOWNLOAD = ("revision", "cache_dir", "token", "local_files_only")


class SavedFacts(NamedTuple):
    """What `adapter_config.json` says of the base that an adapter was saved from; the fields of [`ClusCompConfig`]."""

    layout: dict[str, dict[str, Any]]
    fingerprint: str | None
    codebook_fingerprint: str | None
    carries_codes: bool


class Source(NamedTuple):
    """Where a config was read from: a folder or repository, a folder inside it, and how to download from there."""

    place: str
    subfolder: str
    download: dict[str, Any]


@explains_arguments
@dataclass
class ClusCompConfig(PeftConfig):
    """Configuration of a [`ClusCompModel`].

    On a compressed checkpoint the codes are there, and arguments about clustering are ignored with a warning. On a
    dense model they say how its weights are clustered when the first adapter is created.

    Args:
        base (`str`): What the adapter sits on. "clustered": the codes and codebooks of a compressed checkpoint, or, on
            a dense model, of weights that are clustered now and whose dense form is dropped; the adapter file then
            carries codes and codebooks as well. "dense": the dense weight stays, `W' = W + ΔC[codes]`.
        target_modules (`list[str]` or `str`, *optional*): As in every PEFT method: a list of (ends of) names, a
            regular expression, or "all-linear". None and "all-linear": every clustered layer of a compressed
            checkpoint, every linear layer but the output head of a dense model.
        target_parameters (`list[str]`, *optional*): Names, or ends of names, of parameters that hold the matrices of
            all experts of a mixture (`mlp.experts.down_proj`): those are adapted beside `target_modules`, or alone
            where these are None. The adapter is saved with their layers (`experts.3.down_proj`) in target_modules.
        exclude_modules (`list[str]` or `str`, *optional*): Layers to leave as they are.
        layers_to_transform (`list[int]` or `int`, *optional*): Only layers with these indices.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the list of layers, where it is not a usual one.
        modules_to_save (`list[str]`, *optional*): Other modules to train and save whole.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*): Tokens to train the embeddings
            of, in the input embedding or in the layers named; as in other PEFT methods.
        bias (`str`): "none", "all" or "cluscomp_only".
        rank (`int`): The knob for capacity: each matrix gets as many delta codebooks, each for a block of consecutive
            input channels, as hold no more numbers than LoRA of this rank, `rank · (in + out)`, scales counted; at
            least one. Merging then stores so many codebooks.
        num_blocks (`int`, *optional*): Delta codebooks of every matrix, instead of `rank`; 1 keeps the bits of the
            base on merging.
        train_scales (`bool`, *optional*): Train a scale per input and output channel too, 16 bits each after merging.
            None: always, but with `num_blocks` only where the base stores them already.
        delta_scale (`float`, *optional*): Units of the trained numbers: one unit moves a centroid by about this many
            RMS of its codebook, so that an Adam step at a learning rate of 2e-4 moves it by 0.0002 · delta_scale RMS.
            None: fewer, the more blocks and numbers are trained, which makes the rates that people use for LoRA right
            (`tuner/units.py`). It was 256 for all models in versions before.
        init_weights (`bool`): False starts from random deltas instead of zero ones; for tests.
        bits (`float`, *optional*): Dense model: true bits per weight that no matrix exceeds; default 4.
        group_size (`int`, *optional*): Dense model: weights per code; with `num_clusters`, instead of `bits`.
        num_clusters (`int`, *optional*): Dense model: centroids, capped at the number of groups of a matrix, where
            clustering loses nothing.
        scales (`bool`, *optional*): Dense model: store a scale per channel; None: no.
        codebook_dtype (`str`): Dense model: "auto" is the dtype of the weight; else "float16", "bfloat16", "float32".
        seed (`int`): Dense model: of K-means.
        quality (`str`): Dense model: of K-means, "fast", "default" or "best".
        calibration (`str`): Dense model: text that says which inputs of a layer count, so that K-means weighs errors
            by them: "auto" for the text of the package, or a file or data set as `cluscomp compress --calibration`
            takes it; "none" for K-means of the weights alone. The tokenizer is the one that lies beside the model.
        layout (`dict`): Written on saving: how the codes are stored, by name pattern.
        fingerprint (`str`, *optional*): Written on saving: digest of the codes that the adapter belongs to.
        codebook_fingerprint (`str`, *optional*): Written on saving: digest of the codebooks and scales it was trained
            on, which merging changes while the codes stay.
        carries_codes (`bool`): Written on saving: the adapter file holds codes, so it belongs on the dense model.

    Raises:
        ValueError: If a value is out of range.
    """

    base: str = field(default="clustered", metadata={"help": "What the adapter sits on: 'clustered' or 'dense'."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, ends of names or a regex of the layers to adapt, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, ends of names or a regex of layers to leave as they are."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, for layers_to_transform."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save whole."}
    )
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'cluscomp_only'."})
    rank: int = field(default=8, metadata={"help": "Trains about as many numbers as LoRA of this rank."})
    num_blocks: int | None = field(
        default=None, metadata={"help": "Delta codebooks of every matrix, instead of rank; 1 adds no bits."}
    )
    train_scales: bool | None = field(default=None, metadata={"help": "Train per-channel scales too."})
    delta_scale: float | None = field(
        default=None, metadata={"help": "RMS of the codebook that one trained unit stands for; by default what fits."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False starts from random deltas; for tests."})
    bits: float | None = field(default=None, metadata={"help": "Dense model: true bits per weight."})
    group_size: int | None = field(default=None, metadata={"help": "Dense model: weights per code."})
    num_clusters: int | None = field(default=None, metadata={"help": "Dense model: centroids per codebook."})
    scales: bool | None = field(default=None, metadata={"help": "Dense model: store per-channel scales."})
    codebook_dtype: str = field(
        default=DTYPE_IN_MEMORY, metadata={"help": "Dense model: dtype of codebook and scales."}
    )
    seed: int = field(default=0, metadata={"help": "Dense model: seed of K-means."})
    quality: str = field(default="default", metadata={"help": "Dense model: K-means, fast, default or best."})
    calibration: str = field(
        default=AUTO, metadata={"help": "Dense model: text by which K-means weighs errors: auto, none, or a file."}
    )
    layout: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "Written on saving: how the codes are stored."}
    )
    fingerprint: str | None = field(default=None, metadata={"help": "Written on saving: digest of the codes."})
    codebook_fingerprint: str | None = field(
        default=None, metadata={"help": "Written on saving: digest of codebooks and scales."}
    )
    carries_codes: bool = field(default=False, metadata={"help": "Written on saving: the file holds codes."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too, or the same by embedding layer."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names or ends of names of parameters that hold experts, which are adapted."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CLUSCOMP  # type: ignore[attr-defined]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self.check()
        self._source: Source | None = None
        self._facts: SavedFacts | None = None

    def check(self) -> None:
        """Checks the settings; again before use and before saving, because users and trainers change them.

        Raises:
            ValueError: If a value is out of range.
        """
        if self.base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {self.base!r}.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            names = value if isinstance(value, (list, tuple, set)) else [] if value is None else [value]
            if not all(isinstance(item, str) for item in names):
                raise ValueError(f"{name} must be a list of names or a regular expression, got {str(value)[:60]!r}.")
        is_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if is_regex and (self.layers_to_transform is not None or self.layers_pattern is not None):
            raise ValueError(
                "layers_to_transform and layers_pattern cannot be used when target_modules is a regular expression; "
                "put the indices into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, which says which of those layers to adapt.")
        if self.target_parameters and is_regex:
            raise ValueError(
                f"target_parameters={self.target_parameters!r} are added to a list of target_modules, not to the "
                "regular expression; name the experts' layers in it, as in experts.3.down_proj."
            )
        tokens = self.trainable_token_indices
        by_layer = tokens if isinstance(tokens, dict) else {} if tokens is None else {"": tokens}
        if not all(type(name) is str and _are_token_indices(indices) for name, indices in by_layer.items()):
            raise ValueError(
                "trainable_token_indices must be a list of token numbers of at least 0, or one for each of several "
                f"embedding layers by name, got {tokens!r}."
            )
        for name in ("rank", "num_blocks"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (value is None and name == "num_blocks"):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        scale = 1.0 if self.delta_scale is None else self.delta_scale
        if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"delta_scale must be a finite number greater than 0, or None, got {scale!r}.")
        if not isinstance(self.calibration, str):
            raise ValueError(f"calibration must be 'auto', 'none' or a path, got {self.calibration!r}.")
        _ = self.policy

    def note_source(self, place: str, subfolder: str | None, settings: Mapping[str, Any]) -> None:
        """Takes from where `PeftConfig.from_pretrained` read it: the tensors beside it are checked before use."""
        download = {key: settings[key] for key in _DOWNLOAD if key in settings}
        self._source = Source(os.fspath(place), subfolder or "", download)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`: the settings, and what [`note_facts`] was told."""
        described = self if self._facts is None else replace(self, **self._facts._asdict())
        super(ClusCompConfig, described).save_pretrained(save_directory, **kwargs)

    def note_facts(self, facts: SavedFacts) -> None:
        """Takes what the next `adapter_config.json` says of the base.

        PEFT reads the tensors off the model first and writes the config after that, which is all that it hands to that
        step. The fields stay empty: a further adapter that is made from this config starts anew.
        """
        self._facts = facts

    @property
    def source(self) -> Source | None:
        """Where the config was read from; None where it was made."""
        return self._source

    @property
    def is_saved(self) -> bool:
        """Whether this is the config of a saved adapter, whose numbers are to be loaded instead of made."""
        return self.fingerprint is not None

    def without_facts(self) -> ClusCompConfig:
        """The settings alone: the config of a new adapter, or of one that has been loaded."""
        return replace(self, layout={}, fingerprint=None, codebook_fingerprint=None, carries_codes=False)

    @property
    def clusters(self) -> bool:
        """Whether the config says how to cluster, by a budget of bits or by sizes."""
        return (self.bits, self.group_size, self.num_clusters) != (None, None, None)

    @property
    def policy(self) -> Policy:
        """How a dense model is clustered; on a dense base, of which only the codes are kept, with fp32 codebooks."""
        policy = Policy(
            bits=self.bits,
            group_size=self.group_size,
            num_clusters=self.num_clusters,
            scales=self.scales,
            codebook_dtype=self.codebook_dtype,
            quality=self.quality,
            seed=self.seed,
            cap_clusters=True,
        )
        return replace(policy, codebook_dtype="float32") if self.base == "dense" else policy

    def unit_scale(self, trained_blocks: int, in_features: int, out_features: int, numbers: int) -> float:
        """What one trained unit stands for in a matrix [out, in], in RMS of the codebook; `delta_scale` if given.

        Args:
            trained_blocks: Blocks of the model that the adapter trains; see `units.py`.
            in_features, out_features: Of the matrix.
            numbers: Of its delta codebooks together.
        """
        if self.delta_scale is not None:
            return self.delta_scale
        return default_delta_scale(trained_blocks, in_features, out_features, numbers)

    def blocks_of(self, spec: ClusterSpec, in_features: int, out_features: int) -> int:
        """How many delta codebooks a matrix [out, in] stored as `spec` gets; at most one for each input channel.

        By `rank`, a number that is rounded down to four significant bits: merging adapters of different ranks stores
        the least common multiple of their numbers, which stays small so.
        """
        if self.num_blocks is not None:
            return min(self.num_blocks, in_features)
        # Scales, one for each channel, are as many numbers as one rank.
        rank = self.rank - (self.train_scales is not False)
        most = min(in_features, rank * (in_features + out_features) // (spec.num_clusters * spec.group_size))
        spare = max(0, most.bit_length() - 4)
        return max(1, most >> spare << spare)

    def scales_of(self, spec: ClusterSpec) -> tuple[bool, bool]:
        """Whether scales of the input and of the output channels of a matrix stored as `spec` are trained."""
        if self.train_scales is None and self.num_blocks is not None:
            return spec.scale_in, spec.scale_out
        return (self.train_scales is not False,) * 2


def config_of_sum(configs: Sequence[ClusCompConfig], targets: set[str]) -> ClusCompConfig:
    """The config of an adapter that holds the sum of those of `configs`, in the layers `targets`.

    Raises:
        ValueError: If they have different capacities, of which only numbers of blocks have a common multiple.
    """
    blocks, flags = [config.num_blocks for config in configs], [config.train_scales for config in configs]
    first = replace(configs[0].without_facts(), target_modules=targets, init_weights=True)  # type: ignore[arg-type]
    counts = [count for count in blocks if count is not None]
    if len(counts) == len(configs):
        scales = True if True in flags else None if None in flags else False
        return replace(first, num_blocks=math.lcm(*counts), train_scales=scales)
    if len({(config.rank, config.num_blocks, config.train_scales) for config in configs}) > 1:
        raise ValueError(
            f"adapters of different capacity cannot be added up: rank {[config.rank for config in configs]}, "
            f"num_blocks {blocks}, train_scales {flags}. Give all of them the same rank, or all num_blocks."
        )
    return first


def _are_token_indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)
