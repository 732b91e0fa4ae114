"""`loraplex shard`, but some tokens kill it, and it restarts at once: the process has imported all modules and
forks."""

import ctypes
import os
import signal
import sys

from loraplex.cli.main import main
from loraplex_protos.shard_pb2 import StepRequest
from loraplex_shard.serving import server
from loraplex_shard.stepping.results import PendingStep

KILLING, RAISING = 1, 2  # token ids of bytes that no other prompt has
DIED = "the shard died"
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class MortalRunner(server.Runner):
    """Kills the process, or raises, when a plan starts a sequence with one of the tokens."""

    def begin(self, plan: StepRequest) -> PendingStep:
        for start in plan.starts:
            if KILLING in start.tokens:
                os.kill(os.getpid(), signal.SIGKILL)
            if RAISING in start.tokens:
                raise RuntimeError("out of memory")
        return super().begin(plan)


if __name__ == "__main__":
    server.Runner = MortalRunner  # type: ignore[misc]
    while child := os.fork():
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
        print(DIED, file=sys.stderr, flush=True)
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)  # the child dies with its parent
    main()
