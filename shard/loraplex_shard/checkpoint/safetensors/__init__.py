"""Hugging Face checkpoint directories, with tensors in safetensors files (`files.py`)."""
