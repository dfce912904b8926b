"""transformers' side: the quantization config, the quantizer, reading and evaluating compressed checkpoints."""
