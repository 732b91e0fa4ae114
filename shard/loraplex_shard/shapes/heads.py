"""The attention heads of one layer on one rank."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heads:
    """Adjacent query heads share a KV head. A token's heads lie side by side: queries, keys, values."""

    query: int
    kv: int
    dim: int  # of a query and a key
    window: int | None = None  # how many positions a token sees, itself included; None: all
    soft_cap: float = 0.0  # scores become soft_cap * tanh(score / soft_cap); 0: they stay as they are
    scale: float = 0.0  # of scores; 0: 1 / sqrt(dim)
    value_dim: int = 0  # of a value; 0: dim

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", self.scale or self.dim**-0.5)
        object.__setattr__(self, "value_dim", self.value_dim or self.dim)

    @property
    def width(self) -> int:
        """Numbers of one token's queries, keys and values."""
        return (self.query + self.kv) * self.dim + self.kv * self.value_dim

    @property
    def out_width(self) -> int:
        """Numbers of one token's attention."""
        return self.query * self.value_dim
