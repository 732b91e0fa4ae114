"""How a linear layer of this rank relates to the whole model's: what adapters need to know to be cut alike."""

from dataclasses import dataclass, field
from math import gcd


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One projection of a fused linear layer."""

    module: str  # its name in the checkpoint and in PEFT, for example "model.layers.3.self_attn.q_proj"
    out_features: int  # of the whole model
    rows: slice  # which of them this rank computes


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """A linear layer, possibly several projections of one input fused into one (q, k and v; gate and up).

    Its output on this rank is the parts' outputs side by side. A column-parallel layer has all columns and some
    rows of each part; a row-parallel one has all rows and some columns.
    """

    name: str  # of the fused layer, for example "layers.3.qkv"
    index: int  # its place among the rank's linear layers
    parts: tuple[LinearPart, ...]
    in_features: int  # of the whole model
    columns: slice  # which of them this rank reads
    unit: int = field(init=False)  # every part begins and ends at a multiple of it in the layer's output

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", gcd(*(part.rows.stop - part.rows.start for part in self.parts)))
