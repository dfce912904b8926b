"""Whether two checkouts make the same bytes: for a change that moves code and is meant to change nothing.

    python tools/same_bytes.py OLD_CHECKOUT NEW_CHECKOUT

Each checkout compresses one seeded random Llama with `cluscomp compress`, as `RUNS` says, and runs
`recipes/quickstart.py` for a few steps. Compared are the digests of all tensors, config.json, the report but for times
and memory, the names of the files, and the losses and the table of the quickstart. Journals, the model card and the
report's page are not: they name folders and versions. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS = {
    "without data": ["--group-size", "3", "--num-clusters", "48", "--scales", "--codebook-dtype", "bfloat16"],
    "bits": ["--bits", "4"],
    "calibrated": ["--bits", "3.5", "--calibration", "TEXT", "--samples", "12", "--seqlen", "32", "--epochs", "2"],
    "size": ["--size", "260kB"],
    "size, calibrated": ["--size", "260kB", "--calibration", "TEXT", "--samples", "12", "--seqlen", "32"],
}
CHANGING = {"seconds", "peak_memory", "source", "elapsed"}  # of a report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument("--pretrain_steps", type=int, default=10, help="of the quickstart")
    parser.add_argument("--sft_steps", type=int, default=50, help="of the quickstart; it logs every fiftieth loss")
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, "quickstart"], default=[*RUNS, "quickstart"])
    options = parser.parse_args()
    demo = ["--pretrain_steps", str(options.pretrain_steps), "--sft_steps", str(options.sft_steps)]
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        old, new = (
            found_in(checkout.resolve(), Path(folder), name, options.runs, demo)
            for name, checkout in (("old", options.old), ("new", options.new))
        )
    for key in old:
        print(f"{key:<30} {digest(old[key])} {digest(new[key])} {'equal' if old[key] == new[key] else 'DIFFERENT'}")
        if old[key] != new[key]:
            print_differences(old[key], new[key])
    print("equal" if old == new else "not equal")
    return 0 if old == new else 1


def make_model(folder: Path) -> None:
    """A random Llama of odd widths with grouped queries, a tokenizer of words, and a text in those words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(125))]
    vocabulary = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    sizes = {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 148, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.1))
    model.to(torch.bfloat16).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    text = " ".join(words[index] for index in torch.randint(3, len(words), (4000,)).tolist())
    (folder / "text.txt").write_text(text)


def found_in(checkout: Path, folder: Path, name: str, runs: list[str], demo: list[str]) -> dict[str, Any]:
    """What a checkout makes, by name."""
    place = folder / name
    place.mkdir()
    text = str(folder / "text.txt")
    commands = [
        ["compress", str(folder / "dense"), str(place / run), *(text if flag == "TEXT" else flag for flag in flags)]
        for run, flags in RUNS.items()
        if run in runs
    ]
    program = "import json, sys, cluscomp_peft.cli as cli; sys.exit(any(map(cli.main, json.loads(sys.argv[1]))))"
    run_python(checkout, place, "-c", program, json.dumps(commands))
    found: dict[str, Any] = {}
    for run in (name for name in RUNS if name in runs):
        target = place / run
        found[f"{run}: tensors"] = digests(target)
        found[f"{run}: config.json"] = json.loads((target / "config.json").read_text())
        found[f"{run}: report"] = without_times(json.loads((target / "cluscomp_report.json").read_text()))
        found[f"{run}: files"] = sorted(os.listdir(target))
    if "quickstart" not in runs:
        return found
    recipe = str(checkout / "recipes" / "quickstart.py")
    lines = run_python(checkout, place, recipe, "--output_dir", str(place / "demo"), *demo).splitlines()
    logs = [json.loads(line.replace("'", '"')) for line in lines if line.startswith("{'")]
    found["quickstart: losses"] = [log["loss"] for log in logs if "loss" in log]
    found["quickstart: table"] = [line for line in lines if "%" in line]
    for part in ("dense", "compressed", "adapter", "merged"):
        found[f"quickstart: {part}"] = digests(place / "demo" / part)
    return found


def run_python(checkout: Path, place: Path, *arguments: str) -> str:
    """The output of Python with this checkout's package; on one thread, so that sums are added in one order."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: a run failed\n{done.stdout}\n{done.stderr}")
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    """Digest of every tensor of a folder, by file and name."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, value in sorted(load_file(path).items()):
            content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found[f"{path.name} {key}"] = digest([str(value.dtype), list(value.shape), digest(content.hex())])
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in CHANGING}
    return value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def print_differences(old: Any, new: Any) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                print(f"    {key}: {old.get(key)!r} -> {new.get(key)!r}"[:300])
    else:
        print(f"    {old!r} -> {new!r}"[:1000])


if __name__ == "__main__":
    sys.exit(main())
