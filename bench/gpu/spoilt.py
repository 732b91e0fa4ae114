"""Whether anything works on the GPU any more: after an illegal access or a failed assertion in a kernel, all calls of
the process fail. As a plugin of pytest, it ends the process then, and pytest-xdist starts another."""

import os

import torch


def is_spoilt() -> bool:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def pytest_runtest_logfinish() -> None:
    if is_spoilt():
        os._exit(1)
