"""How a linear layer of this rank relates to the whole model's layer. Adapters are cut in the same way."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import gcd

import torch

HEAD = "lm_head"  # the name of its layer in our own decoder


@dataclass(frozen=True, slots=True)
class LinearPart:
    """A module of a checkpoint that is a linear layer or a part of one."""

    module: str  # its name in the checkpoint and in PEFT, for example "model.layers.3.self_attn.q_proj"
    out_features: int  # of the whole model
    rows: tuple[slice, ...]  # the outputs of this rank: several runs if checkpoints fuse projections in the module

    @property
    def width(self) -> int:
        """The number of outputs that this rank computes."""
        return sum(len(range(run.start, run.stop, run.step or 1)) for run in self.rows)


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """A linear layer. It may be several modules with the same input, fused into one (q, k and v; gate and up).

    Its output on this rank is the parts' outputs side by side. A column-parallel layer has all columns and some rows of
    each part; a row-parallel layer has all rows and some columns.
    """

    name: str  # the fused layer's name, for example "layers.3.qkv"
    index: int  # its index among the rank's linear layers
    parts: tuple[LinearPart, ...]
    in_features: int  # of the whole model
    columns: slice  # the inputs that this rank reads
    of_expert: bool = False  # it belongs to an expert, so only the expert's tokens pass it; such layers come last
    unit: int = field(init=False)  # every part begins and ends at a multiple of this in the layer's output

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", gcd(*(part.width for part in self.parts)))


@dataclass(frozen=True, slots=True)
class VocabularyLayout:
    """The embedding and the lm head of the whole model, as far as adapters have rows of their own there."""

    embedding: str  # the modules' names
    head: str
    vocab_size: int
    hidden_size: int
    scale: float  # what embeddings are multiplied by
    dtype: torch.dtype  # the model's
    norms: int  # parameters of all norms


def count_indices(layouts: Iterable[LinearLayout]) -> int:
    """The number of rows of a table with a row for each of these layers, at its index."""
    return 1 + max(layout.index for layout in layouts)
