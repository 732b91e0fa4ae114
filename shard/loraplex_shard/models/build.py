"""What the constructors of a decoder's layers need."""

from collections.abc import Mapping
from dataclasses import dataclass

from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.norm import HiddenNorm
from loraplex_shard.models.partition import DecoderPartition
from loraplex_shard.models.spec import DecoderSpec, RotarySpec
from loraplex_shard.ops.base import Operations, Rotary


@dataclass(frozen=True, slots=True)
class Build:
    spec: DecoderSpec
    partition: DecoderPartition
    group: Group
    ops: Operations
    rotary: Mapping[RotarySpec, Rotary]

    def norm(self, module: str) -> HiddenNorm:
        return HiddenNorm(module, self.spec.hidden_size, self.spec.norm, self.spec.residual_scale, self.ops)
