"""Several ranks answer as one, NCCL works in a graph, and a rank notices that it has another one's GPU or has lost its
own.

Each rank is a process that is forked before anything here has used the GPU.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from bench.engine.stepping import Slots
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import load, tiny
from loraplex_shard.device import gpus
from loraplex_shard.device.parallel import Group
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.settings import SettingsError
from loraplex_shard.stepping.runner import Runner
from tests.shard.planner import BLOCK_SIZE, MAX_MODEL_LEN, NUM_BLOCKS, Planner, random_tokens

MODEL = "Llama 3 8B"
LENGTHS: dict[DeviceName, tuple[int, ...]] = {"cuda": (21, 50, 3), "cpu": (7, 3)}
DECODES: dict[DeviceName, int] = {"cuda": 8, "cpu": 1}
GPU = torch.device("cuda", 0)
TIMEOUT = timedelta(seconds=30)

Result = TypeVar("Result")


def checks(device: DeviceName) -> Iterator[Check]:
    yield Check("two ranks on one device, through the host", partial(_answer_as_one, device))
    if device == "cuda":
        yield Check("two ranks with the same GPU are refused", _are_refused)
        yield Check("NCCL in a graph", partial(_on_rank, _reduce_in_graph))
        yield Check("a GPU is lost after a failed assertion", partial(_on_rank, _lose_gpu))


def _answer_as_one(device: DeviceName) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        alone, together, other = _in_processes(
            [
                partial(_generate, rank, size, f"file://{folder}/{size}", device)
                for rank, size in ((0, 1), (0, 2), (1, 2))
            ]
        )
    assert together == alone, f"two ranks answer {together}, one {alone}"
    assert not any(other), f"rank 1 answers {other}"
    return {"ranks": 2, "tokens": sum(map(len, alone))}


def _generate(rank: int, size: int, url: str, device: DeviceName) -> list[list[int]]:
    """What a rank says that the prompts' continuations are."""
    torch.set_num_threads(1)
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    group = Group.connect(rank, size, url, where, None, through_host=True)
    try:
        decoder = load(tiny(MODEL), device, torch.float32, max_model_len=MAX_MODEL_LEN, group=group)
        cache, grammars = decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE), GrammarCompiler(b"{}", decoder.vocab_size, ())
        lengths, slots = LENGTHS[device], Slots()
        runner = Runner(decoder, cache, slots, group, len(lengths), MAX_MODEL_LEN, where, grammars)
        planner = Planner()
        for row, length in enumerate(lengths):
            planner.start(row, random_tokens(length, length))
        plans = [planner.plan(dict(enumerate(lengths)))]
        plans += [planner.plan(dict.fromkeys(range(len(lengths)), 1)) for _ in range(DECODES[device])]
        answers: list[list[int]] = [[] for _ in lengths]
        for plan in plans:
            for row, token in zip(plan.rows, runner.step(plan).tokens, strict=False):
                answers[row].append(token)
        return answers
    finally:
        group.close()


def _are_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        refusals = _in_processes([partial(_refusal, rank, f"file://{folder}/meeting") for rank in range(2)])
    assert all(refusal.startswith("tp: ranks 0 and 1 have the same GPU") for refusal in refusals), refusals


def _refusal(rank: int, url: str) -> str:
    torch.cuda.set_device(GPU)
    try:
        Group.connect(rank, 2, url, GPU, None).close()
    except SettingsError as error:
        return error.message
    return "they were not refused"


def _on_rank(function: Callable[[], Result]) -> Result:
    (result,) = _in_processes([function])
    return result


def _reduce_in_graph() -> None:
    torch.cuda.set_device(GPU)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        nccl = dist.new_group(backend="nccl", timeout=TIMEOUT, device_id=GPU)
        tensor, graph = torch.ones(1000, device=GPU), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tensor += 1
            dist.all_reduce(tensor, group=nccl)
        graph.replay()
        assert float(tensor.sum()) == 2000, "the sum is wrong"
        dist.destroy_process_group()


def _lose_gpu() -> None:
    table, beyond = torch.zeros(4, device=GPU), torch.tensor([9], device=GPU)
    assert not gpus.is_lost(GPU), "it is lost before anything has failed"
    with suppress(RuntimeError):
        table[beyond].cpu()  # the kernel asserts that it is inside
    assert gpus.is_lost(GPU), "a failed assertion is not noticed"


def _in_processes(functions: Sequence[Callable[[], Result]]) -> list[Result]:
    with ProcessPoolExecutor(len(functions), multiprocessing.get_context("fork")) as processes:
        return [future.result() for future in [processes.submit(function) for function in functions]]
