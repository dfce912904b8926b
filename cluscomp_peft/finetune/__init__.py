"""Finetuning as jobs: what `cluscomp finetune` and the recipes do around the trainers of TRL and transformers."""
