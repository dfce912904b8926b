"""What each subcommand of `cluscomp` does with its options; nothing large is imported before one runs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from importlib import import_module
from typing import Any

__all__ = ["chat", "compress", "evaluate", "export", "finetune", "inspect", "merge", "plan", "printable", "push"]

_OF_TRAINING = ("datasets", "trl")
_OF_CALIBRATION = ("samples", "seqlen", "feedback", "epochs")


def compress(options: argparse.Namespace) -> None:
    from .compress.checkpoint import compress_checkpoint
    from .compress.policy import EMBEDDING_BITS
    from .compress.report.verdict import verdict
    from .hf.config import ClusCompQuantizationConfig

    given = {name: getattr(options, name) for name in _OF_CALIBRATION if getattr(options, name) is not None}
    if given and options.calibration == "none":
        name, value = next(iter(given.items()))
        flag = f"--{name} {value}" if value is not True and value is not False else f"--{'' if value else 'no-'}{name}"
        raise ValueError(
            f"{flag} is about calibration text, and --calibration none takes none; leave one of the two out."
        )
    config = ClusCompQuantizationConfig(
        bits=options.bits,
        group_size=options.group_size,
        num_clusters=options.num_clusters,
        scales=options.scales,
        embeddings=EMBEDDING_BITS if options.embeddings is True else options.embeddings,
        codebook_dtype=options.codebook_dtype,
        seed=options.seed,
        quality=options.quality,
    )
    summary = compress_checkpoint(
        options.source,
        options.target,
        config,
        size=options.size,
        calibration=options.calibration,
        evaluate=options.eval,
        device=options.device,
        dtype=options.dtype,
        overwrite=options.overwrite,
        workers=options.workers,
        **given,
    )
    if options.json:
        print(json.dumps({"folder": options.target, **summary}))
        return
    print(
        f"{options.target}: {summary['matrices']} matrices at {summary['true_bits']:.3f} true bits per weight, "
        f"{_embedding_bits(summary)}relative error {summary['relative_error']:.4f}, {summary['seconds']:.1f} s, "
        f"peak memory {summary['peak_memory'] / 1e9:.2f} GB"
    )
    lines, warnings = verdict(summary, summary["losses"], options.target)
    for line in (*lines, summary["coverage"]):
        print(printable(line))
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    for line in warnings:
        print(f"{red}{printable(line)}{plain}")


def finetune(options: argparse.Namespace) -> None:
    try:
        job = import_module(f".finetune.{options.kind}", __package__)
    except ModuleNotFoundError as error:
        if error.name not in _OF_TRAINING:
            raise
        raise ValueError(
            f"{options.kind} needs the package {error.name}; install what training takes: "
            'pip install "cluscomp_peft[train]"'
        ) from error
    job.main(options.arguments)


def inspect(options: argparse.Namespace) -> None:
    from .compress.report.record import write_page
    from .hf.reading import inspect_checkpoint

    matrices, totals = inspect_checkpoint(options.path)
    if options.html is not None:
        write_page(options.path, options.html)
    if options.json:
        print(json.dumps({"matrices": [asdict(entry) for entry in matrices], "totals": totals}))
        return
    what = "embeddings, " if totals["embedding_bits"] is None else ""
    rows = [("matrix", "shape", "stored as", "true bits", "error")]
    for entry in matrices:
        shape = f"{entry.out_features} x {entry.in_features}"
        rows.append((entry.name, shape, entry.spec, f"{entry.true_bits:.3f}", _number(entry.relative_error)))
    rows.append(
        (
            f"{len(matrices)} matrices",
            f"{totals['weights'] / 1e6:.2f} M",
            f"{totals['clustered_bytes'] / 1e6:.2f} MB",
            f"{totals['true_bits']:.3f}",
            _number(totals["relative_error"]),
        )
    )
    rows = [(printable(name), shape, spec, bits, error) for name, shape, spec, bits, error in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for number, row in enumerate(rows):
        if number in (1, len(rows) - 1):
            print("-" * (sum(widths) + 8))
        left = [text.ljust(width) for text, width in zip(row[:3], widths, strict=False)]
        right = [text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)]
        print("  ".join(left + right))
    print(
        f"{_embedding_bits(totals)}weight files {totals['total_bytes'] / 1e6:.2f} MB, of which "
        f"{totals['dense_bytes'] / 1e6:.2f} MB are {what}norms and other tensors left dense"
    )
    print(printable(totals["coverage"]))


def _embedding_bits(numbers: dict[str, Any]) -> str:
    bits = numbers["embedding_bits"]
    return "" if bits is None else f"embeddings at {bits:.3f} true bits, "


def evaluate(options: argparse.Namespace) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from .compress.architecture import read_tokenizer, refuse_evaluation
    from .compress.calibration.text import read_documents, token_windows
    from .compress.stream.headers import base_of, check_folder
    from .hf.evaluate import evaluate as measure

    if options.max_tokens is not None and options.max_tokens < 2:
        raise ValueError(
            f"--max-tokens must be at least 2, one token and the next to predict from it, got {options.max_tokens}; "
            "leave it out to take the whole text."
        )
    options.path, options.adapter = base_of(options.path, options.adapter)
    check_folder(options.path)
    refuse_evaluation(AutoConfig.from_pretrained(options.path), options.path)
    tokenizer = read_tokenizer(options.path)
    if tokenizer is None:
        raise ValueError(
            f"{options.path} has no tokenizer that can be read here, so --data cannot be cut into tokens; copy "
            "tokenizer.json and tokenizer_config.json of the dense model into it."
        )
    documents = read_documents(options.data, tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(options.path, dtype=options.dtype)
    limit = getattr(model.config, "max_position_embeddings", None)
    seqlen = min(2048, limit or 2048) if options.seqlen is None else options.seqlen
    if limit is not None and seqlen > limit:
        raise ValueError(f"--seqlen {seqlen} is more than the {limit} positions of the model; give at most {limit}.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    windows = token_windows(documents, tokenizer, seqlen, max_tokens=options.max_tokens, vocab_size=vocabulary)
    if options.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, options.adapter)
    teacher: Any = None
    if options.teacher is not None:
        check_folder(options.teacher)
        refuse_evaluation(AutoConfig.from_pretrained(options.teacher), options.teacher)
        teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=options.dtype).eval()
    result = measure(model, windows, progress=not options.json, tokenizer=tokenizer, teacher=teacher)
    if options.json:
        print(json.dumps(asdict(result)))
        return
    per_byte = "" if result.bits_per_byte is None else f" ({result.bits_per_byte:.3f} bits per byte)"
    print(
        f"loss {result.loss:.4f} nats{per_byte}, perplexity {result.perplexity:.3f} over {result.tokens} tokens, "
        f"{result.true_bits:.3f} true bits per weight of the linear layers, {result.all_bits:.3f} of all weights"
    )
    if result.kl is not None and result.agreement is not None:
        print(
            f"KL from {printable(options.teacher)} {result.kl:.4f} nats per token, the same likeliest token in "
            f"{100 * result.agreement:.1f} % of places"
        )


def merge(options: argparse.Namespace) -> None:
    from .export.merged import merge_adapter

    summary = merge_adapter(
        options.path, options.target, adapter=options.adapter, dtype=options.dtype, overwrite=options.overwrite
    )
    if options.json:
        print(json.dumps({"folder": options.target, **summary}))
        return
    print(
        f"{options.target}: merged exactly, {summary['true_bits']:.3f} true bits per weight (before "
        f"{summary['base_bits']:.3f}), {summary['bytes'] / 1e6:.1f} MB of weight files, {summary['seconds']:.1f} s"
    )


def chat(options: argparse.Namespace) -> None:
    from .chat import Conversation, load, questions

    if options.json and options.prompt is None:
        raise ValueError("--json is the answer to one question; give it with --prompt.")
    model, tokenizer = load(options.path, options.adapter, options.dtype, options.device)
    names = ("system", "max_new_tokens", "temperature", "seed")
    chosen = {name: getattr(options, name) for name in names}
    conversation = Conversation(model, tokenizer, **chosen, printed=not options.json)
    if not conversation.templated:
        print(
            f"{printable(options.path)} has no chat template: it continues each line instead of answering.",
            file=sys.stderr,
        )
    for question in questions(options.prompt):
        if question == "/clear":
            conversation.clear()
            continue
        answer = conversation.answer(question)
        if options.json:
            named = {"model": options.path, "adapter": options.adapter, **chosen}
            print(json.dumps({**named, "prompt": question, "answer": answer}))


def export(options: argparse.Namespace) -> None:
    if options.to == "gguf":
        _export_gguf(options)
        return
    from .export.dense import export_dense

    if options.type is not None:
        raise ValueError("--type belongs to --to gguf; a dense checkpoint takes --dtype.")
    dtype = options.dtype or "auto"
    summary = export_dense(
        options.path, options.target, adapter=options.adapter, dtype=dtype, overwrite=options.overwrite
    )
    if options.json:
        print(json.dumps({"folder": options.target, **summary}))
        return
    print(
        f"{options.target}: {summary['matrices']} matrices decoded to {summary['dtype']}, "
        f"{summary['bytes'] / 1e6:.1f} MB of weight files, {summary['seconds']:.1f} s"
    )


def _export_gguf(options: argparse.Namespace) -> None:
    try:
        from .export.gguf.file import export_gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ValueError("--to gguf needs the package gguf: install cluscomp_peft[gguf].") from error
    if options.dtype is not None:
        raise ValueError("--dtype belongs to --to dense; a GGUF file takes --type.")
    kind = options.type or "Q8_0"
    summary = export_gguf(
        options.path, options.target, kind=kind, adapter=options.adapter, overwrite=options.overwrite
    )
    if options.json:
        print(json.dumps({"file": options.target, "type": kind, **summary}))
        return
    print(
        f"{options.target}: {summary['tensors']} tensors as {kind}, {summary['bytes'] / 1e6:.1f} MB, "
        f"{summary['seconds']:.1f} s"
    )


def push(options: argparse.Namespace) -> None:
    from .export.push import push_folder

    done = push_folder(options.path, options.repo, base=options.base, private=options.private)
    if options.json:
        print(json.dumps(done))
        return
    print(f"{options.path}: {len(done['files'])} files, {done['bytes'] / 1e6:.1f} MB, in {done['url']}")


def plan(options: argparse.Namespace) -> None:
    from .plan import Settings, plan, render

    given = {item.name: getattr(options, item.name) for item in fields(Settings) if item.name in options}
    settings = Settings(**given)
    forecast = plan(options.model, settings, options.gpu_memory, measure=True)
    print(json.dumps(forecast.to_dict()) if options.json else printable(render(forecast)))


def printable(text: str) -> str:
    """Names out of files, as a terminal may get them: one could hold what moves its cursor."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
