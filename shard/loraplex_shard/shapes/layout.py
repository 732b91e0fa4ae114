"""How a linear layer of this rank relates to the whole model's: what adapters need to know to be cut alike."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import gcd


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One module of a checkpoint, which is a linear layer or a part of one."""

    module: str  # its name in the checkpoint and in PEFT, for example "model.layers.3.self_attn.q_proj"
    out_features: int  # of the whole model
    rows: tuple[slice, ...]  # which of them this rank computes: several runs, if checkpoints fuse projections into it

    @property
    def width(self) -> int:
        """How many outputs this rank computes."""
        return sum(len(range(run.start, run.stop, run.step or 1)) for run in self.rows)


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """A linear layer, possibly several modules of one input fused into one (q, k and v; gate and up).

    Its output on this rank is the parts' outputs side by side. A column-parallel layer has all columns and some
    rows of each part; a row-parallel one has all rows and some columns.
    """

    name: str  # of the fused layer, for example "layers.3.qkv"
    index: int  # its place among the rank's linear layers
    parts: tuple[LinearPart, ...]
    in_features: int  # of the whole model
    columns: slice  # which of them this rank reads
    of_expert: bool = False  # a token passes it only if the token has that expert; such layers come last
    unit: int = field(init=False)  # every part begins and ends at a multiple of it in the layer's output

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", gcd(*(part.width for part in self.parts)))


def count_indices(layouts: Iterable[LinearLayout]) -> int:
    """How many rows a table has in which each of these layers has the row of its index."""
    return 1 + max(layout.index for layout in layouts)
