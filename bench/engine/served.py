"""The figures that need servers: real `loraplex serve` processes, and transformers in this process for comparison."""

import asyncio
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from bench.engine.figure import Figure
from bench.engine.stepping import Stepper
from bench.engine.timing import in_turns, ratio, seconds
from bench.load import Target, Workload, measure
from bench.peft_target import PeftTarget, load_model
from bench.processes import Loraplex
from bench.targets import OVER_GRPC, OVER_HTTP, open_target

PROMPT, OUTPUT = 64, 64
VOCABULARY = 10_000
ROUNDS = 5
# Blocks of the cache: hardly more than 32 streams need, so that all have been used before, as in the runs in process.
BLOCKS = 320
FACES = {"HTTP": OVER_HTTP, "gRPC": OVER_GRPC}


@contextmanager
def serving(*flags: str) -> Iterator[dict[str, str]]:
    """Runs a server with these flags, and gives its addresses."""
    with Loraplex("serve", f"--kv-blocks={BLOCKS}", *flags) as server:
        while not (addresses := server.addresses()):
            time.sleep(0.2)
        yield addresses


def tokens_per_second(
    server: dict[str, str], concurrency: int, adapters: tuple[str, ...] = (), face: str = "HTTP", turns: int = 1
) -> float:
    """Tokens per second of `concurrency` streams that start together on a warm server. Each worker sends `turns`
    requests."""

    async def run() -> float:
        target: Target = open_target(FACES[face].format(**server), None)
        try:
            requests = concurrency * turns
            workload = Workload(concurrency, requests, PROMPT, OUTPUT, adapters, VOCABULARY, time.monotonic_ns())
            return (await measure(target, workload, 0)).tokens_per_second
        finally:
            await target.close()

    return asyncio.run(run())


def step_seconds(server: dict[str, str]) -> float:
    """Total seconds that the server's shard has spent in steps."""
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
    """All figures that need a server. Figures from the same server are measured in turns."""
    with tempfile.TemporaryDirectory() as name:
        names = save_adapters(Path(name), 32)
        with serving("--adapters", name) as server:
            peft, turns = PeftTarget("default", Path(name)), cycle(names)

            def computing() -> float:
                began, spent = time.monotonic(), step_seconds(server)
                tokens_per_second(server, 32, turns=4)
                return (step_seconds(server) - spent) / (time.monotonic() - began)

            works: dict[str, Callable[[], float]] = {
                "alone": single_stream(),
                "one": partial(tokens_per_second, server, 1),
                "many": partial(tokens_per_second, server, 32),
                "gRPC": partial(tokens_per_second, server, 32, face="gRPC"),
                "computing": computing,
                "stepped": stepped_in_process(32),
                "adapted": partial(tokens_per_second, server, 32, names),
                "peft": lambda: peft_alone(peft, next(turns)),
            }
            measured = in_turns(works, ROUNDS, warm_up=False)

    one, many, adapted, peft_speed = (statistics.median(measured[key]) for key in ("one", "many", "adapted", "peft"))
    yield Figure(
        "served, 1 stream ÷ transformers' own, bf16", 2.7, ratio(measured["one"], measured["alone"]), f"{one:.0f} tok/s"
    )
    detail = f"{many:.0f} tok/s"
    yield Figure(
        "served, 32 streams ÷ transformers' single stream, bf16", 33, ratio(measured["many"], measured["alone"]), detail
    )
    for face, key in (("HTTP", "many"), ("gRPC", "gRPC")):
        name = f"served over {face}, 32 streams ÷ the same work in process"
        detail = f"{statistics.median(measured[key]):.0f} tok/s"
        yield Figure(name, 0.90, ratio(measured[key], measured["stepped"]), detail)
    share = statistics.median(measured["computing"])
    yield Figure("served, 32 streams: share of the time in which the shard computes", 0.97, share)
    detail = f"{adapted:.0f} and {peft_speed:.1f} tok/s"
    yield Figure(
        "32 streams over 32 adapters (r 8 to 64) ÷ PEFT one by one",
        25,
        ratio(measured["adapted"], measured["peft"]),
        detail,
    )
    with serving("--tp", "1") as single, serving("--tp", "2") as double:
        halves = {"1": partial(tokens_per_second, single, 8), "2": partial(tokens_per_second, double, 8)}
        measured = in_turns(halves, ROUNDS, warm_up=False)
    detail = f"{statistics.median(measured['2']):.0f} tok/s"
    yield Figure(
        "TP=2 (one thread each) ÷ TP=1 (two threads), batch 8", 0.80, ratio(measured["2"], measured["1"]), detail
    )


def stepped_in_process(batch: int) -> Callable[[], float]:
    """Tokens per second of the same work without a server: one prompt after the other, then decode steps for all."""
    stepper = Stepper("none")

    def speed() -> float:
        prompts = seconds(lambda: stepper.prefill(batch, PROMPT))
        stepper.start(batch, PROMPT)

        def decode() -> None:
            for _ in range(OUTPUT):
                stepper.decode()

        return batch * OUTPUT / (prompts + seconds(decode))

    return speed


def single_stream() -> Callable[[], float]:
    """Tokens per second of transformers' `generate`, in bfloat16."""
    model = load_model("default").to(torch.bfloat16).eval()
    prompt = torch.arange(1000, 1000 + PROMPT)[None]

    def generate() -> None:
        with torch.inference_mode():
            model.generate(prompt, min_new_tokens=OUTPUT, max_new_tokens=OUTPUT, do_sample=False, pad_token_id=0)

    return lambda: OUTPUT / seconds(generate)


def peft_alone(target: PeftTarget, adapter: str) -> float:
    """Tokens per second of PEFT answering one request."""

    async def run() -> float:
        workload = Workload(1, 1, PROMPT, OUTPUT, (adapter,), VOCABULARY, 0)
        return (await measure(target, workload, 0)).tokens_per_second

    return asyncio.run(run())
