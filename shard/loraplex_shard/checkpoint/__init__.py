"""Checkpoints: a model's configuration, tokenizer and tensors, read from files."""

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError, TokenizerFiles
from loraplex_shard.checkpoint.opening import open_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "TokenizerFiles", "open_checkpoint"]
