"""PEFT's LoRA beside a clustered layer, for those who want it: y = x Ŵᵀ + scaling · x Aᵀ Bᵀ, the codes frozen.

What it trains cannot be merged into codes; [`ClusCompConfig`] trains the codebooks, which can.
"""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora import Linear
from torch import nn

from ..linear import ClusteredLinear

__all__ = ["LoraClusteredLinear", "clustered_names"]

# Of `init_lora_weights`: what makes A and B without reading the weight that they are beside.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


class LoraClusteredLinear(Linear):
    """A LoRA layer whose base is a [`ClusteredLinear`]; arguments as those of PEFT's `lora.Linear`.

    Raises:
        ValueError: If the config asks for a kind of LoRA that reads or changes the weight beside it.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        if config.init_lora_weights not in _INITS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} starts from a dense weight, of which a clustered "
                f"layer has none; give one of {', '.join(map(repr, _INITS))}."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        for name in ("use_dora", "arrow_config", "use_bdlora", "velora_config", "monteclora_config", "kasa_config"):
            if getattr(config, name, None):
                raise ValueError(
                    f"{name}={getattr(config, name)!r} needs a dense weight, of which a clustered layer has none; "
                    "leave it out."
                )
        return super().resolve_lora_variant(config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, ClusteredLinear)
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise ValueError(
            f"LoRA ({', '.join(adapter_names or self.active_adapters)}) cannot be merged into codes: the sum of the "
            "two has none. Keep it beside the base; or load it on the base after model.dequantize(), and merge it "
            "there; or train with ClusCompConfig, which merges exactly, at the same bits."
        )


def clustered_names(model: nn.Module) -> set[str]:
    """Names of the clustered layers of a model."""
    return {name for name, module in model.named_modules() if isinstance(module, ClusteredLinear)}
