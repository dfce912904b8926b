"""Which linear layers a model computes with instead of calling them: one dry forward pass finds out.

Mamba multiplies by `self.dt_proj.weight`, RWKV rescales `output.weight` in place. A clustered layer there would be
decoded in every pass, or written to in vain, and an adapter on it has no effect. No class tells, only what the model's
code does:

    the model of the config, on meta ──► linear layers show LazyWeights ──► forward ──► which had to give numbers?

Meta tensors take no memory, and blocks that are alike run once: a second for a model of any size. Where the pass does
not go (towers that text does not reach, code that branches on values, models without a config) the source of the
classes is read instead ([`weight_uses`]), and only what `forward` does under no condition counts. A layer that is
never called is nothing to object to: it may be an expert that no token chose.

Weights that are handed to a fused kernel, which computes with them where it is installed and the model trains, are a
third kind. A clustered layer is right there, if slow; an adapter has no effect.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...dense import is_dense_linear
from ...lazy_weight import LazyWeight
from .uses import weight_uses

__all__ = ["computed_with", "handed_to_kernels"]

_COMPUTED = "the model computes with its weight instead of calling it"
_HANDED = "the model hands its weight to a kernel in training instead of calling it"
_TOKENS = 8
_SAMPLES = 4000  # of sound
_KEPT = 16  # models whose notes are remembered
_remembered: OrderedDict[tuple[type, str], tuple[set[str], set[str], set[str]]] = OrderedDict()


def computed_with(model: nn.Module) -> dict[str, str]:
    """{layer: reason} of the linear layers whose weight the model computes with instead of calling them."""
    return {name: _COMPUTED for name in _notes(model)[0]}


def handed_to_kernels(model: nn.Module) -> dict[str, str]:
    """{layer: reason} of further ones, which the model calls unless a fused kernel is installed."""
    return {name: _HANDED for name in _notes(model)[1]}


def _notes(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of layers that are computed with, and handed on, in any part of the model."""
    computed: set[str] = set()
    handed: set[str] = set()
    reached: set[str] = set()
    for prefix, part in _outermost(model):
        for whole, names in zip((computed, handed, reached), _dry_pass(part), strict=True):
            whole |= {prefix + name for name in names}
    for name, module in model.named_modules():
        for path, use in weight_uses(type(module)).items():  # type: ignore[arg-type]
            layer = f"{name}.{path}" if name else path
            if not use.conditional and layer not in reached and _is_linear(module, path):
                computed.add(layer)
    return computed, handed


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(prefix, model) of every model of transformers that stands in no other."""
    # Only now: transformers imports the quantizer, which asks this module, before it has any model.
    from transformers import PreTrainedModel

    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, PreTrainedModel) and not prefix.startswith(inside):
            inside += (prefix,)
            yield prefix, module


def _is_linear(module: nn.Module, path: str) -> bool:
    try:
        return hasattr(module.get_submodule(path), "weight")
    except AttributeError:
        return False


def _dry_pass(model: Any) -> tuple[set[str], set[str], set[str]]:
    """Names of the layers of a model that it computes with, hands on, and reaches at all."""
    config = copy.deepcopy(model.config)
    config.dtype = None  # whatever it is
    for trace in ("quantization_config", "_is_quantized"):  # which some code asks for
        config.__dict__.pop(trace, None)
    key = (type(model), config.to_json_string())
    if key not in _remembered:
        _remembered[key] = _notes_of(type(model), config)
        if len(_remembered) > _KEPT:
            _remembered.popitem(last=False)
    return _remembered[key]


def _notes_of(kind: Any, config: Any) -> tuple[set[str], set[str], set[str]]:
    log: dict[str, set[str]] = {"called": set(), "computed": set(), "read": set()}
    with _nothing_else_changes():
        try:
            config._attn_implementation = "eager"  # others need a GPU, and call the same layers
            model = kind(config)
        except Exception:
            return set(), set(), set()
        alike = _run_once(model)
        for name, module in list(model.named_modules()):
            if is_dense_linear(module):
                model.set_submodule(name, _Noting(name, module, log))
        for name, part in list(model.named_modules()):  # itself, and towers that its own pass did not reach
            seen = log["called"] | log["computed"]
            if hasattr(part, "main_input_name") and not any(layer.startswith(name) for layer in seen):
                _run(part)
    for name, first in alike.items():
        for names in log.values():
            names |= {name + layer.removeprefix(first) for layer in names if layer.startswith(f"{first}.")}
    handed = {name for name in log["read"] - log["computed"] if _is_used(model, name)}
    return log["computed"], handed, log["called"] | log["computed"]


def _is_used(model: nn.Module, name: str) -> bool:
    """Whether the code that owns a layer does more with its weight than ask for a dtype."""
    parts = name.split(".")
    owners = ((".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(len(parts)))
    return any(path in weight_uses(type(model.get_submodule(owner))) for owner, path in owners)  # type: ignore[arg-type]


def _run(model: Any) -> None:
    """The forward passes of training and of inference, as far as they go."""
    parameters = inspect.signature(model.forward).parameters
    for training in (True, False):
        model.train(training)
        try:
            inputs = _inputs(model, parameters)
            if training and "use_cache" in parameters:
                inputs["use_cache"] = False
            model(**inputs)
        except Exception:
            continue  # what was noted until then is true


def _inputs(model: Any, parameters: Any) -> dict[str, Any]:
    """The least that a model takes: tokens, an image, or sound."""
    config, main = model.config, model.main_input_name
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64)
    inputs: dict[str, Any] = {key: tokens for key in ("input_ids", "decoder_input_ids") if key in parameters}
    if main == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs[main] = torch.zeros(1, getattr(config, "num_channels", 3), height, width)
    elif main == "input_features":
        inputs[main] = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    elif main == "input_values":
        inputs[main] = torch.zeros(1, _SAMPLES)
    return inputs


class _Noting(nn.Module):
    """Takes the place of a linear layer as a clustered one does, and notes what is done to it."""

    def __init__(self, name: str, dense: nn.Module, log: dict[str, set[str]]) -> None:
        super().__init__()
        self.__dict__.update(_name=name, _dense=dense, _log=log)
        self.bias = dense.bias
        for key in ("in_features", "out_features", "nx", "nf"):
            if hasattr(dense, key):
                setattr(self, key, getattr(dense, key))

    @property
    def weight(self) -> torch.Tensor:
        weight = self._dense.weight
        self._log["read"].add(self._name)

        def make() -> torch.Tensor:
            self._log["computed"].add(self._name)
            return weight

        return LazyWeight(tuple(weight.shape), weight.dtype, weight.device, make)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._log["called"].add(self._name)
        return self._dense(x)


def _run_once(model: nn.Module) -> dict[str, str]:
    """Lets blocks that are alike in a list run once: the others answer what the first did. Their names, and its."""
    alike: dict[str, str] = {}
    for name, blocks in model.named_modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        known: dict[Any, tuple[str, list]] = {}
        for index, block in enumerate(blocks):
            key = _signature(block, index)
            if key in known:
                alike[f"{name}.{index}"], last = known[key]
                _answer(block, last)
            else:
                known[key] = (f"{name}.{index}", [])
                block.register_forward_hook(lambda module, args, output, last=known[key][1]: last.append(output))
    return alike


def _answer(block: nn.Module, last: list) -> None:
    forward = block.forward
    block.forward = lambda *args, **kwargs: last[-1] if last else forward(*args, **kwargs)  # type: ignore


def _signature(block: nn.Module, index: int) -> Any:
    """All that may set a block apart but its place in the list."""
    own = []
    for name, module in block.named_modules():
        shapes = {key: None if value is None else value.shape for key, value in module._parameters.items()}
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and (type(value) is bool or value != index)
        }
        own.append((name, type(module), tuple(shapes.items()), tuple(sorted(plain.items()))))
    return tuple(own)


class _Guess(TorchFunctionMode):
    """Answers for tensors without numbers where code asks for one."""

    _ANSWERS = {"__bool__": False, "__int__": 1, "__index__": 1, "__float__": 1.0, "item": 1}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            name = getattr(func, "__name__", "")
            if name in self._ANSWERS:
                return self._ANSWERS[name]
            if name == "tolist":
                return np.zeros(args[0].shape, dtype=int).tolist()
        return func(*args, **(kwargs or {}))


@contextmanager
def _nothing_else_changes() -> Iterator[None]:
    """Everything on meta, in bf16 (which is what kernels of experts take); random numbers stay as they are."""
    states, dtype = (random.getstate(), np.random.get_state()), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("meta"), _Guess():
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            random.setstate(states[0])
            np.random.set_state(states[1])
