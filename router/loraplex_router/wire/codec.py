"""Encodes plans and decodes their results."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate, chain, islice, pairwise, repeat

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.generation_pb2 import Sampling
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.sequence import Alternatives, Chunk, Plan, Sample


def encode_plan(plan: Plan, step: int) -> pb.StepRequest:
    """A plan as a message. Must be called before the plan's sequences change."""
    chunks = plan.chunks
    return pb.StepRequest(
        step=step,
        starts=[_encode_start(chunk) for chunk in chunks if chunk.sequence in plan.starts],
        rows=[chunk.sequence.row or 0 for chunk in chunks],
        lengths=[chunk.length for chunk in chunks],
        slots=[chunk.slot for chunk in chunks],
        samples=[chunk.samples for chunk in chunks],
        block_counts=[len(chunk.new_blocks) for chunk in chunks],
        blocks=[block for chunk in chunks for block in chunk.new_blocks],
    )


def _encode_start(chunk: Chunk) -> pb.SequenceStart:
    sequence = chunk.sequence
    assert sequence.row is not None
    return pb.SequenceStart(
        row=sequence.row,
        tokens=sequence.tokens,
        prompt_length=sequence.prompt_length,
        computed=chunk.start,
        sampling=Sampling(**sequence.sampling.given),
        **asdict(sequence.detail),
        grammar=encode_grammar(sequence.grammar, sequence.adapter) if sequence.grammar else None,
        unscored=sequence.unscored,
        min_new_tokens=sequence.min_new_tokens,
        end_token_ids=sequence.end_token_ids if sequence.min_new_tokens else (),
        unwanted_token_ids=sequence.unwanted_token_ids,
        traceparent=sequence.traceparent,
        vocab_size=sequence.adapter.tokenizer.vocab_size,
        allowed_token_ids=sequence.allowed_token_ids,
        bad_words=[pb.BadWord(tokens=word) for word in sequence.bad_words],
    )


def encode_grammar(grammar: Grammar, adapter: Adapter) -> pb.Grammar:
    """For answers of the adapter, which may have tokens of its own."""
    schemas = [schema.text for schema in grammar.schemas]
    kind = pb.GrammarKind.ValueType(grammar.kind.value)
    whose = adapter.digest if adapter.tokenizer.differs else ""
    thoughts = pb.Thoughts(**asdict(grammar.thoughts)) if grammar.thoughts else None
    return pb.Grammar(kind=kind, text=grammar.text, schemas=schemas, adapter=whose, thoughts=thoughts)


def read_samples(response: pb.StepResponse, chunks: Sequence[Chunk]) -> Iterator[Sequence[Sample]]:
    """The tokens, per chunk. If one of the plan's sequences wants logprobs, the response has everyone's."""
    samples = iter(_read_all_samples(response))
    for count, chunk in zip(response.token_counts, chunks, strict=True):
        found = [next(samples)] if count == 1 else list(islice(samples, count))
        unasked = response.logprobs and not chunk.sequence.detail.logprobs
        yield [Sample(sample.token) for sample in found] if unasked else found


def _read_all_samples(response: pb.StepResponse) -> Iterable[Sample]:
    if not response.logprobs:
        return map(Sample, response.tokens)
    alternatives = _read_alternatives(
        response.alternative_counts, response.alternative_tokens, response.alternative_logprobs
    )
    return map(Sample, response.tokens, response.logprobs, chain(alternatives, repeat(())))


def read_unscored(response: pb.StepResponse, chunks: int) -> list[Sequence[int]]:
    """The tokens, per chunk."""
    tokens = iter(response.unscored_tokens)
    counts = response.unscored_counts or [0] * chunks
    return [[next(tokens) for _ in range(count)] for count in counts]


def _read_alternatives(
    counts: Iterable[int], tokens: Iterable[int], logprobs: Iterable[float]
) -> Iterator[Alternatives]:
    pairs = zip(tokens, logprobs, strict=True)
    for count in counts:
        yield tuple(next(pairs) for _ in range(count))


def read_prompt_logprobs(response: pb.StepResponse, chunks: int) -> list[list[float]]:
    """The logprobs, per chunk: of the tokens after its positions."""
    values = iter(response.prompt_logprobs)
    counts = response.prompt_logprob_counts or [0] * chunks
    return [[next(values) for _ in range(count)] for count in counts]


def read_prompt_ranks(response: pb.StepResponse) -> list[list[int]]:
    """The ranks of the same tokens."""
    values = iter(response.prompt_ranks)
    return [[next(values) for _ in range(count)] for count in response.prompt_logprob_counts]


def read_prompt_alternatives(response: pb.StepResponse) -> list[list[Alternatives]]:
    """The alternatives of the same tokens; empty if not requested."""
    found = _read_alternatives(
        response.prompt_alternative_counts, response.prompt_alternative_tokens, response.prompt_alternative_logprobs
    )
    return [[next(found, ()) for _ in range(count)] for count in response.prompt_logprob_counts]


def read_pooled(response: pb.StepResponse) -> dict[int, Sequence[float]]:
    """The vectors, by the index of their chunk."""
    ends = list(accumulate(response.pooled_lengths, initial=0))
    vectors = (response.pooled[start:end] for start, end in pairwise(ends))
    return dict(zip(response.pooled_chunks, vectors, strict=True))
