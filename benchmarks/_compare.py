"""A run against an earlier one: which rows of hvprune became slower than the noise of both explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ._harness import KEYS
from ._results import Row

MACHINE = ("device", "instruction_set", "threads")
YARDSTICKS = ("plain PyTorch", "released")  # what a time is divided by in a relative comparison, the first there is


class Estimate(NamedTuple):
    """A time, or the quotient of two, and what it could be as well: between its 20th and 80th percentile."""

    value: float
    low: float
    high: float

    def __truediv__(self, other: Estimate) -> Estimate:
        return Estimate(self.value / other.value, self.low / other.high, self.high / other.low)


def why_incomparable(old: Sequence[Row], facts: Row, relative: bool) -> str | None:
    """Why times of an earlier run say nothing here, None if they do."""
    if not old:
        return "got an empty file"
    if relative:
        return None
    then, now = (", ".join(row[name] for name in MACHINE) for row in (old[0], facts))
    return None if then == now else f"got one on {then} while this is {now} (--relative compares across machines)"


def compare(old: Sequence[Row], new: Sequence[Row], relative: bool, tolerance: float) -> tuple[list[str], list[str]]:
    """(lines to print, those of rows that became slower).

    Slower means: at its 20th percentile the new time is above ``tolerance`` times the old one at its 80th.
    """
    before, after = _estimates(old, relative), _estimates(new, relative)
    both = [key for key in after if key in before]
    lines, slower = [f"{'case':92} {'ratio':>7} {'noise':>7}"], []
    for key in both:
        was, now = before[key], after[key]
        noise = (was.high / was.value) * (now.value / now.low)
        is_slower = now.low > tolerance * was.high
        line = f"{' '.join(filter(None, key)):92} {now.value / was.value:7.2f} {noise:7.2f}"
        lines.append(line + ("  SLOWER" if is_slower else ""))
        slower += lines[-1:] if is_slower else []
    lines.append(
        f"{len(both)} times compared, {len(slower)} slower; {len(after) - len(both)} only now,"
        f" {len(before) - len(both)} only in the earlier run"
    )
    if not both:
        slower.append("nothing in common")
        lines.append("nothing in common with the earlier run")
    return lines, slower


def _estimates(rows: Sequence[Row], relative: bool) -> dict[tuple[str, ...], Estimate]:
    """Of hvprune's rows, each by what was measured and which of the two times."""
    found = {}
    times = {(*(row[k] for k in KEYS), kind): row for row in rows for kind in ("device", "wall") if row[f"{kind}_us"]}
    for (*case, rival, kind), row in times.items():
        if not rival.startswith("hvprune"):
            continue
        estimate = _estimate(row, kind)
        if relative:
            rivals = [times[(*case, name, kind)] for name in YARDSTICKS if (*case, name, kind) in times]
            if not rivals:
                continue
            estimate /= _estimate(rivals[0], kind)
        found[(*case, rival, kind)] = estimate
    return found


def _estimate(row: Row, kind: str) -> Estimate:
    return Estimate(*(float(row[f"{kind}_{what}us"]) for what in ("", "p20_", "p80_")))
