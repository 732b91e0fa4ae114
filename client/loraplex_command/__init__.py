"""Where the `loraplex` command begins. Ctrl-C ends it without a traceback, also while the rest is imported."""

import os

from loraplex_command.interrupts import end_at_interrupts


def main() -> None:
    end_at_interrupts()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when it is imported; messages about connections are ours
    from loraplex.cli.main import main as run

    run()
