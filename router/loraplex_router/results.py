"""Reads the columns of a step's result. Knows the message, not what becomes of it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat

from loraplex_protos import shard_pb2 as pb
from loraplex_router.output import Alternatives, Sample


def read_samples(response: pb.StepResponse) -> Iterator[Sequence[Sample]]:
    """The tokens of each chunk."""
    samples = iter(_read_all_samples(response))
    for count in response.token_counts:
        yield [next(samples)] if count == 1 else list(islice(samples, count))


def _read_all_samples(response: pb.StepResponse) -> Iterable[Sample]:
    if not response.logprobs:
        return map(Sample, response.tokens)
    alternatives = _read_alternatives(
        response.alternative_counts, response.alternative_tokens, response.alternative_logprobs
    )
    return map(Sample, response.tokens, response.logprobs, chain(alternatives, repeat(())))


def read_announced(response: pb.StepResponse, chunks: int) -> list[Sequence[int]]:
    """The tokens of each chunk."""
    tokens = iter(response.announced_tokens)
    counts = response.announced_counts or [0] * chunks
    return [[next(tokens) for _ in range(count)] for count in counts]


def _read_alternatives(
    counts: Iterable[int], tokens: Iterable[int], logprobs: Iterable[float]
) -> Iterator[Alternatives]:
    pairs = zip(tokens, logprobs, strict=True)
    for count in counts:
        yield tuple(next(pairs) for _ in range(count))


def read_prompt_logprobs(response: pb.StepResponse, chunks: int) -> list[list[float]]:
    """Those of each chunk: of the tokens after its positions."""
    values = iter(response.prompt_logprobs)
    counts = response.prompt_logprob_counts or [0] * chunks
    return [[next(values) for _ in range(count)] for count in counts]


def read_prompt_alternatives(response: pb.StepResponse) -> list[list[Alternatives]]:
    """Those of the same tokens; empty where they were not asked for."""
    found = _read_alternatives(
        response.prompt_alternative_counts, response.prompt_alternative_tokens, response.prompt_alternative_logprobs
    )
    return [[next(found, ()) for _ in range(count)] for count in response.prompt_logprob_counts]


def read_pooled(response: pb.StepResponse) -> dict[int, Sequence[float]]:
    """The vectors, by the place of their chunk."""
    count = len(response.pooled_chunks)
    size = len(response.pooled) // count if count else 0
    return {place: response.pooled[i * size : (i + 1) * size] for i, place in enumerate(response.pooled_chunks)}
