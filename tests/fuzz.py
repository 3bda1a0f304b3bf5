"""New random inputs for the property tests, for as long as is asked: `make fuzz`, or `python -m tests.fuzz --minutes 60`.

`make test` draws the same examples every time. Here each round draws new ones, from a seed that is printed. The first failure
ends it with exit code 1: hypothesis prints the smallest input that fails, which then becomes an `@example(...)` of its test.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("paths", nargs="*", default=["tests"], help="files or folders of tests (tests)")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    rounds = 0
    while (left := deadline - time.monotonic()) > 0:
        seed = secrets.randbelow(2**32)
        print(f"round {rounds + 1}, seed {seed}", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", "hypothesis", "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"]
        try:
            ended = subprocess.run(
                [*command, "-x", "-n", "logical", "--maxprocesses", "4", *arguments.paths], timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            break
        if ended.returncode:
            print(f"failed with seed {seed}: add the input above as an @example of its test, and mend what it shows")
            return ended.returncode
        rounds += 1
    print(f"{rounds} whole rounds in {arguments.minutes:g} minutes, and no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
