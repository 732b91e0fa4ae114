"""Work that gives way to steps."""

import os
import threading
from collections.abc import Callable

NICE = 10  # where cores are busy, what has it gets about a tenth of what a step's thread gets


def gently(work: Callable[[], object]) -> None:
    """Does work in a thread of low priority, and waits for it. It should hardly need the interpreter's lock. What it
    raises is raised."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="gently")
    thread.start()
    thread.join()
    for error in errors:
        raise error
