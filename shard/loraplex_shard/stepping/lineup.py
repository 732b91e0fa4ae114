"""Which rows a plan computes, and how much of each: a plan's columns, and what follows from them and from the rows'
starts alone. While the same sequences decode, it is the same object from plan to plan, and nothing about it is found
out twice."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from loraplex_shard.sampling.draws import DrawNumbers
from loraplex_shard.sampling.sampler import are_drawn_at_once
from loraplex_shard.sampling.stages import PARAMETERS

Ints = NDArray[np.int64]

# What a sequence wants reported in addition to tokens or (pool) instead of them.
DETAIL = np.dtype(
    [
        ("logprobs", np.bool_),
        ("top_logprobs", np.int64),
        ("prompt_logprobs", np.bool_),
        ("prompt_top_logprobs", np.int64),
        ("pool", np.bool_),
        ("classify", np.bool_),
    ]
)

# What is known of a row from its start on.
START = np.dtype(
    [
        ("prompt_length", np.int64),
        ("void", np.bool_),  # started with a token that is not in the vocabulary
        ("forceable", np.bool_),  # its grammar may add tokens that are not sampled
        ("constrained", np.bool_),  # a grammar, or lists of tokens, forbid it something
        ("biased", np.bool_),  # it has logit biases
        ("detail", DETAIL),
        ("sampling", PARAMETERS),
    ]
)


@dataclass(frozen=True, eq=False)
class Lineup:
    """Chunk i computes lengths[i] tokens of the sequence in row rows[i], with the adapter in slots[i]: the tokens
    [offsets[i], offsets[i + 1]) of the batch. A token is sampled after the chunks samples[i]."""

    rows: Ints
    lengths: Ints
    slots: Ints
    samples: NDArray[np.bool_]
    starts: NDArray[np.void]  # START, by chunk

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def offsets(self) -> Ints:
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @cached_property
    def rows_of_tokens(self) -> Ints:
        return np.repeat(self.rows, self.lengths)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """The runs of tokens with the same adapter: (first token, stop, slot). Not those of the base model."""
        changes = np.flatnonzero(np.diff(self.slots)) + 1
        firsts = [0, *changes.tolist()]
        bounds, slots = self.offsets[[*firsts, len(self)]].tolist(), self.slots[firsts].tolist()
        return [run for run in zip(bounds[:-1], bounds[1:], slots, strict=True) if run[2]]

    @cached_property
    def sampled(self) -> "SampledChunks":
        places = np.flatnonzero(self.samples)
        return SampledChunks(places, self.rows[places], self.offsets[1:][places] - 1, self.starts[places])

    @cached_property
    def void(self) -> Ints:
        """The chunks of void rows."""
        return np.flatnonzero(self.starts["void"])

    @cached_property
    def pooled(self) -> list[int]:
        """The chunks of pooled sequences."""
        return np.flatnonzero(self.starts["detail"]["pool"]).tolist()

    @cached_property
    def scores_prompts(self) -> bool:
        """Whether some want their prompts' logprobs."""
        return bool(self.starts["detail"]["prompt_logprobs"].any())


@dataclass(frozen=True, eq=False)
class SampledChunks:
    """The chunks of a lineup after which a token is sampled."""

    places: Ints  # of these chunks in the plan
    rows: Ints
    tokens: Ints  # of the batch: the samples follow these
    starts: NDArray[np.void]  # START

    def __len__(self) -> int:
        return len(self.places)

    @property
    def detail(self) -> NDArray[np.void]:
        detail: NDArray[np.void] = self.starts["detail"]
        return detail

    @cached_property
    def sampling(self) -> NDArray[np.void]:
        return np.ascontiguousarray(self.starts["sampling"])

    @cached_property
    def scored(self) -> NDArray[np.bool_]:
        """Which asked for logprobs."""
        scored: NDArray[np.bool_] = self.detail["logprobs"] | (self.detail["top_logprobs"] > 0)
        return scored

    @cached_property
    def forceable(self) -> Ints:
        return np.flatnonzero(self.starts["forceable"])

    @cached_property
    def constrained(self) -> bool:
        return bool(self.starts["constrained"].any())

    @cached_property
    def numbers(self) -> DrawNumbers:
        return DrawNumbers(self.sampling)

    @cached_property
    def drawn_at_once(self) -> bool:
        """Whether `numbers` and the logits alone decide about all the tokens."""
        return not self.constrained and not len(self.biased) and are_drawn_at_once(self.sampling)

    @cached_property
    def biased(self) -> Ints:
        return np.flatnonzero(self.starts["biased"])
