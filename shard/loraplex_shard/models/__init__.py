"""The decoder and how it is made from a checkpoint."""

from loraplex_shard.models.decoder import Decoder
from loraplex_shard.models.loading import load_decoder

__all__ = ["Decoder", "load_decoder"]
