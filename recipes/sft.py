"""Supervised finetuning of codebooks: what `cluscomp finetune sft` does, as a script to change and to launch.

    python recipes/sft.py --model_name_or_path MODEL --bits 4 --dataset_name train.jsonl --output_dir out
    python recipes/sft.py --config recipes/configs/small_cpu.yaml --learning_rate 1e-4
    cluscomp finetune sft MODEL out --bits 4 --data train.jsonl         the same without a clone of the repository

MODEL is a compressed checkpoint, or a dense one (folder or hub id), which is then compressed while it loads and kept
in `out/base`. The data are a hub id or a .jsonl/.json/.txt file (also .xz) with `text`, `messages`, or `prompt` and
`completion`. Every flag of TRL's SFTConfig works; `recipes/configs` has settings for GPUs of 12, 24 and 48 GB. What
comes out:

    out/base            the compressed model, if MODEL was dense       cluscomp evaluate out/base --data valid.jsonl
    out                 the adapter                                    cluscomp evaluate out/base --adapter out …
    out/merged          with --merge: base + adapter, still compressed

Long contexts, several devices and more: recipes/README.md.
"""

from __future__ import annotations

from trl import SFTTrainer

from cluscomp_peft.finetune.arguments import parse
from cluscomp_peft.finetune.base import load_base
from cluscomp_peft.finetune.data import load_splits
from cluscomp_peft.finetune.sft import SFTArguments
from cluscomp_peft.finetune.training import train_and_save


def main() -> None:
    script, training = parse("sft", SFTArguments)
    train, test = load_splits(script)
    base = load_base(script, training.output_dir, conversations="messages" in train.column_names)
    train_and_save(SFTTrainer, script, training, base, train, test)


if __name__ == "__main__":
    main()
