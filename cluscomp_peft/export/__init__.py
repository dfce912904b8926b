"""Compressed checkpoints, and adapters on them, written down for engines that know no codes: dense or as GGUF."""
