"""`python -m tests.chaos.ranks JSON`: one `loraplex shard` for each list of flags in a JSON list.

Whichever ends is restarted at once, since this process has imported all modules and forks. Its log says which process
each rank is now.
"""

import ctypes
import json
import os
import signal
import sys
import time

from loraplex.cli.main import main
from loraplex_shard.serving import server  # noqa: F401 (imported before the forks)
from tests.chaos.clock import follow

PAUSE_SECONDS = 0.2  # before a restart
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def start(number: int, flags: list[str]) -> int:
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)  # the child dies with its parent
        sys.argv = ["loraplex", "shard", *flags]
        main()
    print(f"rank {number} is process {child}", file=sys.stderr, flush=True)
    return child


if __name__ == "__main__":
    follow()
    ranks = json.loads(sys.argv[1])
    numbers = {start(number, flags): number for number, flags in enumerate(ranks)}
    while True:
        ended, _ = os.wait()
        time.sleep(PAUSE_SECONDS)
        number = numbers.pop(ended)
        numbers[start(number, ranks[number])] = number
