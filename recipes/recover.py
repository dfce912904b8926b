"""Recovery: train a compressed model's codebooks until it speaks like the dense one, at the same bits (ClusComp+).

    python recipes/recover.py --model COMPRESSED --teacher DENSE --data text.jsonl --output_dir OUT

What `cluscomp finetune recover` does, to launch as a script; `cluscomp_peft/finetune/recover.py` says what happens.
"""

from cluscomp_peft.finetune.recover import main

if __name__ == "__main__":
    main()
