"""The sampling parameters, named and explained as in generation.proto. Checks, plans and the faces' fields are derived
from the fields of `Sampling`."""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict

from loraplex_protos.errors import FieldViolation

MAX_BIASED = 1024
LARGEST = 3.4e38  # a finite float


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a parameter may have, and the words for them in errors. NaN is outside every range."""

    least: float
    most: float
    words: str
    exclusive: bool = False  # `least` itself is not allowed
    narrows: bool = False  # it excludes tokens, which matters only if tokens are drawn: temperature defaults to 1 then

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.exclusive and value == self.least)


class Sampling(BaseModel):
    """The parameters as the caller set them. None skips the step; for temperature and seed, the server chooses."""

    model_config = ConfigDict(frozen=True)

    temperature: Annotated[float | None, Range(0, LARGEST, "at least 0")] = None
    top_k: Annotated[int | None, Range(1, 2**32 - 1, "at least 1, or absent to keep all tokens", narrows=True)] = None
    top_p: Annotated[float | None, Range(0, 1, "above 0 and at most 1", exclusive=True, narrows=True)] = None
    typical_p: Annotated[float | None, Range(0, 1, "above 0 and at most 1", exclusive=True, narrows=True)] = None
    min_p: Annotated[float | None, Range(0, 1, "from 0 to 1", narrows=True)] = None
    top_n_sigma: Annotated[float | None, Range(0, LARGEST, "above 0", exclusive=True, narrows=True)] = None
    repetition_penalty: Annotated[float | None, Range(0, LARGEST, "above 0", exclusive=True)] = None
    frequency_penalty: Annotated[float | None, Range(-2, 2, "from -2 to 2")] = None
    presence_penalty: Annotated[float | None, Range(-2, 2, "from -2 to 2")] = None
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None  # added to the logits, by token id

    @property
    def given(self) -> dict[str, Any]:
        """The parameters that are not None. Other fields of a face's model are left out."""
        return self.model_dump(include=set(Sampling.model_fields), exclude_none=True)

    def resolve(self, index: int = 0) -> Self:
        """The parameters with temperature and seed set, for sequence `index` of the request."""
        narrowed = any(RANGES[name].narrows for name in self.given.keys() & RANGES.keys())
        temperature = float(narrowed) if self.temperature is None else self.temperature
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return self.model_copy(update={"temperature": temperature, "seed": (seed + index) % 2**64})

    def check(self, vocab_size: int) -> Iterator[FieldViolation]:
        """Every parameter that is wrong."""
        for name, limits in RANGES.items():
            value = getattr(self, name)
            if value is not None and value not in limits:
                yield FieldViolation(f"sampling.{name}", f"must be {limits.words}")
        bias = self.logit_bias or {}
        if len(bias) > MAX_BIASED:
            yield FieldViolation("sampling.logit_bias", f"at most {MAX_BIASED} tokens")
        if not all(0 <= token < vocab_size for token in bias):
            yield FieldViolation("sampling.logit_bias", f"every id must be below {vocab_size}")
        if not all(-100 <= value <= 100 for value in bias.values()):
            yield FieldViolation("sampling.logit_bias", "every value must be from -100 to 100")


RANGES = {
    name: limits
    for name, field in Sampling.model_fields.items()
    for limits in field.metadata
    if isinstance(limits, Range)
}
