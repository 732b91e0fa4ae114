"""Tiny decoders of each kind compute what transformers' compute, in chunks, in mixed batches and with adapters.

Sequences go through the runner, as plans bring them. What it says of the prompt's tokens and the tokens that it chooses
are compared with one pass of transformers' model over the whole.
"""

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from transformers import PreTrainedConfig

from bench.engine.stepping import Slots, random_deltas
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import CLASSES, load, reference, tiny
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.weights.deltas import Delta, partition_adapter
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.stepping.runner import Runner
from tests.shard.planner import BLOCK_SIZE, MAX_MODEL_LEN, NUM_BLOCKS, Planner, random_tokens

# Of prompts; the longest ones are beyond the window. Triton's interpreter is slow.
LENGTHS: dict[DeviceName, tuple[int, ...]] = {"cuda": (21, 50, 3, 70), "cpu": (7, 30, 3)}
DECODES: dict[DeviceName, int] = {"cuda": 5, "cpu": 1}
LORA_RANKS = 3, 16  # of the adapters in slots 1 and 2
SLOTS = 1, 0, 2, 1  # of the prompts
STRENGTH = 20.0  # of an adapter: its deltas are then about as large as the weights
# Times the error that transformers' own model has in the dtype. In float32, both only sum in different orders.
ALLOWED = 1.5
FLOAT32 = 1e-4


def checks(device: DeviceName) -> Iterator[Check]:
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32,)
    names = CLASSES if device == "cuda" else ["Mistral 7B"]
    for name in names:
        for dtype in dtypes:
            run = partial(_compare, tiny(name, num_hidden_layers=2 if device == "cuda" else 1), device, dtype)
            yield Check(f"{name.rpartition(' ')[0]}, {str(dtype).removeprefix('torch.')}", run)


def _compare(config: PreTrainedConfig, device: DeviceName, dtype: torch.dtype) -> Row:
    decoder = load(config, device, dtype, max_model_len=MAX_MODEL_LEN)
    deltas = [random_deltas(decoder.layouts, lora_rank, lora_rank) for lora_rank in LORA_RANKS]
    prompts = [random_tokens(length, length) for length in LENGTHS[device]]
    outputs, logprobs = _generate(decoder, deltas, prompts, DECODES[device])
    errors, own, worst = list[float](), list[float](), 0.0
    for adapter in sorted(set(SLOTS)):
        added = _added(deltas[adapter - 1], device) if adapter else {}
        exact, rounded = (reference(config, device, each, added) for each in (torch.float32, dtype))
        for row, slot in enumerate(SLOTS[: len(prompts)]):
            if slot == adapter:
                whole = torch.tensor([prompts[row] + outputs[row]], device=device)
                right, theirs = (_logprobs(model, whole) for model in (exact, rounded))
                known = len(prompts[row]) - 1
                scores = right[:-1].gather(1, whole[0, 1:, None])[:, 0]
                errors += (scores[:known].cpu() - torch.tensor(logprobs[row])).abs().tolist()
                own += (right - theirs).abs().mean(-1).tolist()
                missed = (right[:-1].amax(-1) - scores)[known:]
                worst = max(worst, float(missed.max()))
    error, theirs_error = statistics.mean(errors), statistics.mean(own)
    allowed = max(FLOAT32, ALLOWED * theirs_error)
    assert error <= allowed, f"logprobs differ by {error:.2e} from transformers' in float32; {allowed:.2e} is allowed"
    assert worst <= 8 * allowed, f"a chosen token is {worst:.2e} less likely than the best one"
    return {"model": config.model_type, "dtype": str(dtype), "error": error, "transformers' own": theirs_error}


def _generate(
    decoder: Decoder, deltas: list[dict[str, Delta]], prompts: list[list[int]], decodes: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Each prompt's continuation, and the logprobs of the prompt's tokens."""
    slots = Slots()
    adapters = (partition_adapter(_strong(each), decoder.layouts, decoder.dtype).weights for each in deltas)
    slots.adapters = [adapter.at(adapter.memory.to(decoder.device)) for adapter in adapters]
    runner = Runner(
        decoder,
        decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE),
        slots,
        Group(0, 1),
        len(prompts),
        MAX_MODEL_LEN,
        decoder.device,
        GrammarCompiler(b"{}", decoder.vocab_size, end_token_ids=()),
    )
    planner = Planner()
    logprobs: list[list[float]] = [[] for _ in prompts]
    for row, prompt in enumerate(prompts):
        planner.start(row, prompt, slot=SLOTS[row], prompt_logprobs=True)
    first = {row: len(prompt) // 2 or 1 for row, prompt in enumerate(prompts)}
    for lengths in (first, {row: len(prompt) - first[row] for row, prompt in enumerate(prompts)}):
        plan = planner.plan(lengths)
        response = runner.step(plan)
        planner.read(plan, response)
        values = iter(response.prompt_logprobs)
        for row, count in zip(plan.rows, response.prompt_logprob_counts, strict=True):
            logprobs[row] += [next(values) for _ in range(count)]
    planner.decode(runner.step, range(len(prompts)), decodes)
    return [planner.rows[row].outputs for row in range(len(prompts))], logprobs


def _strong(deltas: dict[str, Delta]) -> dict[str, Delta]:
    return {module: Delta(delta.a, delta.b, STRENGTH) for module, delta in deltas.items()}


def _added(deltas: dict[str, Delta], device: DeviceName) -> dict[str, torch.Tensor]:
    return {module: (delta.b @ delta.a * STRENGTH).to(device) for module, delta in deltas.items()}


@torch.inference_mode()
def _logprobs(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens).logits
    return logits[0].float().log_softmax(-1)
