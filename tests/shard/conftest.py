"""Tiny random checkpoints, and a driver that feeds a decoder chunks of sequences as the runner does."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loraplex_shard.batch import Batch, Segment
from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.models import Decoder, load_decoder
from loraplex_shard.parallel import Group

SaveCheckpoint = Callable[..., Path]


class Sequences:
    """Sequences in a paged cache of their own, whose blocks are handed out in shuffled order."""

    def __init__(self, decoder: Decoder, block_size: int = 4, num_blocks: int = 96) -> None:
        self.decoder = decoder
        self.cache = decoder.new_cache(num_blocks, block_size)
        self.free_blocks = Random(0).sample(range(num_blocks), num_blocks)
        self.computed: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}

    def step(self, chunks: dict[str, list[int]], segments: tuple[Segment, ...] = ()) -> dict[str, torch.Tensor]:
        """Computes these tokens of each sequence; its logits for each, [tokens, vocab] (nothing but on rank 0)."""
        batch = self.batch(chunks, segments)
        logits = self.decoder.logits(self.decoder(batch, self.cache), segments)
        return {} if logits is None else dict(zip(chunks, logits.split([len(c) for c in chunks.values()]), strict=True))

    def batch(self, chunks: dict[str, list[int]], segments: tuple[Segment, ...]) -> Batch:
        block_size, positions, indices, starts = self.cache.block_size, [], [], [0]
        for name, tokens in chunks.items():
            first = self.computed.get(name, 0)
            self.computed[name] = first + len(tokens)
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * block_size < self.computed[name]:
                blocks.append(self.free_blocks.pop())
            span = range(first, self.computed[name])
            positions += span
            indices += [blocks[p // block_size] * block_size + p % block_size for p in span]
            starts.append(len(positions))
        longest = max(len(self.blocks[name]) for name in chunks)
        return Batch(
            token_ids=torch.tensor([token for tokens in chunks.values() for token in tokens]),
            positions=torch.tensor(positions),
            cache_indices=torch.tensor(indices),
            starts=tuple(starts),
            context_lengths=tuple(self.computed[name] for name in chunks),
            block_tables=torch.tensor([self.blocks[n] + [0] * (longest - len(self.blocks[n])) for n in chunks]),
            segments=segments,
        )

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        """The `steps` most likely tokens after the prompt, each computed by itself."""
        tokens, chunk = [], prompt
        for _ in range(steps):
            chunk = [int(self.step({"greedy": chunk})["greedy"][-1].argmax())]
            tokens += chunk
        return tokens


@pytest.fixture
def sequences() -> type[Sequences]:
    return Sequences


@pytest.fixture(scope="session")
def save_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> SaveCheckpoint:
    """Saves a random model of a configuration; no bias is zero and no norm is one, so that none can be overlooked."""

    def save(config: PreTrainedConfig, **options: object) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
        directory = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(directory, **options)
        return directory

    return save


@pytest.fixture(scope="session")
def reference() -> Callable[..., PreTrainedModel]:
    """The transformers model of a directory."""

    def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    return load


@pytest.fixture(scope="session")
def decoder() -> Callable[..., Decoder]:
    """The whole decoder of a directory."""

    def load(directory: Path, dtype: torch.dtype = torch.float32, max_model_len: int = 64) -> Decoder:
        checkpoint = open_checkpoint(str(directory))
        return load_decoder(checkpoint, Group(0, 1), dtype, torch.device("cpu"), max_model_len)

    return load
