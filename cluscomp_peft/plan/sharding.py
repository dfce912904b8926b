"""Finetuning on several devices: what one of them holds of each tensor, and what it holds to talk to the others.

    engine   codes, codebooks, dense   fp32 deltas, gradients, states   besides
    ddp      whole                     whole                            a copy of all gradients, in buckets
    zero2    whole                     numbers ÷ devices                deltas in the model's dtype, a bucket
    fsdp2    rows ÷ devices            rows ÷ devices                   whole blocks: that at work, and the next
    zero3    numbers ÷ devices         numbers ÷ devices                the same, deltas in its dtype, a bucket

"÷" rounds up, and every number is that of the first device, which holds the most. Settings are the engines' defaults:
those of torch's `DistributedDataParallel` and of DeepSpeed's `zero_optimization` are asked of what is installed;
`fully_shard` has the units that accelerate makes (each block; the embeddings; final norm and head together).
Activations are each device's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from .installed import ddp_copies_gradients, zero
from .model import Model, Stored, Tensor
from .parts import BACKWARD, GIB, LOSS, Part
from .settings import DTYPES, Settings

__all__ = ["Engine", "engine_of"]


class Engine:
    """One device by itself: it holds all of every tensor. Others say what they do differently."""

    def __init__(self, model: Model, stored: Stored, settings: Settings) -> None:
        self.model, self.stored, self.settings = model, stored, settings
        self.devices = settings.world_size
        self.trained = [tensor for tensor in stored.tensors if tensor.kind == "deltas"]

    def hold(self, tensor: Tensor) -> int:
        """How many numbers of a weight one device holds from the first step to the last."""
        return tensor.numel

    def update(self) -> list[int]:
        """Sizes of the tensors that one device updates; it holds them in fp32, with their gradients and states."""
        return [tensor.numel for tensor in self.trained]

    def extra(self) -> Iterable[Part]:
        """What the engine itself takes."""
        return ()

    def notes(self) -> Iterable[str]:
        """What these numbers assume."""
        return ()


class _DDP(Engine):
    def extra(self) -> Iterable[Part]:
        if ddp_copies_gradients():
            yield Part("gradients again, in buckets of DDP", 4 * sum(self.update()))

    def notes(self) -> Iterable[str]:
        saving = "; gradient_as_bucket_view=True would save the buckets" if ddp_copies_gradients() else ""
        yield f"ddp: every device holds all{saving}."


class _Zero2(Engine):
    def __init__(self, model: Model, stored: Stored, settings: Settings) -> None:
        super().__init__(model, stored, settings)
        self.itemsize = DTYPES[settings.dtype].itemsize

    def update(self) -> list[int]:
        return [-(-sum(tensor.numel for tensor in self.trained) // self.devices)]  # flattened, then cut

    def extra(self) -> Iterable[Part]:
        yield Part(f"deltas in {self.settings.dtype}, for blocks", self._cast())
        yield Part("DeepSpeed's bucket of gradients", zero().bucket * self.itemsize)

    def _cast(self) -> int:
        return self.itemsize * sum(tensor.numel for tensor in self.trained)

    def notes(self) -> Iterable[str]:
        bucket = zero().bucket
        yield (
            f"{self.settings.engine}: deltas and their gradients are cast to {self.settings.dtype}, the device that "
            f"updates them has fp32. The bucket is DeepSpeed's default reduce_bucket_size of {bucket:.0e} numbers, "
            f"{bucket * self.itemsize / GIB:.2f} GiB; transformers makes {self.model.hidden**2:.1e} of 'auto'."
        )


class _FSDP2(Engine):
    def hold(self, tensor: Tensor) -> int:
        # Padded: a tensor of fewer rows than devices takes a whole row everywhere.
        return -(-tensor.rows // self.devices) * (tensor.numel // tensor.rows)

    def update(self) -> list[int]:
        return [self.hold(tensor) for tensor in self.trained]

    def _whole(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of gathered tensors, padding included."""
        return self.devices * sum(self.hold(tensor) * tensor.itemsize for tensor in tensors)

    def extra(self) -> Iterable[Part]:
        first, blocks, last = self.stored.by_block(len(self.model.blocks))
        block = max(map(self._whole, blocks), default=0)
        before, after = self._whole(first), self._whole(last)
        if self.model.tied:
            # Embeddings and head are one unit of FSDP2 then, and both ends of the model need it.
            yield Part("embeddings, norm, head gathered", before + after)
            before = after = 0
        yield Part("the block at work gathered, the next on its way", block + max(block, before), BACKWARD)
        deltas = [[tensor for tensor in tensors if tensor.kind == "deltas"] for tensors in blocks]
        gradients = max((4 * sum(t.numel for t in few) + self._whole(few) for few in deltas), default=0)
        yield Part("its gradients, and those being reduced", gradients, BACKWARD)
        # Tensors arrive in a buffer and are copied out of it; the last block's stay until that is done.
        yield Part("norm and head gathered, buffers", 2 * after + block, LOSS)

    def notes(self) -> Iterable[str]:
        few = [tensor for tensor in self.stored.tensors if tensor.rows < self.devices]
        yield (
            "fsdp2: units are the blocks, the embeddings, and norm with head, as accelerate makes them; all but the "
            "last are resharded after forward. No mixed precision, so bytes travel as they are stored."
        )
        if few:
            size = sum(tensor.numel * tensor.itemsize for tensor in few)
            yield (
                "fsdp2 cuts by the first dimension, which of codebooks is their number of blocks: "
                f"{size / GIB:.2f} GiB have less than {self.devices} of it, and the first device holds most of them."
            )


class _Zero3(_Zero2):
    def _kept(self, tensor: Tensor) -> int:
        return tensor.numel if tensor.numel <= zero().persistent else 0

    def _share(self, tensor: Tensor) -> int:
        return -(-tensor.numel // self.devices)

    def hold(self, tensor: Tensor) -> int:
        return self._share(tensor) + self._kept(tensor)

    def _cast(self) -> int:
        # In fp32 the shares are the tensors that are updated.
        shares = 0 if self.itemsize == 4 else sum(map(self._share, self.trained))
        return self.itemsize * (shares + sum(map(self._kept, self.trained)))

    def _whole(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """Bytes and numbers of what is gathered on the way."""
        moving = [tensor for tensor in tensors if not self._kept(tensor)]
        return sum(t.numel * min(t.itemsize, self.itemsize) for t in moving), sum(t.numel for t in moving)

    def extra(self) -> Iterable[Part]:
        yield from super().extra()
        first, blocks, last = self.stored.by_block(len(self.model.blocks))
        head, head_numbers = self._whole([*first, *last] if self.model.tied else last)
        block, numbers = max(map(self._whole, blocks), default=(0, 0))
        gathered = block * min(len(blocks), self._around_the_turn(numbers, head_numbers))
        yield Part("blocks gathered: at work, next, last ones kept", gathered, BACKWARD)
        yield Part("norm, head and last blocks gathered", head + gathered, LOSS)

    def _around_the_turn(self, block: int, head: int) -> int:
        """How many of the last blocks are whole where forward turns to backward.

        DeepSpeed keeps a tensor gathered if the pass needs it again within `reuse` numbers. A block is passed twice,
        forward and back, and with checkpointing once more, to compute its activations again.
        """
        passes = 3 if self.settings.gradient_checkpointing else 2
        kept = -(-max(0, zero().reuse - 2 * head) // (passes * block)) if block else 0
        return max(1, kept) + 1

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            "zero3: one block at work and one fetched ahead; those at the end stay whole where they are needed again "
            f"within stage3_max_reuse_distance, {zero().reuse:.0e} numbers; tensors of up to {zero().persistent:.0e} "
            "always."
        )


_ENGINES = {None: Engine, "ddp": _DDP, "fsdp2": _FSDP2, "zero2": _Zero2, "zero3": _Zero3}


def engine_of(model: Model, stored: Stored, settings: Settings) -> Engine:
    """The engine that the settings ask for."""
    return _ENGINES[settings.engine](model, stored, settings)
