"""The figures that need servers: real `loraplex serve` processes on this machine, and transformers in this process."""

import asyncio
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from bench.engine.figures import Figure
from bench.engine.stepping import Stepper, median_seconds
from bench.load import Target, Workload, measure
from bench.peft_target import PeftTarget, load_model
from bench.processes import Loraplex
from bench.targets import open_target

PROMPT, OUTPUT = 64, 64
RUNS = 5


@contextmanager
def serving(*flags: str) -> Iterator[dict[str, str]]:
    """The addresses of a server with these flags."""
    with Loraplex("serve", *flags) as server:
        while not (addresses := server.addresses()):
            time.sleep(0.2)
        yield addresses


def tokens_per_second(server: dict[str, str], concurrency: int, adapters: tuple[str, ...] = ()) -> float:
    """The median of some runs, each warmed up; all streams of a run start together."""

    async def run() -> float:
        target: Target = open_target(f"grpc://{server['grpc']}", None)
        try:
            workload = Workload(concurrency, concurrency, PROMPT, OUTPUT, adapters, 10_000, 0)
            runs = [(await measure(target, workload, number)).tokens_per_second for number in range(RUNS)]
            return statistics.median(runs)
        finally:
            await target.close()

    return asyncio.run(run())


@contextmanager
def busy_share(server: dict[str, str]) -> Iterator[list[float]]:
    """At the end of the block holds the share of its time in which the shard computed a step."""
    share: list[float] = []
    began, spent = time.monotonic(), _step_seconds(server)
    yield share
    share.append((_step_seconds(server) - spent) / (time.monotonic() - began))


def _step_seconds(server: dict[str, str]) -> float:
    with urllib.request.urlopen(f"http://{server['http']}/metrics") as metrics:
        lines = metrics.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("loraplex_step_duration_seconds_sum"))


def save_adapters(directory: Path, count: int) -> tuple[str, ...]:
    """Random adapters on all linear layers, with lora_ranks from 8 to 64."""
    base = load_model("default")
    names = tuple(f"adapter-{number}" for number in range(count))
    for number, name in enumerate(names):
        config = LoraConfig(r=8 << number % 4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.01)
        model.save_pretrained(str(directory / name))
        base = model.unload()
    return names


def served() -> Iterator[Figure]:
    """All figures that need a server."""
    stepped, alone = stepped_in_process(32), single_stream()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        names = save_adapters(directory, 32)
        with serving("--adapters", name) as server:
            one = tokens_per_second(server, 1)
            yield Figure("served, 1 stream ÷ transformers' single stream, bf16", 2.7, one / alone, f"{one:.0f} tok/s")
            with busy_share(server) as share:
                many = tokens_per_second(server, 32)
            detail = f"{many:.0f} tok/s"
            yield Figure("served, 32 streams ÷ transformers' single stream, bf16", 33, many / alone, detail)
            yield Figure("served, 32 streams ÷ the same batch stepped in process", 0.90, many / stepped, detail)
            yield Figure("served, 32 streams: share of the time in which the shard computes", 0.97, share[0])
            adapted = tokens_per_second(server, 32, names)
        sequential = peft_sequential(directory, names)
        detail = f"{adapted:.0f} and {sequential:.1f} tok/s"
        yield Figure("32 streams over 32 adapters (r 8 to 64) ÷ PEFT one by one", 25, adapted / sequential, detail)
    with serving("--tp", "1") as single, serving("--tp", "2") as double:
        ratio = tokens_per_second(double, 8) / tokens_per_second(single, 8)
    yield Figure("TP=2 (one thread each) ÷ TP=1 (two threads), batch 8", 0.80, ratio)


def stepped_in_process(batch: int) -> float:
    """Tokens per second of the same work without a server: prompts one after the other, then a token for each."""
    stepper = Stepper("none")
    prefill = median_seconds(lambda: stepper.fill(batch, PROMPT), RUNS)
    stepper.fill(batch, PROMPT + OUTPUT // 2)
    return batch * OUTPUT / (prefill + OUTPUT * stepper.seconds_per_decode())


def single_stream() -> float:
    """Tokens per second of transformers' own generate, in bfloat16."""
    model = load_model("default").to(torch.bfloat16).eval()
    prompt = torch.arange(1000, 1000 + PROMPT)[None]

    def generate() -> None:
        with torch.inference_mode():
            model.generate(prompt, min_new_tokens=OUTPUT, max_new_tokens=OUTPUT, do_sample=False, pad_token_id=0)

    return OUTPUT / median_seconds(generate, RUNS)


def peft_sequential(directory: Path, names: tuple[str, ...]) -> float:
    """Tokens per second of PEFT answering one request after the other, each with the next adapter."""
    target = PeftTarget("default", directory)
    workload = Workload(1, 4, PROMPT, OUTPUT, names[:4], 10_000, 0)
    return asyncio.run(measure(target, workload, 0)).tokens_per_second
