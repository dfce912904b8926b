"""PEFT's side: config, tuner layers, tuner, and what an adapter file holds."""
