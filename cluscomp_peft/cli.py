# PYTHON_ARGCOMPLETE_OK
"""The `cluscomp` command: compress, finetune, merge, chat, inspect, evaluate, export, push, plan."""

from __future__ import annotations

import argparse
import os
import re
import sys

from . import commands
from ._version import __version__
from .failures import ran_out_of_memory
from .interrupts import wait_for_imports
from .quiet import hush
from .usage import Parser

__all__ = ["main"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_CLOSED_PIPE = 128 + 13  # as a shell has it of a command that SIGPIPE ended
_LEAST_BYTES = 1000  # of a whole model: fewer lack their unit


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status. Errors of the user end in one line, without a traceback."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for the words that may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    if arguments is None:  # the process is the command's own
        hush()
    try:
        with wait_for_imports():
            options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads the output has seen enough; what is left of it goes nowhere, also when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except (ValueError, OSError) as error:
        notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]  # others hold tracebacks
        print(f"cluscomp {options.command}:", *map(commands.printable, (str(error), *notes)), file=sys.stderr)
        return 1
    except RecursionError:
        print(f"cluscomp {options.command}: a JSON file is nested too deeply to be read", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        print(
            f"cluscomp {options.command}: out of memory ({commands.printable(str(error)[:200])}); what is finished "
            "stays, the same command goes on from there. Raise the limit of the process, or use fewer --workers.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"cluscomp {options.command}: interrupted; the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cluscomp",
        description="Compress language models to codes and codebooks, finetune these, measure and export the result.",
    )
    parser.add_argument("--version", action="version", version=f"cluscomp {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)

    compress = subparsers.add_parser("compress", help="make a compressed checkpoint of a dense model")
    compress.add_argument("source", metavar="SRC", help="folder or hub id of the dense model")
    compress.add_argument("target", metavar="OUT", help="folder to create")
    compress.add_argument("--bits", type=float, help="true bits per weight, 1 to 8 (default 4)")
    compress.add_argument("--size", metavar="16MB", type=_bytes, help="bytes of the whole folder, instead of --bits")
    compress.add_argument("--group-size", type=int, help="weights per code; with --num-clusters, instead of --bits")
    compress.add_argument("--num-clusters", type=int, help="centroids per codebook")
    compress.add_argument(
        "--scales",
        action=argparse.BooleanOptionalAction,
        help="store a scale per channel (default: with calibration, where it is cheap)",
    )
    compress.add_argument(
        "--embeddings",
        metavar="BITS",
        type=float,
        nargs="?",
        const=True,
        help="cluster the input embedding and the output head too, at their own true bits (default 5); --bits is that "
        "of the linear layers inside the blocks",
    )
    compress.add_argument("--codebook-dtype", default="float16", help="float16 (default), bfloat16 or float32")
    compress.add_argument(
        "--calibration",
        metavar="TEXT",
        default="auto",
        help="text to compress by: a .jsonl or .txt file, also .xz; builtin, the text that comes with this package; "
        "or none, which is faster and loses more (default: builtin, where the model continues text)",
    )
    compress.add_argument(
        "--eval",
        metavar="TEXT",
        help="text to measure the dense and the compressed model on in the end, block by block, at most 65,536 tokens "
        "of it; none that the model is calibrated by (default: the end of the calibration text)",
    )
    compress.add_argument("--samples", type=int, help="calibration sequences (default 128)")
    compress.add_argument(
        "--seqlen",
        type=int,
        help="tokens of a sequence (default 2048, 512 of the built-in text, at most what the model takes)",
    )
    compress.add_argument(
        "--feedback",
        action=argparse.BooleanOptionalAction,
        help="let codes make up for errors, with calibration (default: yes)",
    )
    compress.add_argument(
        "--epochs",
        type=int,
        help="of reconstruction, with calibration (default 8; 0 with the built-in text, for on a CPU they take longer "
        "than all the rest)",
    )
    compress.add_argument(
        "--device", help="cpu, cuda or cuda:N, where the work is done (default: a GPU if there is one)"
    )
    compress.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that compress a block each, with their share of the cores, or on the GPUs in turn; the result "
        "is the same. With --calibration none alone, for else each block builds on the one before it (default 1)",
    )
    compress.add_argument("--dtype", default="auto", choices=_DTYPES, help="of what stays dense")
    compress.add_argument("--quality", default="default", help="of K-means: fast, default or best")
    compress.add_argument("--seed", type=int, default=0, help="of K-means")
    compress.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint")
    compress.add_argument("--json", action="store_true", help="one JSON object instead of lines of text")
    compress.set_defaults(run=commands.compress)

    inspect = subparsers.add_parser("inspect", help="print what a compressed checkpoint holds")
    inspect.add_argument("path", metavar="DIR", help="folder or hub id of a compressed model")
    inspect.add_argument("--html", metavar="FILE", help="write the report as a page with plots")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    inspect.set_defaults(run=commands.inspect)

    finetune = subparsers.add_parser(
        "finetune", help="train the codebooks: on texts, on preferences, on the dense model"
    )
    finetune.add_argument(
        "kind",
        choices=("sft", "dpo", "recover"),
        help="sft: texts, prompts or conversations, by TRL's SFTTrainer; dpo: preferences, by its DPOTrainer; "
        "recover: until the compressed model speaks like the dense one",
    )
    finetune.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="MODEL OUT --data FILE ...",
        help="`cluscomp finetune KIND --help` has the flags",
    )
    finetune.set_defaults(run=commands.finetune)

    evaluate = subparsers.add_parser("evaluate", help="measure loss and true bits of a dense or compressed model")
    evaluate.add_argument("path", metavar="DIR_OR_ID", help="folder or hub id of a model, or folder of an adapter")
    evaluate.add_argument("--data", metavar="FILE", required=True, help=".jsonl or .txt, also .xz")
    evaluate.add_argument("--adapter", metavar="DIR", help="adapter to load onto the model")
    evaluate.add_argument(
        "--teacher", metavar="DIR_OR_ID", help="model to hold it against, mostly the dense one: KL and agreement"
    )
    evaluate.add_argument("--max-tokens", type=int, help="stop after so many tokens of the text")
    evaluate.add_argument("--seqlen", type=int, help="tokens of a window (default 2048, at most what the model takes)")
    evaluate.add_argument("--dtype", default="auto", choices=_DTYPES, help="dtype to compute in")
    evaluate.add_argument("--json", action="store_true", help="one JSON object instead of a line of text")
    evaluate.set_defaults(run=commands.evaluate)

    merge = subparsers.add_parser(
        "merge", help="write base and adapter as one checkpoint, exactly and at the same bits"
    )
    merge.add_argument("path", metavar="ADAPTER", help="folder of an adapter; or its base, with --adapter")
    merge.add_argument("target", metavar="OUT", help="folder to create")
    merge.add_argument("--adapter", metavar="DIR", help="adapter to merge, folder or hub id")
    merge.add_argument("--dtype", default="auto", choices=_DTYPES, help="of what is not clustered")
    merge.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model")
    merge.add_argument("--json", action="store_true", help="one JSON object instead of a line of text")
    merge.set_defaults(run=commands.merge)

    chat = subparsers.add_parser("chat", help="talk to a model in the terminal")
    chat.add_argument("path", metavar="DIR_OR_ID", help="folder or hub id of a model, or folder of an adapter")
    chat.add_argument("--adapter", metavar="DIR", help="adapter to load onto the model")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this alone; else lines of standard input are answered")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the first question")
    chat.add_argument("--max-new-tokens", type=int, default=512, help="that an answer may have (default 512)")
    chat.add_argument(
        "--temperature", type=float, help="of sampling; 0: the likeliest token each time (default: the model's own)"
    )
    chat.add_argument("--seed", type=int, help="of sampling")
    chat.add_argument("--dtype", default="auto", choices=_DTYPES, help="dtype to compute in")
    chat.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    chat.add_argument("--json", action="store_true", help="one JSON object instead of text, for --prompt")
    chat.set_defaults(run=commands.chat)

    export = subparsers.add_parser("export", help="write a compressed model down for engines that know no codes")
    export.add_argument("path", metavar="DIR", help="folder or hub id of a model, or folder of an adapter")
    export.add_argument("target", metavar="OUT", help="folder, or file of GGUF, to create")
    export.add_argument("--to", required=True, choices=("dense", "gguf"), help="format")
    export.add_argument("--type", metavar="TYPE", help="gguf: F16, Q8_0 (default), Q4_K_M and others of llama.cpp")
    export.add_argument("--adapter", metavar="DIR", help="adapter to merge on the way")
    export.add_argument("--dtype", choices=_DTYPES, help="dense: of the weights (default: the model's)")
    export.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model")
    export.add_argument("--json", action="store_true", help="one JSON object instead of a line of text")
    export.set_defaults(run=commands.export)

    push = subparsers.add_parser(
        "push", help="upload a folder of a model or an adapter to the hub, with card and report"
    )
    push.add_argument("path", metavar="DIR", help="folder that compress, merge, finetune or export wrote")
    push.add_argument("repo", metavar="OWNER/NAME", help="hub id; the repository is made if there is none")
    push.add_argument("--base", metavar="OWNER/NAME", help="of an adapter: hub id of its base")
    push.add_argument("--private", action="store_true", default=None, help="make the repository a private one")
    push.add_argument("--json", action="store_true", help="one JSON object instead of a line of text")
    push.set_defaults(run=commands.push)

    plan = subparsers.add_parser("plan", help="say what a model needs in memory and time, and which settings fit")
    plan.add_argument("model", metavar="MODEL", help="folder or hub id, dense or compressed; only its config is read")
    plan.add_argument(
        "--bits", type=float, help="true bits per weight, 1 to 8 (default 4; a compressed model has its own)"
    )
    plan.add_argument("--seqlen", type=int, default=1024, help="tokens of a sequence")
    plan.add_argument("--batch", type=int, default=1, help="sequences at once, on each device")
    plan.add_argument("--world-size", type=int, default=1, help="devices that finetuning is spread over (default 1)")
    plan.add_argument(
        "--engine",
        choices=("ddp", "fsdp2", "zero2", "zero3"),
        help="how it is spread over several devices (default ddp: a copy on each)",
    )
    plan.add_argument("--dtype", default="bfloat16", choices=_DTYPES[1:], help="of activations and what stays dense")
    plan.add_argument(
        "--rank",
        type=int,
        default=argparse.SUPPRESS,  # that of ClusCompConfig, which takes seconds to import
        help="trained numbers, as those of LoRA of this rank",
    )
    plan.add_argument("--num-blocks", type=int, help="delta codebooks of every matrix, instead of --rank")
    plan.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw_8bit"))
    plan.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the inputs of blocks, compute the rest again (default: yes)",
    )
    plan.add_argument(
        "--chunked-loss",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the loss never holds the logits of all tokens, as TRL's nll (default: no)",
    )
    plan.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where it shall run")
    plan.add_argument("--samples", type=int, default=128, help="calibration sequences of the compression")
    plan.add_argument(
        "--tokens", type=int, default=1_000_000, help="of the whole training, for its time (default 1 million)"
    )
    plan.add_argument(
        "--flops",
        metavar="86T",
        type=_flops,
        help="that one device does in a second of training (default: measured, if this machine has the --device; else "
        "those of an H100)",
    )
    plan.add_argument("--gpu-memory", metavar="24GiB", type=_bytes, help="find the settings that fit")
    plan.add_argument("--json", action="store_true", help="one JSON object, in bytes, instead of tables")
    plan.set_defaults(run=commands.plan)
    for command in subparsers.choices.values():
        command.set_defaults(parser=command)
    return parser


def _bytes(text: str) -> int:
    """Bytes of "16MB", "1.5GiB" or "1000000"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 16MB, 1.5GiB or 1000000")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))
    if size < _LEAST_BYTES:
        cure = "" if unit else f"; give it a unit, such as {number}GiB"
        raise argparse.ArgumentTypeError(f"{text} is {size} bytes, fewer than any model takes{cure}")
    return size


def _flops(text: str) -> float:
    """FLOP/s of "86T" or "20G"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([GTP])", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate such as 86T, 20G or 1.2P")
    return float(match[1]) * 1000.0 ** ("GTP".index(match[2].upper()) + 3)


if __name__ == "__main__":
    sys.exit(main())
