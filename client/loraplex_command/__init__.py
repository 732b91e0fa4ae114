"""Where the `loraplex` command begins. Ctrl-C ends it without a traceback, also while the rest is imported."""

from loraplex_command.interrupts import end_at_interrupts


def main() -> None:
    end_at_interrupts()
    from loraplex.cli.main import main as run

    run()
