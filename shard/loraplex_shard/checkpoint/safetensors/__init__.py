"""Hugging Face checkpoint directories, whose tensors are in safetensors files (`files.py`)."""
