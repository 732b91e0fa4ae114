"""What Ctrl-C does to a process of the `loraplex` command."""

import os
import signal
from types import FrameType

INTERRUPTED = 130  # as shells call the end of a program by Ctrl-C


def end_at_interrupts() -> None:
    """From now on, SIGINT ends this process at once, unless it was started to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # if it was held back


def raise_at_interrupts() -> None:
    """From now on, SIGINT raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def hold_interrupts_back() -> None:
    """Keeps SIGINT until the program that this process executes next calls end_at_interrupts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
