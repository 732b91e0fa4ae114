"""A step's batch as the CUDA kernels read it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraplex_shard.ops.cuda.lora import LoraTiles
from loraplex_shard.ops.cuda.runs import Runs
from loraplex_shard.ops.cuda.tiles import Cuts, Tiles
from loraplex_shard.ops.cuda.worklists import worklists
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.heads import Heads

Kind = tuple[Heads, torch.dtype]  # attention with these heads, for queries of this dtype


@dataclass(frozen=True, slots=True)
class CudaStep:
    batch: Batch
    lora: LoraTiles
    tiles: dict[Kind, Tiles]  # those of other kinds are made when they are first asked for

    @classmethod
    def of(cls, batch: Batch, runs: Runs, cuts: Mapping[Kind, Cuts], device: torch.device) -> "CudaStep":
        """`cuts`: those that are known to be needed. All lists are one copy to the device."""
        lists = [part for each in cuts.values() for part in (each.short, each.long, each.split)]
        lora, *made = worklists([runs.tiles, *lists], device)
        tiles = {
            kind: Tiles(short, long, each.rows, split, each.partials)
            for (kind, each), short, long, split in zip(cuts.items(), made[::3], made[1::3], made[2::3], strict=True)
        }
        return cls(batch, LoraTiles(lora, runs.widest, runs.int8), tiles)

    def touches(self, layer: str) -> bool:
        """Whether adapters may touch the layer. A step without segments is a recorded one, for any adapters."""
        segments = self.batch.segments
        return self.lora.tiles.room > 0 and (not segments or any(layer in run.adapter.layers for run in segments))
