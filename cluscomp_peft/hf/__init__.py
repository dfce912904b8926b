"""transformers' side: quantization config, quantizer, making and inspecting checkpoints, evaluation."""
