"""Preference finetuning of codebooks by DPO: what `cluscomp finetune dpo` does, to launch as a script.

    python recipes/dpo.py --model_name_or_path MODEL --bits 4 --dataset_name pairs.jsonl --output_dir out

MODEL is a compressed checkpoint, or a dense one, which is then compressed first, as in `sft.py`; usually what `sft.py
--merge` wrote. The data are a hub id or a .jsonl/.json file (also .xz) with `prompt`, `chosen` and `rejected`: texts,
or lists of messages. Every flag of TRL's DPOConfig works, from flags or `--config FILE.yaml`. What comes out is what
`sft.py` leaves: `out` (the adapter), `out/base` if MODEL was dense, `out/merged` with --merge. The steps are those of
`sft.py` with TRL's DPOTrainer; the loss is explained in `cluscomp_peft/finetune/dpo.py`.
"""

from cluscomp_peft.finetune.dpo import main

if __name__ == "__main__":
    main()
