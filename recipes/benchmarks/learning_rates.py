"""Which learning rate suits, over models, bits, ranks and batches, in runs as short as people's first ones?

    python recipes/benchmarks/learning_rates.py MODEL --train gsm8k_train.jsonl --valid gsm8k_valid.jsonl \\
        --bits 4.3 3.1 2.1 --ranks 8 16 64 --batches 1 4 32 --device cuda --jobs 8

MODEL is a dense checkpoint, clustered here once for each number of bits (`--folder`), without calibration. A run is
`get_peft_model` and AdamW as in `recipes/sft.py`: warm-up and cosine, gradients clipped at 1, loss on every token of
rows padded to the longest. All runs of a seed see the same rows in the same order. A row of the results is a run:

    before, loss    held-out loss of the base, and after the last step
    peak            highest held-out loss after a quarter, a half and all of the steps
    train           losses of the steps

Several calls, with other models too, make one table. Its columns, for all runs that differ in their rate alone:

    best            rate with the lowest loss, in brackets if it is the lowest or highest that ran
    at best, at R   gain, the held-out loss before minus after, at the best rate and at `--default`
    within          rates whose gain is at least 95 % of the best
    diverges        lowest rate from which on the held-out loss peaked above `before`
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Results, Row, arguments, cosine, table
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import cluscomp_peft
from cluscomp_peft.compress.calibration.text import read_documents
from cluscomp_peft.compress.checkpoint import compress_checkpoint

RATES = [2e-4 * 2.0**power for power in range(-6, 3)]
AT_ONCE = 4096  # tokens of a forward pass; larger batches are cut up


class Run(NamedTuple):
    """What is asked of one row."""

    model: str
    data: str
    bits: float
    rank: int
    batch: int
    steps: int
    warmup: float
    delta_scale: float | None
    rate: float
    seed: int

    def cell(self) -> tuple:
        return tuple(value for key, value in self._asdict().items() if key != "rate")


def main() -> None:
    parser = arguments(__doc__, "learning_rates")
    parser.add_argument("model", nargs="?", help="folder of a dense checkpoint; without it the table is printed")
    parser.add_argument("--train", help="to finetune on: .jsonl, .txt, also .xz")
    parser.add_argument("--valid", help="to measure the loss on")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.3, 3.1, 2.1])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--delta_scales", type=float, nargs="+", default=[None], help="units; the default's otherwise")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=256, help="tokens that rows are cut at")
    parser.add_argument("--held_out", type=int, default=48, help="rows to measure the loss on")
    parser.add_argument("--dtype", default="auto", help="of what is not trained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run is started after so many")
    parser.add_argument("--folder", default="outputs/learning_rates", help="where clustered models are kept")
    parser.add_argument("--default", type=float, default=2e-4, help="the rate that should be right")
    options = parser.parse_args()
    results = Results(options.results, {}, options.fresh)
    if options.model is not None:
        if options.train is None or options.valid is None:
            raise SystemExit("a model needs --train and --valid.")
        measure(options, results)
    print_table(results.rows, options.default)


def measure(options: argparse.Namespace, results: Results) -> None:
    """Every run that the results do not hold yet."""
    started = time.perf_counter()
    name = os.path.basename(os.path.normpath(options.model))
    runs = [
        Run(
            name,
            os.path.basename(options.train),
            bits,
            rank,
            batch,
            options.steps,
            options.warmup,
            scale,
            rate,
            options.seed,
        )
        for scale in options.delta_scales
        for bits in options.bits
        for rank in options.ranks
        for batch in options.batches
        for rate in options.rates
    ]
    runs = [run for run in runs if options.fresh or results.find(run._asdict()) is None]
    if not runs:
        return
    prepare(options, {run.bits for run in runs})
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(min(options.jobs, len(runs)), start_worker, (options,)) as pool:
        pending = iter(runs)
        flying = [pool.apply_async(train, (run,)) for run in itertools.islice(pending, options.jobs)]
        while flying:
            ready = [result for result in flying if result.ready()]
            flying = [result for result in flying if not result.ready()]
            for result in ready:
                run, measured = result.get()
                results.add(run._asdict(), measured)
                if time.perf_counter() - started < 60 * options.minutes:
                    flying += [pool.apply_async(train, (run,)) for run in itertools.islice(pending, 1)]
            time.sleep(0.02)


def prepare(options: argparse.Namespace, bits: set[float]) -> None:
    """The tokens, and a clustered model for each number of bits."""
    os.makedirs(options.folder, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = {}
    for part in ("train", "valid"):
        documents = read_documents(getattr(options, part), tokenizer)
        documents = documents[: options.held_out] if part == "valid" else documents
        encoded = tokenizer(documents, truncation=True, max_length=options.length)["input_ids"]
        rows[part] = [torch.tensor(ids) for ids in encoded if len(ids) > 1]
    torch.save(rows, os.path.join(options.folder, "rows.pt"))
    for number in sorted(bits):
        if not os.path.exists(base_folder(options, number)):
            compress_checkpoint(
                options.model,
                base_folder(options, number),
                cluscomp_peft.ClusCompQuantizationConfig(bits=number),
                calibration="none",
                device=options.device,
            )


def base_folder(options: argparse.Namespace, bits: float) -> str:
    return os.path.join(options.folder, f"{bits:g}")


# -- in a worker

_worker: dict[str, Any] = {}


def start_worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    _worker["options"], _worker["bases"] = options, {}
    _worker["rows"] = torch.load(os.path.join(options.folder, "rows.pt"))


def base_of(bits: float) -> tuple[Any, float]:
    """The clustered model, which `unload()` gives back after each run, and its held-out loss."""
    options, bases = _worker["options"], _worker["bases"]
    if bits not in bases:
        bases.clear()
        model = AutoModelForCausalLM.from_pretrained(base_folder(options, bits), dtype=options.dtype)
        model.to(options.device)
        bases[bits] = model, held_out(model)
    return bases[bits]


def train(run: Run) -> tuple[Run, Row]:
    """One run, and what came of it."""
    started = time.perf_counter()
    options, rows = _worker["options"], _worker["rows"]["train"]
    base, before = base_of(run.bits)
    set_seed(run.seed)
    config = cluscomp_peft.ClusCompConfig(task_type="CAUSAL_LM", rank=run.rank, delta_scale=run.delta_scale)
    model = get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)
    schedule = cosine(optimizer, run.steps, run.warmup)
    generator = torch.Generator().manual_seed(run.seed)
    order = torch.randint(len(rows), (run.steps, run.batch), generator=generator).tolist()
    losses, checks = [], []
    model.train()
    for step, indices in enumerate(order, 1):
        losses.append(accumulate(model, [rows[index] for index in indices], options.device))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in (run.steps // 4, run.steps // 2, run.steps):
            checks.append(held_out(model))
    sizes = sum(parameter.numel() for parameter in trained)
    model.unload()
    return run, {
        "before": before,
        "loss": checks[-1],
        "peak": max(checks) if all(map(math.isfinite, checks)) else math.inf,
        "train": [round(loss, 4) for loss in losses],
        "trained": sizes,
        "seconds": time.perf_counter() - started,
    }


def accumulate(model: Any, rows: list[torch.Tensor], device: str) -> float:
    """Gradients of the mean loss of the tokens of a batch; the loss."""
    tokens, total = sum(len(row) - 1 for row in rows), 0.0
    for part in parts(rows):
        loss = summed_loss(model, part, device) / tokens
        loss.backward()
        total += float(loss.detach())
    return total


def held_out(model: Any) -> float:
    """Mean loss of the held-out tokens, in nats."""
    rows = sorted(_worker["rows"]["valid"], key=len)
    training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(float(summed_loss(model, part, _worker["options"].device)) for part in parts(rows))
    model.train(training)
    return total / sum(len(row) - 1 for row in rows)


def parts(rows: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The rows in lists of at most `AT_ONCE` tokens with padding."""
    count = max(1, AT_ONCE // max(map(len, rows)))
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def summed_loss(model: Any, rows: list[torch.Tensor], device: str) -> torch.Tensor:
    """Sum of the losses of all predicted tokens."""
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).to(device)
    real = padded != -100
    logits = model(input_ids=padded.masked_fill(~real, 0), attention_mask=real.long(), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), padded[:, 1:].flatten(), reduction="sum")


# -- the table


def print_table(rows: list[Row], default: float) -> None:
    cells: dict[tuple, dict[float, Row]] = defaultdict(dict)
    for row in rows:
        run = Run(**{key: row[key] for key in Run._fields})
        cells[run.cell()][run.rate] = row
    columns = {
        "model": "{model}",
        "data": lambda row: row["data"].partition(".")[0],
        "unit": "{delta_scale:g}",
        **{key: f"{{{key}}}" for key in ("bits", "rank", "batch", "steps")},
        "before": "{before:.3f}",
        "best": lambda row: f"{row['best']:.2g}" if row["inside"] else f"({row['best']:.2g})",
        "at best": "{at best:.3f}",
        f"at {default:g}": "{at default:.3f}",
        "within": lambda row: "{:.2g} to {:.2g}".format(*row["within"]),
        "diverges": "{diverges:.2g}",
    }
    print(table([summary(cell, default) for cell in cells.values()], columns))


def summary(cell: dict[float, Row], default: float) -> Row:
    """What the table says of a cell: its rows by their rates."""
    rates = sorted(cell)
    one = cell[rates[0]]
    gains = {rate: one["before"] - cell[rate]["loss"] for rate in rates if math.isfinite(cell[rate]["loss"])}
    best = max(gains, key=lambda rate: gains[rate])
    near = [rate for rate in rates if gains.get(rate, -math.inf) >= 0.95 * gains[best]]
    # Going down from the highest rate for as long as they diverge.
    worst = [rate for rate in rates if all(cell[other]["peak"] > one["before"] for other in rates if other >= rate)]
    return {
        **one,
        "best": best,
        "inside": best not in (rates[0], rates[-1]),
        "at best": gains[best],
        "at default": next((gains.get(rate, -math.inf) for rate in rates if math.isclose(rate, default)), None),
        "within": (near[0], near[-1]),
        "diverges": worst[0] if worst else None,
    }


if __name__ == "__main__":
    main()
