"""Checkpoints in one GGUF file: its header (`file.py`), what it says of the model, its tensors and its tokenizer."""
