"""What a rank runs before it serves: the largest steps that plans can ask for, so that their memory is known, and one
of each kind, so that nothing is compiled or chosen for the first time while sequences wait."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2 import SequenceStart, StepRequest
from loraplex_shard.lora.weights.deltas import Delta, partition_adapter
from loraplex_shard.sampling.stages import STAGES
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.shapes.layout import HEAD, LinearLayout

# Kernels differ for one token, for up to 16, and for more; so do those for an adapter's tokens.
FEW, MORE = 16, 17
LONG = 600  # positions: more than attention reads in one piece
LONGEST = 8_300  # more than the windows of most models
LORA_RANK = 16
OF_LAYERS = 2  # the slot of an adapter that leaves the lm head alone
EXPERTS = 2  # whose layers the adapter touches: those of one expert
# All tokens are equally likely then, nearly, and the whole vocabulary is looked at.
FLAT = Sampling(temperature=1e6, top_p=0.999, seed=1)
# A value for each parameter of a stage, which is not its neutral one.
VALUES = {"top_k": 10}
OTHERWISE = 0.9


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a plan can ask for."""

    tokens: int
    sequences: int
    context: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """`tokens` of a sequence, after `context` of it that count as computed."""

    tokens: int = 1
    context: int = 0
    slot: int = 0
    sampling: Sampling = field(default_factory=Sampling)


def plans(limits: Limits, cache: KVCache, samples: bool, flat: bool) -> Iterator[StepRequest]:
    """`cache` may have few blocks: sequences share them, since nobody reads what they compute. `samples`: whether the
    model has an lm head. `flat`: whether all rows of the largest decode look at the whole vocabulary, which takes the
    most memory, and on a CPU seconds. Adapters are asked for in slot 1."""
    whole, rest = divmod(limits.tokens, limits.context)
    prompts = [Chunk(limits.context)] * whole + [Chunk(rest)] * (rest > 0)
    rows = min(limits.tokens, limits.sequences)
    room = 0 if cache.states else limits.context - 1  # of a chunk's context; a model with states begins at 0
    stages = [Chunk(sampling=sampling) for sampling in each_stage()]
    steps = [
        prompts[:rows],
        [Chunk(sampling=FLAT if flat else Sampling())] * rows,
        [Chunk(context=min(LONGEST, room))],
        [*[Chunk(context=min(LONG, room))] * (FEW - 1), Chunk(slot=1)],
        [Chunk(context=min(LONG, room)), Chunk(slot=1, tokens=min(MORE, limits.context))],
        *(stages[first : first + rows] for first in range(0, len(stages), rows)),
    ]
    for chunks in steps:
        if len(chunks) <= rows and sum(chunk.tokens for chunk in chunks) <= limits.tokens:
            yield _plan(chunks, cache, samples)


def recorded(sizes: Sequence[int], limits: Limits, cache: KVCache, samples: bool) -> Iterator[StepRequest]:
    """Chunks and decodes of these numbers of tokens, as far as the limits allow: without an adapter, and with one in
    slot 2. The largest come first, since steps that are recorded share memory."""
    for size in sorted(sizes, reverse=True):
        for slot in (0, OF_LAYERS):
            if 1 < size <= min(limits.tokens, limits.context):
                yield _plan([Chunk(tokens=size, slot=slot)], cache, samples)
            if size <= min(limits.tokens, limits.sequences):
                yield _plan([*[Chunk()] * (size - 1), Chunk(slot=slot)], cache, samples)


def each_stage() -> Iterator[Sampling]:
    for seed, stage in enumerate(STAGES):
        values = {name: VALUES.get(name, OTHERWISE) for name in stage.neutral}
        yield Sampling(temperature=1, seed=seed, **values)  # type: ignore[arg-type]


def zero_adapters(layouts: Sequence[LinearLayout], dtype: torch.dtype) -> tuple[AdapterWeights, AdapterWeights]:
    """Adapters that change nothing, for slots 1 and 2: on all layers that adapters may touch, of experts on those of
    one; and on all but the lm head, as most are."""
    of_experts = [layout for layout in layouts if layout.of_expert]
    touched = [layout for layout in layouts if not layout.of_expert] + of_experts[:EXPERTS]
    all_of_it, of_layers = (
        partition_adapter(_zeros(some), layouts, dtype).weights
        for some in (touched, [layout for layout in touched if layout.name != HEAD])
    )
    return all_of_it, of_layers


def _zeros(layouts: Sequence[LinearLayout]) -> dict[str, Delta]:
    return {
        part.module: Delta(torch.zeros(LORA_RANK, layout.in_features), torch.zeros(part.out_features, LORA_RANK), 1.0)
        for layout in layouts
        for part in layout.parts
    }


def _plan(chunks: Sequence[Chunk], cache: KVCache, samples: bool) -> StepRequest:
    lengths = [chunk.context + chunk.tokens for chunk in chunks]
    counts = [-(-length // cache.block_size) for length in lengths]
    return StepRequest(
        starts=[
            SequenceStart(
                row=row, tokens=[0] * length, prompt_length=length, computed=chunk.context, sampling=chunk.sampling
            )
            for row, (chunk, length) in enumerate(zip(chunks, lengths, strict=True))
        ],
        rows=range(len(chunks)),
        lengths=[chunk.tokens for chunk in chunks],
        slots=[chunk.slot for chunk in chunks],
        samples=[samples] * len(chunks),
        block_counts=counts,
        blocks=[block % cache.num_blocks for block in range(sum(counts))],
    )
