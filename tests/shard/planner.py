"""A tiny Llama with adapters, and the router's role: plans for sequences, whose results are collected."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from random import Random
from types import TracebackType
from typing import Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2 import SequenceStart, StepRequest, StepResponse
from loraplex_protos.shard_pb2_grpc import ShardServiceStub

VOCAB, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS = 96, 512, 16, 96
GREEDY = Sampling()

Step = Callable[[StepRequest], StepResponse]


def save_llama(directory: Path) -> PreTrainedModel:
    """A random checkpoint with a tokenizer: 9 heads over 3 KV heads, like the embedded model. Returns the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.4,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    words = models.WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2").save_pretrained(directory)
    return model


def save_adapter(checkpoint: Path, directory: Path, seed: int, lora_rank: int) -> PeftModel:
    """A random adapter of the checkpoint. Returns the model with the adapter on it."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(checkpoint)
    config = LoraConfig(r=lora_rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' deprecations that PEFT uses
        model = get_peft_model(base, config).eval()
        model.save_pretrained(directory)
    return model


def random_tokens(length: int, seed: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(VOCAB) for _ in range(length)]


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy continuation of the prompt by transformers, with `count` tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@dataclass
class Row:
    known: int
    computed: int
    slot: int
    blocks: list[int]
    unsent: list[int]  # the sequence's last blocks, which no plan has named yet
    outputs: list[int] = field(default_factory=list)
    unscored: int = 0  # tokens whose logprobs have not arrived yet


class Planner:
    """Plans chunks of sequences and collects their outputs by row. Blocks are allocated in shuffled order."""

    def __init__(self) -> None:
        self.free_blocks = Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.rows: dict[int, Row] = {}
        self.steps = 0
        self._starts: list[SequenceStart] = []

    def start(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        outputs: Sequence[int] = (),
        slot: int = 0,
        prefix: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        **detail: object,
    ) -> None:
        """Starts a sequence with the next plan. `prefix`: full blocks that already hold its first positions."""
        computed = len(prefix) * BLOCK_SIZE
        known = [*tokens, *outputs]
        self.rows[row] = Row(len(known), computed, slot, list(prefix), list(prefix), list(outputs))
        self._starts.append(
            SequenceStart(
                row=row, tokens=known, prompt_length=len(tokens), computed=computed, sampling=sampling, **detail
            )
        )

    def release(self, row: int) -> None:
        self.free_blocks += self.rows.pop(row).blocks

    def plan(self, lengths: dict[int, int]) -> StepRequest:
        """Plans chunks of these lengths by row. A chunk that reaches the end of its row's known tokens samples."""
        request = StepRequest(step=self.steps, starts=self._starts)
        self.steps, self._starts = self.steps + 1, []
        for number, length in sorted(lengths.items(), key=lambda item: self.rows[item[0]].slot):
            row = self.rows[number]
            row.computed += length
            while len(row.blocks) * BLOCK_SIZE < row.computed:
                row.unsent.append(self.free_blocks.pop())
                row.blocks.append(row.unsent[-1])
            samples = row.computed == row.known
            row.known += samples
            request.rows.append(number)
            request.lengths.append(length)
            request.slots.append(row.slot)
            request.samples.append(samples)
            request.block_counts.append(len(row.unsent))
            request.blocks.extend(row.unsent)
            row.unsent = []
        return request

    def read(self, plan: StepRequest, response: StepResponse) -> None:
        """Adds the step's tokens to their rows' outputs."""
        assert response.step == plan.step
        assert len(response.token_counts) == len(plan.rows)
        tokens, unscored = iter(response.tokens), response.unscored_counts or [0] * len(plan.rows)
        for number, count, coming in zip(plan.rows, response.token_counts, unscored, strict=True):
            row = self.rows[number]
            row.outputs += [next(tokens) for _ in range(count)]
            scored = min(count, row.unscored)
            row.unscored += coming - scored
            row.known += coming + max(count - scored - 1, 0)
        assert not list(tokens)

    def run(self, step: Step, lengths: dict[int, int]) -> StepResponse:
        """Plans one step, runs it, and reads the result."""
        plan = self.plan(lengths)
        response = step(plan)
        self.read(plan, response)
        return response

    def decode(self, step: Step, rows: Sequence[int], count: int) -> None:
        """Runs steps in which each of these rows feeds its last sampled token and the fast-forward tokens after it."""
        for _ in range(count):
            self.run(step, {row: self.rows[row].known - self.rows[row].computed for row in rows})


class Stream:
    """A Step stream that is open until the `with` block ends."""

    def __init__(self, stub: ShardServiceStub) -> None:
        self._plans: SimpleQueue[StepRequest | None] = SimpleQueue()
        self.call = stub.Step(iter(self._plans.get, None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plans.put(None)

    def send(self, plan: StepRequest) -> None:
        self._plans.put(plan)

    def receive(self) -> StepResponse:
        return next(self.call)

    def step(self, plan: StepRequest) -> StepResponse:
        self.send(plan)
        return self.receive()

    def close(self) -> None:
        """Closes the stream properly."""
        self._plans.put(None)
        assert list(self.call) == []
