"""The jobs that a plan knows, each a list of parts. A part that is added here appears in totals, tables and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from ..codes import ClusterSpec
from ..compress.calibration.inputs import KEPT_BYTES
from ..compress.specs import SENSITIVITY_TOKENS
from ..compress.stream.calibrated import Calibration
from ..compress.stream.pipeline import TOGETHER
from ..dense import weight_of
from .installed import nf4_bits, states_of_8bit
from .model import Model, Use, from_widths
from .parts import BACKWARD, GIB, LOSS, Job, Part
from .settings import Settings
from .sharding import Engine, engine_of

__all__ = [
    "CUDA_CONTEXT",
    "FRAGMENTATION",
    "calibration_length",
    "compress",
    "compress_calibrated",
    "disk",
    "finetune",
    "full",
    "qlora",
    "serve",
]

CUDA_CONTEXT = GIB // 2
FRAGMENTATION = 0.05  # of everything on a GPU: what its allocator holds and cannot hand out
_KINDS = {
    "codes": "codes",
    "codebooks": "codebooks and scales",
    "dense": "embeddings, head, norms, biases",
}
_INTERPRETER = 650_000_000  # Python with torch, transformers, PEFT, what those import, and compiled kernels
_LOSS_TILE = (4096, 8192)  # tokens and words of the logits that a chunked loss holds at once: an allowance


def finetune(model: Model, settings: Settings) -> Job:
    """What one device holds."""
    assert settings.bits is not None
    engine = engine_of(model, model.stored(settings.bits), settings)
    updated = engine.update()
    alone = settings.world_size == 1
    return _job(
        "finetuning" if alone else f"finetuning: each of {settings.world_size} devices, {settings.engine}",
        settings,
        [
            *_weights(model, settings, engine),
            Part("deltas, fp32", 4 * sum(updated)),
            Part("gradients of deltas, fp32", 4 * sum(updated)),
            Part(f"states of {settings.optimizer}", sum(map(partial(_states, settings.optimizer), updated))),
            *engine.extra(),
            *_activations(model, settings, model.training(settings.bits, settings.batch, settings.seqlen)),
        ],
    )


def _weights(model: Model, settings: Settings, engine: Engine) -> list[Part]:
    tensors = engine.stored.tensors
    parts = [
        Part(name, sum(engine.hold(tensor) * tensor.itemsize for tensor in tensors if tensor.kind == kind))
        for kind, name in _KINDS.items()
    ]
    if settings.device == "cpu" and model.disk_dtype != model.dtype:
        # Weights stay where the file is mapped into memory; those that are cast are there a second time.
        parts.append(Part("the file's pages of what was cast", model.dense_bytes(model.disk_dtype.itemsize)))
    return parts


def _activations(model: Model, settings: Settings, uses: dict[int, Use]) -> list[Part]:
    """What a training step adds to weights, gradients and states."""
    counts = [len(members) for members in model.kinds.values()]
    blocks = max(1, sum(counts))
    if not uses:
        uses, counts = {0: from_widths(model, "train", 0, settings.batch, settings.seqlen)}, [1]
    heaviest = max(uses.values(), key=lambda use: use.work)
    tokens = settings.batch * settings.seqlen
    tail = heaviest.tail
    if settings.chunked_loss:
        tile = min(tokens, _LOSS_TILE[0]) * min(model.vocabulary, _LOSS_TILE[1])
        tail = heaviest.hidden * 2 + 4 * tokens * model.hidden + 4 * tile
    if settings.gradient_checkpointing:
        inputs = sum(use.hidden * count for use, count in zip(uses.values(), counts, strict=True))
        parts = [
            Part(f"inputs of {blocks} blocks", inputs),
            Part("what the block at work keeps", heaviest.kept, BACKWARD),
        ]
    else:
        kept = sum(use.kept * count for use, count in zip(uses.values(), counts, strict=True))
        parts = [Part(f"what {blocks} blocks keep", kept)]
    parts.append(Part("a decoded weight, tiles, gradients in flight", heaviest.work - heaviest.kept, BACKWARD))
    return [*parts, Part("logits and loss" + ", in chunks" * settings.chunked_loss, tail, LOSS)]


def serve(model: Model, settings: Settings) -> Job:
    assert settings.bits is not None
    uses = model.serving(settings.bits, settings.batch, settings.seqlen)
    counts = [len(members) for members in model.kinds.values()]
    if not uses:
        uses, counts = {0: from_widths(model, "serve", 0, settings.batch, settings.seqlen)}, [1]
    cache = sum(use.kept * count for use, count in zip(uses.values(), counts, strict=True))
    return _job(
        "serving",
        settings,
        [
            *_weights(model, settings, Engine(model, model.stored(settings.bits), settings)),
            Part("keys and values", cache),
            Part("a block reads the prompt, a decoded weight", max(use.work - use.kept for use in uses.values())),
            Part("logits of the last tokens", settings.batch * model.vocabulary * (model.dtype.itemsize + 4)),
        ],
    )


def compress(model: Model, settings: Settings) -> Job:
    """Host memory. K-means holds 12 bytes for each weight and 56 for each vector of what is clustered at once."""
    assert settings.bits is not None
    specs = model.stored(settings.bits).specs
    weights = {name: layer.weight.numel() for name, layer in model.linears.items()}
    members = _by_block(model)
    together = max(
        min(sum(map(weights.__getitem__, names)), max(TOGETHER, *map(weights.__getitem__, names))) for names in members
    )
    per_weight = max(12 + 56 / spec.group_size for spec in specs.values())
    codes = max(sum(_stored_bytes(model, name, specs[name]) for name in names) for names in members)
    return _job(
        "compressing",
        replace(settings, device="cpu"),
        [
            Part("matrices that are clustered at once", int(together * per_weight), "clustering"),
            Part("codes of one block", codes, "clustering"),
            Part("the largest tensor that stays dense, twice", 2 * _largest_dense(model), "other tensors"),
        ],
    )


def compress_calibrated(model: Model, settings: Settings) -> Job:
    """Where the blocks run. Error feedback takes 52 · in² bytes for moments of inputs and their factors in fp64, and
    24 + 24 / group_size for each weight of the matrix at work."""
    assert settings.bits is not None
    specs = model.stored(settings.bits).specs
    size = 4 if settings.device == "cpu" else model.disk_dtype.itemsize
    weights = {name: layer.weight.numel() for name, layer in model.linears.items()}
    names = max(_by_block(model), key=lambda names: sum(map(weights.__getitem__, names)))
    outside = model.parameters - sum(p.numel() for block in model.blocks for p in block.parameters())
    largest = 0.0
    for name, layer in model.linears.items():
        in_features = weight_of(layer).shape[1]
        feedback = 52 * in_features**2 + (24 + 24 / specs[name].group_size) * weights[name]
        solve = 40 * in_features**2 + 36 * weights[name]
        largest = max(largest, feedback, solve)
    length = calibration_length(model)
    windows = torch.empty(settings.samples, length, device="meta")
    rows = len(Calibration(windows).batches[0])
    use = max(model.training(settings.bits, rows, length).values(), key=lambda use: use.work, default=None)
    use = use or from_widths(model, "train", 0, rows, length)
    kept = sum(weight_of(model.linears[name]).shape[1] for name in names) * settings.samples * length * size
    trained = sum(spec.num_clusters * spec.group_size for name, spec in specs.items() if name in names)
    parts = [
        Part("embeddings and head", outside * size),
        Part("one dense block", sum(map(weights.__getitem__, names)) * size),
        Part("inputs of its layers, as far as they are kept", min(kept, KEPT_BYTES), "feedback"),
        Part("error feedback of the largest matrix", int(largest), "feedback"),
        Part("reconstruction: activations", use.work * size // model.dtype.itemsize, "reconstruction"),
        Part("reconstruction: codebooks, gradients, Adam", 20 * trained, "reconstruction"),
    ]
    if settings.device == "cpu":
        tokens = min(SENSITIVITY_TOKENS, settings.samples * length)
        kept = len(model.blocks) * tokens * model.hidden * size
        parts.append(Part("sensitivities: inputs of all blocks", kept, "sensitivities"))
    return _job("compressing, with calibration", settings, parts)


def qlora(model: Model, settings: Settings, rank: int = 16) -> Job:
    """bitsandbytes' NF4 with doubly quantised scales; LoRA in fp32 on the same layers."""
    shapes = [weight_of(layer).shape for layer in model.linears.values()]
    adapters = [rank * width for shape in shapes for width in shape]
    states = sum(map(partial(_states, settings.optimizer), adapters))
    return _job(
        f"QLoRA: NF4, r {rank}",
        settings,
        [
            Part("weights", int(sum(map(math.prod, shapes)) * nf4_bits() / 8)),
            Part("embeddings, head, norms, biases", model.dense_bytes(model.dtype.itemsize)),
            Part("adapters, gradients, states", 8 * sum(adapters) + states),
            *_activations(model, settings, model.training(settings.bits, settings.batch, settings.seqlen)),
        ],
    )


def full(model: Model, settings: Settings) -> Job:
    """Weights and gradients in the dtype of the activations, AdamW in fp32."""
    return _job(
        f"full finetuning in {settings.dtype}",
        settings,
        [
            Part("weights", model.parameters * model.dtype.itemsize),
            Part("gradients", model.parameters * model.dtype.itemsize),
            Part("states of adamw", 8 * model.parameters),
            *_activations(model, settings, model.training(None, settings.batch, settings.seqlen)),
        ],
    )


def _job(name: str, settings: Settings, parts: Iterable[Part]) -> Job:
    """With what the framework takes."""
    job = Job(name, tuple(parts))
    if settings.device == "cpu":
        return replace(job, parts=(*job.parts, Part("Python and its imports", _INTERPRETER)))
    lost = Part(f"fragmentation, {FRAGMENTATION:.0%}", int(FRAGMENTATION * job.total))
    return replace(job, parts=(*job.parts, lost, Part("CUDA context", CUDA_CONTEXT)))


def _states(optimizer: str, numel: int) -> int:
    """Bytes of the two moments of a tensor."""
    return 8 * numel if optimizer == "adamw" else states_of_8bit(numel)


def _by_block(model: Model) -> list[list[str]]:
    """Names of the clustered layers of each block."""
    found = [
        [name for name in model.linears if name.startswith(f"{model.prefix}.{index}.")]
        for index in range(len(model.blocks))
    ]
    return [names for names in found if names] or [list(model.linears)]


def _stored_bytes(model: Model, name: str, spec: ClusterSpec) -> int:
    out_features, in_features = weight_of(model.linears[name]).shape
    return spec.num_bytes(in_features, out_features, model.quantization.dtype.itemsize)


def _largest_dense(model: Model) -> int:
    clustered = {id(layer.weight) for layer in model.linears.values()}
    sizes = [parameter.numel() for parameter in model.model.parameters() if id(parameter) not in clustered]
    return max(sizes, default=0) * model.disk_dtype.itemsize


def calibration_length(model: Model) -> int:
    return min(2048, model.limit or 2048)


def disk(model: Model, settings: Settings) -> dict[str, int]:
    """Four files of activations: dense and compressed, behind and before a block."""
    assert settings.bits is not None
    stored = model.stored(settings.bits)
    after = stored.codes + stored.codebooks + model.dense_bytes(model.disk_dtype.itemsize)
    if model.compressed:
        return {"compressed": after}
    size = 4 if settings.device == "cpu" else model.disk_dtype.itemsize
    streams = 4 * settings.samples * calibration_length(model) * model.hidden * size
    return {"dense": model.parameters * model.disk_dtype.itemsize, "compressed": after, "calibration": streams}
