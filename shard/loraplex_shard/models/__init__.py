"""Models, and how they are made from a checkpoint. Our own decoder runs the architectures that it knows; transformers'
modeling code runs the others."""

from loraplex_shard.models.base import Model
from loraplex_shard.models.choosing import check_architecture, load_model

__all__ = ["Model", "check_architecture", "load_model"]
