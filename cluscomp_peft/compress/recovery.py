"""Recovery: train the codebooks of a compressed model until it speaks like the dense one again.

Compression looks at one block at a time; what all of them lose together is won back here, end to end, while the codes
stay (the paper's ClusComp+, section 3.3). The loss per predicted token is

    w · T² · KL(p ‖ q) + (1 − w) · (−log q₁[next token])

with w = `kl_weight`, p and q the softmax of the dense teacher's and of the student's logits / T, and q₁ that at T = 1.
It differs from the reference's scripts: KL is a mean over tokens, computed in fp32 for some at a time and again
in the backward pass, so that nothing of tokens × vocabulary is kept beside the logits. And the teacher may be a file,
its k likeliest tokens at every position and one bucket for all others, which can only lower the divergence:

    KL ≥ Σ_{top k} p log(p / q) + p_rest log(p_rest / q_rest)            equal for k = vocabulary

What is trained is whatever of the model requires gradients: codebooks and scales, if PEFT prepared it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import Trainer

from ..upstream.accelerate import device_map_of
from ..upstream.transformers import keep_columns, tokens_are_counted
from .stream.journal import replace_file

__all__ = ["CachedTeacher", "RecoveryTrainer", "cache_teacher_logits", "collate", "recovery_losses"]

IGNORED = -100
_TEMPERATURES = (1e-3, 1e3)
_CACHED = ("teacher_tokens", "teacher_log_probs")
# Logits to compute on at a time: temporaries of 4 MiB stay in a CPU's cache, those of 64 MiB keep a GPU busy.
_CHUNK = {"cpu": 2**20, "cuda": 2**24}


class RecoveryTrainer(Trainer):
    """HF `Trainer` that mixes the divergence from a teacher with the next-token loss.

    Rows have `input_ids` and, where not every token counts, `labels` (-100: does not). Logs `kl` and `next_token_loss`
    too, in evaluation as `eval_kl` and `eval_next_token_loss`, so that either can be the `metric_for_best_model`.

    Args:
        model, args, data_collator, **kwargs: As in `Trainer`; [`collate`] is the default collator.
        teacher (`nn.Module`, *optional*): The dense model, run without gradients in its own dtype. None: the data sets
            are [`CachedTeacher`]s, or `kl_weight` is 0.
        kl_weight (`float`): w, from 0 (next-token loss alone) to 1 (divergence alone).
        temperature (`float`): T.

    Raises:
        ValueError: If a value is out of range, or the teacher is missing or no model of the student's vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        data_collator: Any = None,
        *,
        teacher: nn.Module | None = None,
        kl_weight: float = 1.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        _check_range("kl_weight", kl_weight, 0, 1)
        _check_range("temperature", temperature, *_TEMPERATURES)
        if teacher is not None:
            _check_vocabulary(_vocabulary(model), _vocabulary(teacher))
        for data in (kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            if isinstance(data, CachedTeacher):
                _check_vocabulary(_vocabulary(model), data.vocabulary)
                if data.temperature != temperature:
                    raise ValueError(f"{data.path} was cached at temperature {data.temperature}, not {temperature}.")
        super().__init__(model, args, data_collator or collate, **kwargs)
        tokens_are_counted(self)
        self.kl_weight, self.temperature = kl_weight, temperature
        self.teacher = teacher.eval() if teacher is not None and kl_weight > 0 else None
        if self.teacher is not None and device_map_of(self.teacher) is None:
            self.teacher.to(self.args.device)
        self._sums: dict[bool, torch.Tensor] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss: a sum over tokens, divided by `num_items_in_batch`, or by how many there are."""
        inputs = {**inputs, "use_cache": False}
        # Kept from the model, which would compute a loss in fp32 over the whole vocabulary.
        labels = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        teacher = [inputs.pop(name) for name in _CACHED if name in inputs]
        outputs = model(**inputs)
        if self.kl_weight == 0:
            teacher = []
        elif self.teacher is not None:
            with torch.no_grad():
                teacher = [self.teacher(**inputs).logits]
        elif not teacher:
            raise ValueError(
                f"kl_weight is {self.kl_weight}, but there is no teacher: give one, wrap the data set in "
                "CachedTeacher, or set kl_weight=0."
            )
        sums = recovery_losses(outputs.logits, labels, teacher, temperature=self.temperature)
        count = (labels != IGNORED).sum()
        total = torch.stack([*sums.detach(), count.to(sums)])
        self._sums[model.training] = total + self._sums.get(model.training, 0)
        loss = self.kl_weight * sums[0] + (1 - self.kl_weight) * sums[1]
        if num_items_in_batch is None:
            loss = loss / count.clamp(min=1)
        else:  # one number, or shares of it for replicas on several GPUs
            loss = loss / torch.as_tensor(num_items_in_batch).sum()
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # whose mean of gradients divides by it again
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds both means since the last time to `logs`, in place, so that `evaluate` returns them too."""
        prefix = next((key.removesuffix("loss") for key in logs if key.endswith("loss")), "train_")
        if prefix != "train_" and (sums := self._sums.pop(prefix == "", None)) is not None:
            kl, next_token, count = self.accelerator.reduce(sums, "sum").tolist()
            means = {"kl": kl / max(count, 1), "next_token_loss": next_token / max(count, 1)}
            logs.update({prefix + key: value for key, value in means.items() if key != "kl" or self.kl_weight > 0})
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        keep_columns(self, _CACHED)


def recovery_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: Sequence[torch.Tensor] = (),
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """T² · KL and the next-token loss, summed over the tokens that count: [2], fp32 or better.

    Args:
        logits (`torch.Tensor`): The student's, [..., vocabulary].
        labels (`torch.Tensor`): The token that each position predicts, [...]; -100: does not count.
        teacher (sequence of `torch.Tensor`): Its logits [..., vocabulary]; or its top tokens [..., k] and [..., k + 1]
            log-probabilities at this temperature, of these and of all others; or nothing, and KL is 0.
        chunk_tokens (`int`, *optional*): Tokens to compute on at a time.
    """
    vocabulary = logits.shape[-1]
    if len(teacher) == 1:
        _check_vocabulary(vocabulary, teacher[0].shape[-1])
    size = chunk_tokens or max(1, _CHUNK.get(logits.device.type, 2**24) // vocabulary)
    # `split`, not slices: its backward joins the chunks' gradients instead of adding up as many full ones.
    parts = [part.split(size) for part in (logits.flatten(0, -2), labels.flatten())]
    chunks = zip(*parts, *(part.flatten(0, -2).split(size) for part in teacher), strict=True)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(_losses, temperature, *chunk, **options) for chunk in chunks]).sum(0)


def _losses(temperature: float, logits: torch.Tensor, labels: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    next_token = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if not teacher:
        return torch.stack([torch.zeros_like(next_token), next_token])
    log_q = F.log_softmax(logits / temperature, dim=-1)
    log_p = teacher[-1].to(log_q)
    if len(teacher) == 1:
        log_p = F.log_softmax(log_p / temperature, dim=-1)
    else:
        tokens = teacher[0].long()
        top = log_q.gather(-1, tokens)
        if tokens.shape[-1] < logits.shape[-1]:
            log_q = torch.cat([top, log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)], dim=-1)
        else:
            log_q, log_p = top, log_p[:, :-1]
        log_p = F.log_softmax(log_p, dim=-1)  # rounded to 16 bits they do not sum to 1
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.stack([temperature**2 * divergence[labels != IGNORED].sum(), next_token])


def cache_teacher_logits(
    model: nn.Module, dataset: Any, path: str, *, top_k: int = 64, temperature: float = 1.0, batch_size: int = 4
) -> None:
    """Runs the teacher over rows with `input_ids` and writes its top k for [`CachedTeacher`], 6 · k bytes per token.

    There is a shard for `batch_size` rows, which exists when it is whole: a run that was killed goes on where it was.

    Raises:
        ValueError: If a value is out of range, or the folder `path` holds shards of other tokens, teachers, settings.
    """
    vocabulary, device = _vocabulary(model), next(model.parameters()).device
    _check_range("top_k", top_k, 1, vocabulary)
    _check_range("temperature", temperature, *_TEMPERATURES)
    os.makedirs(path, exist_ok=True)
    model.eval()
    facts = {"vocabulary": vocabulary, "temperature": float(temperature), "top_k": top_k, "teacher": _digest(model)}

    def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = F.log_softmax(logits.float() / temperature, dim=-1)
        values, tokens = log_p.topk(top_k, dim=-1)
        others = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        return tokens.int().cpu(), torch.cat([values, others], dim=-1).half().cpu()

    for start in tqdm(range(0, len(dataset), batch_size), desc="Asking the teacher", unit="shard", disable=None):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        name, metadata = _shard(path, start // batch_size), {**facts, "fingerprint": _fingerprint(rows)}
        if os.path.exists(name):
            _check(name, metadata)
            continue
        batch = collate([{"input_ids": row["input_ids"]} for row in rows])
        with torch.no_grad():
            inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
            parts = zip(*map(likeliest, model(**inputs, use_cache=False).logits), strict=True)
        tensors = dict(zip(_CACHED, map(torch.stack, parts), strict=True))
        replace_file(name, partial(save_file, tensors, metadata={"teacher": json.dumps(metadata)}))


class CachedTeacher(torch.utils.data.Dataset):
    """Rows of a data set with what [`cache_teacher_logits`] wrote for them, from the folder `path`.

    Raises:
        ValueError: If a shard is missing or damaged, or was written for other tokens.
    """

    def __init__(self, dataset: Any, path: str) -> None:
        self.dataset, self.path = dataset, path
        shape, facts = _open(_shard(path, 0))
        self._rows, self.vocabulary, self.temperature = shape[0], facts["vocabulary"], facts["temperature"]
        for start in range(0, len(dataset), self._rows):
            rows = [dataset[i] for i in range(start, min(start + self._rows, len(dataset)))]
            _check(_shard(path, start // self._rows), {"fingerprint": _fingerprint(rows)})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        with safe_open(_shard(self.path, index // self._rows), framework="pt") as file:
            cached = {key: file.get_slice(key)[index % self._rows, : len(row["input_ids"])] for key in _CACHED}
        return {**row, **cached}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right; `labels` are the `input_ids` where there are none."""
    batch = {}
    for name in ("input_ids", "labels", *(name for name in _CACHED if name in rows[0])):
        values = [torch.as_tensor(row.get(name, row["input_ids"])) for row in rows]
        padding = IGNORED if name == "labels" else 0
        batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


def _shard(path: str, number: int) -> str:
    return os.path.join(path, f"teacher-{number:06d}.safetensors")


def _fingerprint(rows: list[dict[str, Any]]) -> str:
    tokens = [torch.as_tensor(row["input_ids"]).tolist() for row in rows]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:32]


def _digest(model: nn.Module) -> str:
    """Of the first numbers of every parameter: enough to tell two teachers apart."""
    parts = [parameter.detach().flatten()[:8].tolist() for parameter in model.parameters()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _open(name: str) -> tuple[list[int], dict[str, Any]]:
    try:
        with safe_open(name, framework="pt") as file:
            shape = file.get_slice(_CACHED[0]).get_shape()
            return shape, json.loads(file.metadata()["teacher"])
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise ValueError(f"{name} is missing or damaged ({error}); remove it and run cache_teacher_logits.") from error


def _check(name: str, wanted: dict[str, Any]) -> None:
    facts = _open(name)[1]
    for key, value in wanted.items():
        if facts.get(key) != value:
            what = "tokens" if key == "fingerprint" else f"{key}: {facts.get(key)}, not {value}"
            raise ValueError(f"{name} was written for other {what}; use another folder, or remove this one.")


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {value}.")


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config().vocab_size


def _check_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(
            f"the student has a vocabulary of {student} tokens and the teacher one of {teacher}; the teacher must be "
            "the model that was compressed."
        )
