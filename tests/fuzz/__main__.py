"""Odd requests over all faces, beside a stream that must not notice: no 500, no crash, nothing held afterwards."""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-a-time", type=int, default=8, help="no more than cores, to time the gaps of the stream")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(fuzz(Path(folder), options.seed, options.requests, options.at_a_time))
    print(f"seed {options.seed}: {report}")
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
