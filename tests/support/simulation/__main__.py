"""``python -m support.simulation``, in the directory ``tests``: run seeds, or replay one that failed.

python -m support.simulation 1234                 one seed, with its options and all that happens in it
python -m support.simulation 0 20000              those from the first up to the second, without it; what they reached
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from dataclasses import asdict

from .run import Outcome, simulate

MAX_FAILURES = 5


def main() -> int:
    """Return 0 if every invariant held in every run."""
    parser = argparse.ArgumentParser(prog="python -m support.simulation")
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int, nargs="?")
    parser.add_argument("--json", action="store_true", help="print failures and counters for a program")
    parser.add_argument("--digest", action="store_true", help="and a digest of all that happened, with --json")
    arguments = parser.parse_args()
    if arguments.end is None:
        return _replay(arguments.first)
    return _sweep(arguments.first, arguments.end, as_json=arguments.json, with_digest=arguments.digest)


def _replay(seed: int) -> int:
    outcome = simulate(seed)
    for at, what in outcome.trace:
        print(f"{at:12.6f}  {what}")
    print(_describe(outcome) if outcome.violations else f"seed {seed} holds; digest {outcome.digest}")
    return bool(outcome.violations)


def _sweep(first: int, end: int, *, as_json: bool, with_digest: bool) -> int:
    reached: Counter[str] = Counter()
    failures: list[str] = []
    digests = hashlib.sha256()
    started = time.perf_counter()
    for seed in range(first, end):
        outcome = simulate(seed)
        reached.update(outcome.reached)
        if with_digest:
            digests.update(outcome.digest.encode())
        if outcome.violations:
            failures.append(_describe(outcome))
            if len(failures) == MAX_FAILURES:
                break
    if as_json:
        json.dump({"failures": failures, "reached": reached, "digest": digests.hexdigest()}, sys.stdout)
    else:
        for counter, count in sorted(reached.items()):
            print(f"{count:9}  {counter}")
        print(*failures, sep="\n")
        print(f"{end - first} seeds in {time.perf_counter() - started:.1f} s, {len(failures)} failures")
    return bool(failures)


def _describe(outcome: Outcome) -> str:
    options = "\n".join(f"    {name} = {value}" for name, value in asdict(outcome.options).items())
    violations = "\n".join(f"  {violation}" for violation in outcome.violations)
    return f"seed {outcome.options.seed} (replay: cd tests && python -m support.simulation {outcome.options.seed})\n{violations}\n{options}"


if __name__ == "__main__":
    sys.exit(main())
