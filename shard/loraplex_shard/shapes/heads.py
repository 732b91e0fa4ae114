"""The attention heads of one layer on one rank."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heads:
    """Adjacent query heads share a KV head. A token's heads are side by side: queries, keys, values."""

    query: int
    kv: int
    dim: int  # dimensions of a query and a key
    window: int | None = None  # number of positions that a token sees, itself included; None: all
    soft_cap: float = 0.0  # scores become soft_cap * tanh(score / soft_cap); 0: they stay as they are
    scale: float = 0.0  # scores are multiplied by this; 0: 1 / sqrt(dim)
    value_dim: int = 0  # dimensions of a value; 0: dim

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", self.scale or self.dim**-0.5)
        object.__setattr__(self, "value_dim", self.value_dim or self.dim)

    @property
    def width(self) -> int:
        """The length of a token's queries, keys and values together."""
        return (self.query + self.kv) * self.dim + self.kv * self.value_dim

    @property
    def out_width(self) -> int:
        """The length of a token's attention output."""
        return self.query * self.value_dim
