"""`python -m fuzz`, in tests/: every kind of input spoiled in some hundred ways, and a table of what became of them.

Exit status 1 if there was a traceback, a wrong acceptance, a hang, or a refusal whose message lacks what each must have.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from fuzz import FAULTS, Found, faults, run, table, unhelpful_messages
from fuzz.kinds import KINDS

SHOWN = 5
"""Faults of each kind that are printed whole."""


def main() -> int:
    """Run the kinds asked for."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="one of them; repeat; default: all")
    parser.add_argument("--count", type=int, default=300, help="cases of each kind (300)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found: dict[str, list[Found]] = {}
    with tempfile.TemporaryDirectory(prefix="moelab-fuzz-") as folder:
        for name in asked.kind or KINDS:
            started = time.perf_counter()
            found[name] = run(KINDS[name], asked.count, asked.seed, Path(folder) / name)
            print(
                f"{name}: {asked.count} cases, seed {asked.seed}, {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
            )
    bad = {name: faults(each) for name, each in found.items()}
    mute = {name: unhelpful_messages(each) for name, each in found.items()}
    for name in found:
        for each in [
            *sorted(bad[name], key=lambda one: one.outcome)[:: max(1, len(bad[name]) // SHOWN)],
            *mute[name][:SHOWN],
        ]:
            why = each.outcome if each.outcome in FAULTS else "a message without what to do"
            print(f"\n{name}: {each.what}\n{why}: {each.said.strip()}")
    print(f"\n{table(found)}")
    return int(any(bad.values()) or any(mute.values()))


if __name__ == "__main__":
    sys.exit(main())
