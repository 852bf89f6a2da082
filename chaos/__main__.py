"""Kill the daemon of a mount again and again under its readers: ``make chaos``, or ``python -m chaos -h``.

The origin fails at random meanwhile, and the cache is smaller than what is read. Every byte is compared with
the original. The exit status is 0 if no reader saw anything but a pause.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from chaos.run import Outcome, Plan, run
from modelfs.cli.show import size
from modelfs.config.values import parse_size
from modelfs.errors import ModelfsError


def main(words: Sequence[str] | None = None) -> int:
    """Run, print the outcome and return the exit status."""
    plan, as_json = arguments(words)
    try:
        outcome = run(plan)
    except ModelfsError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps({**asdict(outcome), "good": outcome.good, "plan": asdict(plan)}, indent=2))
    else:
        print(report(plan, outcome))
    return 0 if outcome.good else 1


def arguments(words: Sequence[str] | None) -> tuple[Plan, bool]:
    """Return what the command line asks for, and whether JSON is wanted."""
    usual = Plan()
    parser = argparse.ArgumentParser(prog="python -m chaos", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--kills", type=int, default=usual.kills, help="SIGKILLs; then it ends (%(default)s)")
    parser.add_argument("--seconds", type=float, help="it ends after so long too; by default no limit")
    parser.add_argument("--readers", type=int, default=usual.readers, help="processes (%(default)s)")
    parser.add_argument(
        "--faults", type=float, default=usual.faults, help="share of faulty answers (%(default)s)"
    )
    parser.add_argument(
        "--cache", type=parse_size, default=usual.cache, metavar="SIZE", help="of the cache (64MiB)"
    )
    parser.add_argument("--seed", type=int, default=usual.seed, help="of everything random (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    wanted = vars(parser.parse_args(words))
    as_json = wanted.pop("json")
    return Plan(**wanted), as_json


def report(plan: Plan, outcome: Outcome) -> str:
    """Return the outcome as lines for people."""
    faults = ", ".join(f"{count} × {kind}" for kind, count in outcome.faults.items())
    rows = {
        "readers": f"{plan.readers} processes, {outcome.seconds:.0f} s, seed {plan.seed}",
        "reads": f"{outcome.reads}, {size(outcome.bytes)}",
        "kills": f"{outcome.kills} × SIGKILL",
        "hand-overs": outcome.handovers,
        "origin": f"{outcome.requests} requests, {size(outcome.asked_bytes)} asked for",
        "faults": f"{sum(outcome.faults.values())} ({faults})",
        "wrong bytes": outcome.wrong_bytes,
        "errors": len(outcome.errors),
        "longest stall": f"{outcome.longest_stall:.1f} s",
        "left in state D": outcome.left_in_d,
        "bad log lines": len(outcome.log),
    }
    lines = [f"{name:<16} {value}" for name, value in rows.items()]
    return "\n".join([*lines, *outcome.errors[:10], *outcome.log[:10]])


if __name__ == "__main__":
    raise SystemExit(main())
