"""What the config of a saved adapter promises of its weights, where a loader brings them that never shows their file.

PEFT reads our config from a folder: the file beside it is checked before the model is touched (`adapter_file.py`).
transformers' `model.load_adapter`, `load_state_dict` and others set tensors in layers that were made from a config
alone. Then the digests of the config are held against what has arrived, all layers at once, before the first of them
runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..codes import combine_fingerprints
from .config import ClusCompConfig

if TYPE_CHECKING:
    from .loading import LoadingLayer

__all__ = ["Arrival"]


class Arrival:
    """Shared by the layers of an adapter until its weights are in."""

    def __init__(self, adapter_name: str, saved: ClusCompConfig) -> None:
        self.adapter_name = adapter_name
        self.codes = saved.fingerprint
        self.codebooks = saved.codebook_fingerprint if saved.carries_codes else None
        self.layers: list[LoadingLayer] = []
        self._checked = False

    def expected_by(self, layers: Sequence[LoadingLayer]) -> None:
        """All layers of the adapter, in the order of the model."""
        self.layers = list(layers)
        for layer in layers:
            layer.loading[self.adapter_name].arrival = self

    def check(self) -> None:
        """Holds the digests against the layers; only once.

        Codebooks that are not those of the file are a warning: they may have been cast to the dtype of the model.

        Raises:
            ValueError: If the codes are not those of the config.
        """
        if self._checked:
            return
        found = combine_fingerprints(layer.fingerprint() for layer in self.layers)
        if found not in (None, self.codes):
            raise ValueError(
                f"the codes that came with adapter {self.adapter_name!r} have fingerprint {found}, but its "
                f"adapter_config.json says {self.codes}: the two belong to different adapters, or a file is damaged. "
                "Copy or download the adapter again."
            )
        if self.codebooks is not None:
            found = combine_fingerprints(layer.codebook_fingerprint() for layer in self.layers)
            if found not in (None, self.codebooks):
                warnings.warn(
                    f"adapter {self.adapter_name!r} came with other codebooks or scales than its adapter_config.json "
                    "says: they were cast to another dtype, or the file is damaged. PeftModel.from_pretrained checks "
                    "the file itself.",
                    stacklevel=2,
                )
        self._checked, self.layers = True, []
