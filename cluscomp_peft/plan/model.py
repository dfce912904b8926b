"""The model of a plan: built on the meta device from its config, clustered at any bits, a block of each kind run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from ..codes import ClusterSpec
from ..compress.calibration.blocks import find_blocks
from ..compress.policy import DEFAULT_BITS
from ..compress.stream.headers import check_folder
from ..dense import weight_of
from ..experts import unfuse
from ..hf.config import ClusCompQuantizationConfig
from ..hf.reading import stored_specs
from ..linear import ClusteredLinear
from ..tuner.clustered_layer import ClusCompLinear
from ..tuner.config import ClusCompConfig
from ..tuner.layer import NewAdapter
from .ledger import TILE_BYTES, FusedAttention, Ledger
from .settings import DTYPES, Settings

__all__ = ["Model", "Stored", "Tensor", "Use", "from_widths"]


class Tensor(NamedTuple):
    """A parameter of a model with an adapter.

    Args:
        place (`int`): Index of its block; -1 before the first block, the number of blocks behind the last.
        kind (`str`): "codes", "codebooks" (with scales), "dense" or "deltas".
        rows, numel (`int`): Size of the first dimension, and of all.
        itemsize (`int`): Bytes of one number.
    """

    place: int
    kind: str
    rows: int
    numel: int
    itemsize: int


class Stored(NamedTuple):
    """A model at some bits: the spec of each clustered layer, how many weights these have, all tensors."""

    specs: dict[str, ClusterSpec]
    weights: int
    tensors: list[Tensor]

    @property
    def codes(self) -> int:
        """Bytes of the codes."""
        return sum(tensor.numel * tensor.itemsize for tensor in self.tensors if tensor.kind == "codes")

    @property
    def codebooks(self) -> int:
        """Bytes of codebooks and scales."""
        return sum(tensor.numel * tensor.itemsize for tensor in self.tensors if tensor.kind == "codebooks")

    def by_block(self, blocks: int) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
        """Tensors before the blocks, in each block, and behind them."""
        found: list[list[Tensor]] = [[] for _ in range(blocks + 2)]
        for tensor in self.tensors:
            found[tensor.place + 1].append(tensor)
        return found[0], found[1:-1], found[-1]


class Use(NamedTuple):
    """Bytes of one block in a dry run.

    Args:
        hidden (`int`): Of its output, which is as large as its input.
        kept (`int`): Of what it keeps for backward.
        work (`int`): The most that forward and backward add to what was held before, `kept` included.
        tail (`int`): Of what comes behind the last block, through the loss and back, with that block's output.
    """

    hidden: int
    kept: int
    work: int
    tail: int


class Model:
    """The model on the meta device, and what dry runs of its blocks counted."""

    def __init__(self, path: str, settings: Settings) -> None:
        check_folder(path)
        config = AutoConfig.from_pretrained(path)
        found = getattr(config, "quantization_config", None)
        if isinstance(found, dict) and found.get("quant_method") == "cluscomp":
            found = ClusCompQuantizationConfig.from_dict(found)
        self.compressed = isinstance(found, ClusCompQuantizationConfig)
        if found is not None:
            if not self.compressed:
                kind = found.get("quant_method") if isinstance(found, dict) else type(found).__name__
                raise ValueError(f"{path} is quantised already, by {kind}; plan for the dense model.")
            del config.quantization_config
        self.quantization: ClusCompQuantizationConfig = found or ClusCompQuantizationConfig()
        if self.compressed and settings.bits is not None:
            raise ValueError(f"{path} is compressed already, it has its own bits; leave out --bits {settings.bits:g}.")
        self.default_bits = DEFAULT_BITS
        self.disk_dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
        self.settings, self.dtype = settings, DTYPES[settings.dtype]
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        unfuse(self.model)
        self.model.requires_grad_(False)
        self.limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        vocabulary, self.hidden = self.model.get_input_embeddings().weight.shape
        head = self.model.get_output_embeddings()
        self.vocabulary = vocabulary if head is None else weight_of(head).shape[0]
        self.tied = head is not None and head.weight is self.model.get_input_embeddings().weight
        self.troubles: list[str] = []
        self._stored: dict[float, Stored] = {}
        self._uses: dict[tuple, Use] = {}
        self.prefix, blocks = find_blocks(self.model) or ("", nn.ModuleList())
        self.blocks = list(blocks)
        stored = self.stored(settings.bits or self.default_bits)
        if self.compressed:
            self.default_bits = round(8 * (stored.codes + stored.codebooks) / stored.weights, 3)
        specs = stored.specs
        self.linears = {name: self.model.get_submodule(name) for name in specs}
        # One block stands for all of its shape.
        self.kinds: dict[Any, list[int]] = {}
        for index, block in enumerate(self.blocks):
            shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
            self.kinds.setdefault((type(block), shapes), []).append(index)

    def dense_bytes(self, itemsize: int) -> int:
        """Bytes of what is not clustered: embeddings, head, norms, biases."""
        clustered = sum(layer.weight.numel() for layer in self.linears.values())
        return (self.parameters - clustered) * itemsize

    def stored(self, bits: float) -> Stored:
        """The model at so many bits, chosen as `cluscomp compress` does without calibration."""
        if bits in self._stored:
            return self._stored[bits]
        if self.compressed:
            specs = stored_specs(self.model, self.quantization)
        else:
            specs = replace(self.quantization.policy, bits=bits).specs(self.model)
        vocabulary = self.quantization.policy.embeddings_of(self.model) if self.compressed else {}
        weights = 0
        tensors: list[Tensor] = []
        counted: dict[tuple, list[Tensor]] = {}
        for name, spec in specs.items():
            dense = self.model.get_submodule(name)
            out_features, in_features = weight_of(dense).shape
            if name in vocabulary:  # which takes no adapter
                layer = ClusteredLinear(
                    in_features, out_features, spec, codebook_dtype=self.quantization.dtype, device="meta"
                )
                weights += in_features * out_features
                place = -1 if isinstance(dense, nn.Embedding) else len(self.blocks)
                tensors += [tensor._replace(place=place) for tensor in _frozen(layer)]
                continue
            if self.settings.num_blocks is not None and self.settings.num_blocks > in_features:
                raise ValueError(
                    f"num_blocks={self.settings.num_blocks} is more than the {in_features} input channels of {name}; "
                    "a block needs at least one."
                )
            key = (in_features, out_features, spec)
            if key not in counted:
                counted[key] = list(_tensors(self._adapted(dense, spec)))
            weights += in_features * out_features
            tensors += [tensor._replace(place=self._block_of(name)) for tensor in counted[key]]
        clustered = {id(self.model.get_submodule(name).weight) for name in specs}
        reached = -1
        for name, parameter in self.model.named_parameters():
            index = self._block_of(name)
            # Outside of the blocks: before the first block's parameters, or behind them.
            reached = len(self.blocks) if reached >= 0 or index >= 0 else -1
            if id(parameter) not in clustered:
                place = index if index >= 0 else reached
                tensors.append(_tensor(place, "dense", parameter, self.dtype.itemsize))
        self._stored[bits] = Stored(specs, weights, tensors)
        return self._stored[bits]

    def _block_of(self, name: str) -> int:
        """The index of the block that a parameter's name lies in, -1 for none."""
        if not self.blocks or not name.startswith(f"{self.prefix}."):
            return -1
        return int(name.removeprefix(f"{self.prefix}.").split(".")[0])

    def _adapted(self, dense: nn.Module, spec: ClusterSpec) -> ClusCompLinear:
        """The layer as it is finetuned, on the meta device."""
        out_features, in_features = weight_of(dense).shape
        base = ClusteredLinear(
            in_features,
            out_features,
            spec,
            bias=dense.bias is not None,
            codebook_dtype=self.quantization.dtype,
            dtype=self.dtype,
            device="meta",
            conv1d=isinstance(dense, Conv1D),
        )
        config = ClusCompConfig(rank=self.settings.rank, num_blocks=self.settings.num_blocks)
        return ClusCompLinear(base, NewAdapter("default", config), torch.device("meta"))

    def _block(self, index: int, bits: float | None, adapter: bool) -> nn.Module:
        """A copy of a block: clustered, with or without an adapter, or dense and trainable where `bits` is None."""
        block = copy.deepcopy(self.blocks[index])
        if bits is None:
            block.requires_grad_(True)
        else:
            for name, spec in self.stored(bits).specs.items():
                place = f"{self.prefix}.{index}."
                if name.startswith(place):
                    layer = self._adapted(self.linears[name], spec)
                    block.set_submodule(name.removeprefix(place), layer if adapter else layer.base_layer)
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # a part of its own; backward adds to it
        return block

    def training(self, bits: float | None, batch: int, seqlen: int) -> dict[int, Use]:
        """What blocks use in a training step, by the index of the first of a kind. `bits` None: full finetuning."""
        return {
            members[0]: self._use(("train", members[0], bits, batch, seqlen), self._train)
            for members in self.kinds.values()
        }

    def serving(self, bits: float, batch: int, seqlen: int) -> dict[int, Use]:
        """The same for one pass over a prompt, where `kept` are keys and values."""
        return {
            members[0]: self._use(("serve", members[0], bits, batch, seqlen), self._prefill)
            for members in self.kinds.values()
        }

    def _use(self, key: tuple, measure: Callable[..., Use]) -> Use:
        if key not in self._uses:
            try:
                self._uses[key] = measure(*key[1:])
            except Exception as error:  # a model's forward may do anything, and may never have run on this device
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.troubles.append(f"{type(self.model).__name__} does not run on the meta device ({reason})")
                self._uses[key] = from_widths(self, key[0], key[1], *key[3:])
        return self._uses[key]

    def _train(self, index: int, bits: float | None, batch: int, seqlen: int) -> Use:
        block = self._block(index, bits, adapter=True)
        ledger = self._dry_run(block.train(), 2, batch, seqlen, training=True)
        places = [number for number, mark in enumerate(ledger.marks) if mark.name == "out"]
        end = ledger.marks[places[-1]]
        # The first of two rounds makes what all blocks share, such as position embeddings and masks.
        start = ledger.marks[places[0] if len(places) > 1 else 0].live
        turn, back = ledger.marks[places[-1] + 1 : places[-1] + 3]
        work = max(end.peak + ledger.hidden, back.peak) - start
        return Use(ledger.hidden, end.live - start, work, turn.peak - end.live + ledger.hidden)

    def _prefill(self, index: int, bits: float, batch: int, seqlen: int) -> Use:
        block = self._block(index, bits, adapter=False)
        ledger = self._dry_run(block.eval(), 1, batch, seqlen, training=False)
        start, end = ledger.marks
        cache = ledger.live
        return Use(ledger.hidden, cache, end.peak - start.live + ledger.hidden, 0)

    def _dry_run(self, block: nn.Module, rounds: int, batch: int, seqlen: int, training: bool) -> Ledger:
        """Runs the model with this block, `rounds` times, as its only blocks; returns the ledger of that."""
        ledger = Ledger(self.settings.device)

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if torch.is_grad_enabled():
                hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
                hidden.register_hook(lambda _: ledger.mark("back"))
            ledger.mark("in")
            return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: ledger.mark("turn"))
            ledger.hidden = hidden.nbytes
            ledger.mark("out", later=True)

        handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        whole = self.model.get_submodule(self.prefix)
        self.model.set_submodule(self.prefix, nn.ModuleList([block] * rounds))
        self.model.train(training)
        try:
            tokens = torch.zeros(batch, seqlen, dtype=torch.int64, device="meta")
            with ledger, FusedAttention(), torch.set_grad_enabled(training):
                if training:
                    self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                else:
                    output = self.model(input_ids=tokens, use_cache=True, past_key_values=DynamicCache())
                    cache = output.past_key_values
                    del output
                    ledger.close()
                    del cache
        finally:
            self.model.set_submodule(self.prefix, whole)
            for handle in handles:
                handle.remove()
        return ledger


def _tensor(place: int, kind: str, parameter: torch.Tensor, itemsize: int) -> Tensor:
    return Tensor(place, kind, parameter.shape[0] if parameter.dim() else 1, parameter.numel(), itemsize)


def _frozen(layer: ClusteredLinear) -> Iterator[Tensor]:
    """The tensors of a clustered layer, its bias left out."""
    for name, parameter in layer.named_parameters():
        if name != "bias":
            yield _tensor(-1, "codes" if name == "codes" else "codebooks", parameter, parameter.itemsize)


def _tensors(layer: ClusCompLinear) -> Iterator[Tensor]:
    """The tensors of a layer as it is finetuned, its bias left out."""
    yield from _frozen(layer.base_layer)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            yield _tensor(-1, "deltas", parameter, parameter.itemsize)


def from_widths(model: Model, kind: str, index: int, batch: int, seqlen: int) -> Use:
    """An estimate from the linear layers of a block.

    Each layer keeps its input and its output, and norms and activation functions keep a quarter of that again.
    Backward adds one decoded weight and fp32 gradients of the widest layer. Keys and values are as wide as the
    narrowest two layers that read the block's input.
    """
    tokens, size = batch * seqlen, model.dtype.itemsize
    place = f"{model.prefix}.{index}."
    shapes = [weight_of(layer).shape for name, layer in model.linears.items() if name.startswith(place)]
    shapes = shapes or [weight_of(layer).shape for layer in model.linears.values()]
    kept = tokens * size * sum(sum(shape) for shape in shapes) * 5 // 4
    widest = max(shapes, key=math.prod)
    work = math.prod(widest) * size + tokens * sum(widest) * (size + 4) + TILE_BYTES[model.settings.device]
    hidden = tokens * model.hidden * size
    if kind == "serve":
        widths = sorted(shape[0] for shape in shapes if shape[1] == model.hidden)[:2]
        return Use(hidden, tokens * size * sum(widths), work, 0)
    return Use(hidden, kept, kept + work, tokens * model.vocabulary * (size + 12))
