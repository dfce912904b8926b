"""Memory of loading, of a forward pass and of training steps, CPU: a compressed model against bitsandbytes NF4 + LoRA.

    python recipes/benchmarks/memory.py

Every measurement is a process of its own: it imports everything, notes its resident memory, does the job, and reports
how far the peak rose above that. The model is a random Llama of 300 M parameters in bf16; its codes are random too,
which changes nothing about memory. Writes results/memory.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile

import torch
from random_models import Shape, build, prepare, random_tokens, save_checkpoint, small, train_step
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = dict(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=18,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=2048,
)
JOBS = ("load compressed", "serve compressed", "serve dense", "train compressed", "train nf4 lora", "train dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--job", choices=JOBS, help="used by the script itself")
    parser.add_argument("--folder", help="used by the script itself")
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(run_job(options)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for command in ("write_dense", "write_compressed"):
            code = f"import memory; memory.{command}({folder!r}, {options.bits})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.abspath(__file__)))
        for job in JOBS:
            flags = ["--bits", options.bits, "--seqlen", options.seqlen, "--batch", options.batch]
            command = [sys.executable, __file__, "--job", job, "--folder", folder, *map(str, flags)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[job] = json.loads(output.strip().splitlines()[-1])
    print(f"{'job':<20}{'files, MB':>11}{'peak, MB':>11}{'peak / files':>14}")
    for job, row in results.items():
        print(f"{job:<20}{row['files'] / 1e6:>11.0f}{row['peak'] / 1e6:>11.0f}{row['peak'] / row['files']:>14.2f}")
    write_results("memory", {"settings": {"shape": SHAPE, **vars(options)}, "rows": results})


def write_dense(folder: str, bits: float) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(os.path.join(folder, "dense"))


def write_compressed(folder: str, bits: float) -> None:
    """A checkpoint in the shape of `bits` with random codes."""
    method = f"cluscomp-{bits}"
    save_checkpoint(build(_shape(), method, "cpu"), method, os.path.join(folder, "compressed"))


def run_job(options: argparse.Namespace) -> dict[str, float]:
    """Does one job in this process and reports bytes: weight files, and the peak above what imports take."""
    import bitsandbytes  # noqa: F401  (imported by every job, so that all start equal)
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    from cluscomp_peft import ClusCompConfig

    action, _, kind = options.job.partition(" ")
    path = os.path.join(options.folder, "compressed" if kind == "compressed" else "dense")
    _warm_up()
    before = read_status("VmRSS")
    settings = {}
    if kind == "nf4 lora":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **settings)
    if action == "serve":
        # Loading alone maps the file; running the model touches every byte of it.
        with torch.no_grad():
            model(input_ids=torch.randint(0, SHAPE["vocab_size"], (1, 16)))
    elif action == "train":
        if kind == "nf4 lora":
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
        elif kind == "compressed":
            model = get_peft_model(model, ClusCompConfig(task_type="CAUSAL_LM"))
        model.train()
        tokens = torch.randint(0, SHAPE["vocab_size"], (options.batch, options.seqlen))
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-4)
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    files = sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path) if "safetensors" in name)
    return {"files": files, "peak": read_status("VmHWM") - before}


def _warm_up() -> None:
    """A tiny dense and a small clustered model of the same dtype are trained a step, so that the pages of libraries
    and what they compile at first use (tens of MB, and not the same from run to run) count for nobody."""
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **tiny}))
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 16))
    model.to(torch.bfloat16)(input_ids=tokens, labels=tokens).loss.backward()
    # One block of the shape of the jobs, because kernels are compiled for how matrices are stored.
    shape = small(_shape())
    model = build(shape, "cluscomp-4", "cpu")
    for length in (16, 64):
        with torch.no_grad():
            model(input_ids=random_tokens(shape, 1, length, "cpu"))
    model, optimizer = prepare(model, "cluscomp-4", checkpointing=False)
    train_step(model, optimizer, random_tokens(shape, 1, 64, "cpu"))
    del model, optimizer
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory of its own that the job could use again would make the job look smaller


def _shape() -> Shape:
    return Shape(
        hidden=SHAPE["hidden_size"],
        intermediate=SHAPE["intermediate_size"],
        layers=SHAPE["num_hidden_layers"],
        heads=SHAPE["num_attention_heads"],
        kv_heads=SHAPE["num_key_value_heads"],
        vocab=SHAPE["vocab_size"],
    )


def read_status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def write_results(name: str, content: dict) -> None:
    """A JSON file under results/, with versions and hardware."""
    import platform

    import transformers

    content["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    content["versions"]["transformers"] = transformers.__version__
    content["hardware"] = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        content["hardware"]["gpu"] = torch.cuda.get_device_name()
    content["settings"].pop("folder", None)
    content["settings"].pop("job", None)
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.json")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    main()
