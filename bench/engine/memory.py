"""How much memory a process needs for the model's weights. Each form is loaded in its own process."""

import ctypes
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil

from bench.engine.stepping import load_model
from loraplex_shard.settings import Quantize


def resident_weights(quantize: Quantize) -> int:
    """The bytes by which a fresh process grows when it loads the model."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_resident_weights, quantize).result()


def _resident_weights(quantize: Quantize) -> int:
    load_model("none")  # first use of the libraries, whose memory should not count
    before = _resident()
    model = load_model(quantize)
    taken = _resident() - before
    del model
    return taken


def _resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
    return int(psutil.Process().memory_full_info().uss)
