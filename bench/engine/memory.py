"""How much memory a process takes for the model's weights, each form in a process of its own."""

import ctypes
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil

from bench.engine.stepping import load_model
from loraplex_shard.settings import Quantize


def resident_weights(quantize: Quantize) -> int:
    """Bytes that a fresh process has more in memory once it holds the model."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_resident_weights, quantize).result()


def _resident_weights(quantize: Quantize) -> int:
    load_model("none")  # what the libraries take when they are first used is not the weights'
    before = _resident()
    model = load_model(quantize)
    taken = _resident() - before
    del model
    return taken


def _resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed
    return int(psutil.Process().memory_full_info().uss)
