"""Recovery: train a compressed model's codebooks until it speaks like the dense one, at the same bits (ClusComp+).

    cluscomp finetune recover COMPRESSED OUT --teacher DENSE --data text.jsonl

COMPRESSED is what `cluscomp compress` made of DENSE; text is any that the dense model should know, a .jsonl or .txt
file (also .xz). Each step moves codebooks, and scales where the model has them, by AdamW on

    kl_weight · KL(dense ‖ compressed) + (1 − kl_weight) · next-token loss

with a short warm-up and a cosine. The state that is best on the last windows of the text, which are not trained on, is
merged and written to OUT, a compressed checkpoint like COMPRESSED with as many true bits. By default it imitates the
dense model alone and learns nothing from what the text says. `--kl_weight 0.9` also adapts it to the text, where its
loss may fall below the dense one's although it is no nearer to it: that is finetuning, and to be compared with such.

OUT appears when it is whole. Until then a hidden folder beside it holds the work; an interrupted run goes on from
there with the same command and `--resume`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..compress.calibration.text import read_documents, token_windows
from ..compress.recovery import CachedTeacher, RecoveryTrainer, cache_teacher_logits
from ..compress.stream.headers import check_folder
from ..export.merged import write_merged
from ..hf.evaluate import true_bits
from ..quiet import one_object, watched
from ..tuner.config import ClusCompConfig
from ..usage import Parser, with_names

__all__ = ["main"]

SETTINGS_NAME = "recovery.json"
_FREE = ("output_dir", "cache_teacher", "resume", "json")  # may be others when a run goes on


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the job that the words of a command line describe, by default those of this process.

    Raises:
        ValueError: If models, text and settings do not fit, or nothing was recovered.
    """
    options = _parse(arguments)
    with one_object(options.json) as result:
        result.update(_recover(options))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="cluscomp finetune recover",
        usage="cluscomp finetune recover MODEL OUT --teacher DENSE --data FILE [--FLAG VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="compressed model")
    parser.add_argument("--teacher", metavar="DIR_OR_ID", help="dense model; not needed with --kl_weight 0")
    parser.add_argument("--data", required=True, metavar="FILE", help=".jsonl or .txt, also .xz")
    parser.add_argument("--output_dir", required=True, metavar="OUT", help="folder to create")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps (default 300)")
    parser.add_argument("--learning_rate", type=float, default=2e-5, help="peak rate of AdamW (default 2e-5)")
    parser.add_argument("--kl_weight", type=float, default=1.0, help="1: imitate only (default); 0: text only")
    parser.add_argument("--temperature", type=float, default=1.0, help="of both distributions (default 1)")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step on one device (default 4)")
    parser.add_argument("--gradient_accumulation", type=int, default=1, help="batches of a step (default 1)")
    parser.add_argument("--seqlen", type=int, help="tokens of a window (default 2048, at most what the model takes)")
    parser.add_argument("--holdout", type=float, default=0.1, help="share of the windows to judge by (default 0.1)")
    parser.add_argument("--evaluations", type=int, default=5, help="how often to judge and to save (default 5)")
    parser.add_argument("--num_blocks", type=int, default=1, help="codebooks per matrix; more than 1 costs bits")
    parser.add_argument(
        "--train_scales", action=argparse.BooleanOptionalAction, help="default: where there are scales; new ones cost"
    )
    parser.add_argument("--cache_teacher", metavar="DIR", help="run the teacher once, keep its top k here")
    parser.add_argument("--top_k", type=int, default=64, help="of --cache_teacher (default 64)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, all else elsewhere")
    words = None if arguments is None else with_names(arguments, "--model", "--output_dir")
    return parser.parse_args(words)


def _recover(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the report holds of the run and the folder, in the first process; nothing in others."""
    started = time.perf_counter()
    parent, name = os.path.split(os.path.abspath(options.output_dir))
    work = os.path.join(parent, f".{name}.recovery")
    _check(options, work)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    student = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    if getattr(student.config, "quantization_config", None) is None:
        raise ValueError(f"{options.model} is not compressed; run `cluscomp compress` first.")
    bits = true_bits(student)
    train, held_out = _windows(options, tokenizer, student)
    teacher = None
    if options.kl_weight > 0:
        teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=options.dtype)
        if options.cache_teacher is not None:
            train, held_out = (
                _cached(options, teacher, train, "train"),
                _cached(options, teacher, held_out, "held_out"),
            )
            teacher = None
    trainer = RecoveryTrainer(
        get_peft_model(
            student,
            ClusCompConfig(task_type="CAUSAL_LM", num_blocks=options.num_blocks, train_scales=options.train_scales),
        ),
        _arguments(options, work),
        train_dataset=train,
        eval_dataset=held_out,
        teacher=teacher,
        kl_weight=options.kl_weight,
        temperature=options.temperature,
    )
    if trainer.is_world_process_zero():
        os.makedirs(work, exist_ok=True)
        with open(os.path.join(work, SETTINGS_NAME), "w", encoding="utf-8") as file:
            json.dump(_settings(options), file)
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if options.resume else None)
    after = trainer.evaluate()
    model = trainer.accelerator.unwrap_model(trainer.model)
    notes = {
        **_settings(options),
        "data": os.path.basename(options.data),
        "best_step": trainer.state.best_global_step,
        "seconds": time.perf_counter() - started,
        "before": {"true_bits": bits, **_losses(before)},
        "after": {"true_bits": true_bits(model), **_losses(after)},
    }
    trainer.accelerator.print(_table(notes))
    if not after["eval_loss"] < before["eval_loss"]:
        if trainer.is_world_process_zero():
            shutil.rmtree(work)
        raise ValueError(
            f"the loss on held-out text did not fall, from {before['eval_loss']:.4f} to {after['eval_loss']:.4f}; "
            "nothing was written. Try a smaller --learning_rate, or more text."
        )
    if trainer.is_world_process_zero():
        _save(model.merge_and_unload(safe_merge=True), tokenizer, options, work, notes)
        print(f"{options.output_dir}: recovered in {notes['seconds']:.0f} s, best at step {notes['best_step']}")
        return {"folder": options.output_dir, **notes}
    return {}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What makes a run, and has to be the same when it goes on."""
    return {key: value for key, value in vars(options).items() if key not in _FREE}


def _check(options: argparse.Namespace, work: str) -> None:
    """Refuses what cannot work before anything is loaded."""
    check_folder(options.model)
    if options.kl_weight > 0 and options.teacher is None:
        raise ValueError("imitating needs the dense model: give --teacher, or --kl_weight 0.")
    if not 0 < options.holdout < 1:
        raise ValueError(f"--holdout must be between 0 and 1, got {options.holdout}.")
    for name in ("steps", "batch", "gradient_accumulation", "evaluations"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    if os.path.exists(options.output_dir) and (
        not os.path.isdir(options.output_dir) or os.listdir(options.output_dir)
    ):
        raise ValueError(f"{options.output_dir} exists already; choose another folder, or remove it.")
    path = os.path.join(work, SETTINGS_NAME)
    if os.path.exists(path):
        if not options.resume:
            raise ValueError(f"{work} holds an interrupted run; go on with --resume, or remove it.")
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        for key, value in _settings(options).items():
            if found.get(key) != value:
                raise ValueError(f"the interrupted run had --{key} {found.get(key)}, not {value}; repeat its flags.")


def _cached(options: argparse.Namespace, teacher: Any, rows: list[dict], part: str) -> CachedTeacher:
    """Rows with the teacher's top k, in a folder of their own."""
    if torch.accelerator.is_available():
        teacher.to(torch.accelerator.current_accelerator())
    folder = os.path.join(options.cache_teacher, part)
    with PartialState().main_process_first():
        cache_teacher_logits(teacher, rows, folder, top_k=options.top_k, temperature=options.temperature)
    return CachedTeacher(rows, folder)


def _windows(options: argparse.Namespace, tokenizer: Any, model: Any) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows to judge by, the last ones of the text."""
    limit = getattr(model.config, "max_position_embeddings", None) or 2048
    length = min(2048, limit) if options.seqlen is None else options.seqlen
    if length > limit:
        raise ValueError(f"--seqlen {length} is more than the {limit} positions of the model; give at most {limit}.")
    documents = read_documents(options.data, tokenizer)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [{"input_ids": window[0]} for window in token_windows(documents, tokenizer, length, vocab_size=vocabulary)]
    count = max(1, round(options.holdout * len(rows)))
    if len(rows) <= count:
        raise ValueError(
            f"{options.data} makes {len(rows)} windows of {length} tokens, and {count} are held out; give more text, "
            "or a smaller --seqlen."
        )
    return rows[:-count], rows[-count:]


def _arguments(options: argparse.Namespace, work: str) -> TrainingArguments:
    often = max(1, options.steps // options.evaluations)
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # since transformers 5.23
    return TrainingArguments(
        output_dir=work,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.gradient_accumulation,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=None if watched() else True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=often,
        save_steps=often,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=often,
        report_to="none",
        seed=options.seed,
        **{"activation_checkpointing" if renamed else "gradient_checkpointing": options.gradient_checkpointing},
    )


def _losses(metrics: dict[str, float]) -> dict[str, float]:
    return {key: metrics[f"eval_{key}"] for key in ("kl", "next_token_loss") if f"eval_{key}" in metrics}


def _table(notes: dict[str, Any]) -> str:
    lines = [f"{'held-out text':<16}{'true bits':>10}{'KL to dense':>13}{'next-token loss':>17}"]
    for moment in ("before", "after"):
        row = notes[moment]
        kl = f"{row['kl']:.4f}" if "kl" in row else "-"
        lines.append(f"{moment:<16}{row['true_bits']:>10.3f}{kl:>13}{row['next_token_loss']:>17.4f}")
    return "\n".join(lines)


def _save(merged: Any, tokenizer: Any, options: argparse.Namespace, work: str, notes: dict[str, Any]) -> None:
    """Writes the checkpoint into the working folder, and renames it when it is whole."""
    name = os.path.basename(os.path.abspath(options.output_dir))
    scratch = os.path.join(work, name)
    shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(scratch)
    story = (
        f"After compression the codebooks were trained for {notes['best_step']} steps on {options.kl_weight:g} · KL "
        f"to the dense model + {1 - options.kl_weight:g} · next-token loss."
    )
    section = f"```\n{_table(notes)}\n```\n\n"
    write_merged(merged, tokenizer, scratch, name, options.model, story, section, recovery=notes)
    os.replace(scratch, options.output_dir)
    shutil.rmtree(work)
