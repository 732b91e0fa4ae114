"""Checkpoints in a GGUF file: its header (`file.py`), its configuration, its tensors and its tokenizer."""
