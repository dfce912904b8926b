"""transformers: how it runs the experts of a mixture that are stored as 3-D parameters (`integrations.moe`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "apply_gate",
    "as_stored",
    "follow_implementation",
    "has_implementations",
    "norm_of_experts",
    "register_experts",
    "use_implementation",
]


def has_implementations(module: Any) -> bool:
    """Whether a module's class of experts is one of those with `use_experts_implementation`, which leaves
    `is_transposed`, `has_gate`, `has_bias`, `config` and `_apply_gate` on it.

    If it notes them elsewhere, experts of most families cannot be clustered.
    """
    noted = ("is_transposed", "has_gate", "has_bias", "config", "_apply_gate")
    return all(hasattr(module, name) for name in noted)


def apply_gate(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    """The gate of experts [tokens, 2 · inner] to [tokens, inner]: `module._apply_gate`.

    If it is called otherwise, models with clustered experts do not run.
    """
    return module._apply_gate(gate_up)


def as_stored(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model under the names and in the pieces of its checkpoints, as `save_pretrained` writes them: by
    `revert_weight_conversion`. Each has memory of its own.

    If it works otherwise, mixtures cannot be exported, or their experts not be found by other engines.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return {name: value.clone() for name, value in revert_weight_conversion(model, dict(tensors)).items()}


def norm_of_experts(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What is done to the outputs of experts before they are weighted: `module.post_expert_norm` where
    `module.has_post_expert_norm` says so, which transformers 5.18 does not know; None for nothing.

    If it is called otherwise, models with such experts compute something else.
    """
    return module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None


def register_experts(name: str, forward: Callable[..., torch.Tensor]) -> None:
    """Makes an implementation of experts known: `ALL_EXPERTS_FUNCTIONS`, called as `forward(module, hidden_states,
    top_k_index, top_k_weights)`.

    If the registry works otherwise, models with clustered experts do not run.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, forward)


def use_implementation(module: Any, name: str) -> None:
    """Makes the experts of one module run by an implementation, whatever the model is set to: a module looks it up by
    `module.config._experts_implementation`.

    If it is looked up elsewhere, models with clustered experts do not run.
    """
    if not isinstance(module.config, _Pinned):
        module.config = _Pinned(module.config, name)


def follow_implementation(module: Any) -> None:
    """Undoes [`use_implementation`]."""
    if isinstance(module.config, _Pinned):
        module.config = module.config.config


class _Pinned:
    """A config of which one answer is another."""

    def __init__(self, config: Any, implementation: str) -> None:
        self.config, self._experts_implementation = config, implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.config, name)
