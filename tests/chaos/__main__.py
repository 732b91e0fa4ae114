"""Two routers, three replicas of two ranks, mixed load, and troubles: processes are killed and stopped, the network is
cut, the disk is full, the hub hangs. Every answer must be as it was in peace, every request must end once, and
afterwards nothing may be held."""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos.cluster import LOG
from tests.chaos.run import kill, run, soak

LAYOUT = 2, 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="the end is after so many (default: 100)")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="instead: so long without troubles")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--workers", type=int, default=24, help="requests at a time (default: 24)")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    event = soak(options.soak) if options.soak else kill(options.kills)
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder), LAYOUT, options.seed, options.workers, event))
    print(report, f"The processes' logs are in {LOG}.", sep="\n")
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
