"""GGUF, the file of llama.cpp and of what is built on it (Ollama, LM Studio): weights, metadata and tokenizer in one.

    architectures.py     which classes of transformers have a form there, their metadata, names and orders of tensors
    tokenizer.py         tokens, merges, special tokens, chat template
    file.py              the door: writes the file tensor by tensor
    requantize.py        the types that llama.cpp's own library makes: Q4_K_M and its like

Names of keys and tensors are those of the package `gguf`, which llama.cpp's makers maintain.
"""
