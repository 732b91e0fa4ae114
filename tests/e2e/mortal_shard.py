"""`loraplex shard`, but some tokens kill it, and it is there again at once: the process that is told to start it has
imported all that it needs, and forks."""

import ctypes
import os
import signal
import sys

from loraplex.cli.main import main
from loraplex_protos.shard_pb2 import StepRequest, StepResponse
from loraplex_shard.serving import server

KILLING, RAISING = 1, 2  # token ids: of bytes that no other prompt has
DIED = "the shard died"
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class MortalRunner(server.Runner):
    """Ends with the process, or raises, on a plan that starts a sequence with one of the tokens."""

    def step(self, plan: StepRequest) -> StepResponse:
        for start in plan.starts:
            if KILLING in start.tokens:
                os.kill(os.getpid(), signal.SIGKILL)
            if RAISING in start.tokens:
                raise RuntimeError("out of memory")
        return super().step(plan)


if __name__ == "__main__":
    server.Runner = MortalRunner  # type: ignore[misc]
    while child := os.fork():
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
        print(DIED, file=sys.stderr, flush=True)
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)  # with the process that forked it
    main()
