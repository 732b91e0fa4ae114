"""A mixture of experts like Qwen3-MoE, with random weights: how close a decode step comes to the time that it takes to
read the weights that it needs, which include only the experts that its tokens choose."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from bench.engine.figure import Figure
from bench.engine.stepping import Stepper, load_model, random_adapter
from bench.engine.timing import in_turns, median_of, ratio, seconds_per_byte
from loraplex_shard.layers.experts import ExpertLinear
from loraplex_shard.ops.base import Routing

CONTEXT = 128
ROUNDS = 9
WANTED = {1: 0.6, 8: 0.5, 32: 0.4}
ADAPTERS = 8
CONFIG: dict[str, Any] = {
    "vocab_size": 49152,  # as in the embedded model, whose tokenizer is used
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "norm_topk_prob": True,
}


class ExpertsStepper(Stepper):
    """A stepper that counts the experts that the tokens of the last step chose."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            torch.manual_seed(0)
            config = Qwen3MoeConfig(**CONFIG)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
            model.save_pretrained(directory)
            super().__init__("none", decoder=load_model("none", model=str(Path(directory))))
        for layer in self.cache.layers:
            layer.values.zero_()  # otherwise all sequences would choose the same experts
        self._starts_by_tokens: dict[int, list[torch.Tensor]] = {}
        route = self.decoder.ops.route

        def watched(logits: torch.Tensor, chosen: int, normalized: bool) -> Routing:
            """Called while a step is recorded. The tensors that it returns are then updated by every such step."""
            routing = route(logits, chosen, normalized)
            self._starts_by_tokens.setdefault(len(logits), []).append(routing.starts)
            return routing

        self.decoder.ops.route = watched  # type: ignore[method-assign]

    def bytes_read(self, batch: int) -> int:
        """Bytes that the last step of `batch` sequences read: all weights except the experts that were not chosen."""
        (size,) = {sum(e.weight.nbytes for e in pair) for pair in self._experts()}
        hit = sum(int((starts.diff() > 0).sum()) for starts in self._starts_by_tokens[batch])
        return self.weight_bytes + hit * int(size) + self.kv_bytes(batch, CONTEXT)

    def _experts(self) -> Iterator[tuple[Any, ...]]:
        experts = [m for m in self.decoder.modules() if isinstance(m, ExpertLinear)]
        half = CONFIG["num_experts"]
        for layer in range(CONFIG["num_hidden_layers"]):
            own = experts[2 * half * layer : 2 * half * (layer + 1)]
            yield from zip(own[:half], own[half:], strict=True)


def mixture() -> Iterator[Figure]:
    stepper = ExpertsStepper()
    many = [random_adapter(stepper.decoder.layouts, 8, seed) for seed in range(ADAPTERS)]
    step = partial(stepper.seconds_per_decode, context=CONTEXT)
    works: dict[Any, Callable[[], float]] = {"byte": seconds_per_byte()}
    works |= {batch: partial(step, batch) for batch in WANTED}
    works["adapters"] = partial(step, 32, adapters=many)
    measured = in_turns(works, ROUNDS)
    for batch, wanted in WANTED.items():
        read = stepper.bytes_read(batch)
        share = median_of(lambda byte, spent, read=read: read * byte / spent, measured["byte"], measured[batch])
        speed = median_of(lambda spent, batch=batch: batch / spent, measured[batch])
        name = f"experts, decode step, bf16, batch {batch}: memory floor of what was hit ÷ time"
        yield Figure(name, wanted, share, f"{speed:.0f} tok/s, {read / 1e6:.0f} MB")
    gain = ratio(measured[32], measured["adapters"])
    yield Figure(f"{ADAPTERS} adapters (r=8) of experts, batch 32 ÷ base, tokens/s", 0.7, gain)
