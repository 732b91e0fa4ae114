"""The `loraplex` command, but its shards die of some tokens."""

import os
import signal

from loraplex.cli.main import main
from loraplex_protos.shard_pb2 import StepRequest, StepResponse
from loraplex_shard import server

KILLING, RAISING = 1, 2  # token ids: of bytes that no other prompt has


class MortalRunner(server.Runner):
    """Ends with the process, or raises, on a plan with a sequence whose prompt has one of the tokens."""

    def step(self, plan: StepRequest) -> StepResponse:
        for start in plan.starts:
            if KILLING in start.tokens:
                os.kill(os.getpid(), signal.SIGKILL)
            if RAISING in start.tokens:
                raise RuntimeError("out of memory")
        return super().step(plan)


if __name__ == "__main__":
    server.Runner = MortalRunner  # type: ignore[misc]
    main()
