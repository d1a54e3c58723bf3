"""Writes the tables of the READMEs from the CSV: the only source of their numbers.

    python -m hvprune.benchmarks.report           rewrite what stands between the markers
    python -m hvprune.benchmarks.report --check   exit 1 if that would change anything

A table stands between ``<!-- benchmark:begin NAME -->`` and ``<!-- benchmark:end NAME -->``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ._results import RESULTS, ROOT, Row, committed, format_ratio, format_time, table

READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
NO_RESULTS = "No results yet: `make bench` writes them, `make bench-report` puts them here."
OVERHEAD = "call overhead"
OURS, RELEASED, PLAIN = "hvprune cpu", "released", "plain PyTorch"


class Results:
    """The rows of one CSV, looked up by what they measured."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def where(self, **values: str) -> list[Row]:
        return [row for row in self.rows if values.items() <= row.items()]

    def cases(self, **values: str) -> list[Row]:
        """op, setting, shape, batch and dtype of the matching rows, in order, each case once."""
        keys = ("op", "setting", "shape", "batch", "dtype")
        return [dict(case) for case in dict.fromkeys(tuple((k, row[k]) for k in keys) for row in self.where(**values))]

    def median_us(self, rival: str, case: Row) -> float | None:
        """None if it was not measured."""
        found = self.where(rival=rival, **case)
        if len(found) > 1:
            raise ValueError(f"results must have one row for {rival} on {case}, got {len(found)}")
        return float(found[0]["median_us"]) if found else None


def load_results(results: Path = RESULTS) -> Results | None:
    """The committed results of the CPU, None if there are none."""
    rows = committed("micro", results).get("cpu")
    return Results(rows) if rows else None


def format_rival(time: float | None, ours: float) -> str:
    return "-" if time is None else f"{format_time(time)} ({format_ratio(time / ours)})"


def name_of(case: Row) -> str:
    return f"`{case['op']}`" + (f", {case['setting']}" if case["setting"] else "")


def speed_table(results: Results) -> str:
    """float32: hvprune and, with the ratio to it, its rivals."""
    lines = []
    for case in results.cases(dtype="float32"):
        if case["setting"] != OVERHEAD:
            ours, *rivals = (results.median_us(rival, case) for rival in (OURS, RELEASED, PLAIN))
            compared = [format_rival(rival, ours) for rival in rivals]
            lines.append([name_of(case), case["shape"], case["batch"], format_time(ours), *compared])
    return table(["op", "encoder", "B", "hvprune", RELEASED, PLAIN], lines)


def half_table(results: Results) -> str:
    """hvprune by dtype."""
    dtypes = ("float32", "float16", "bfloat16")
    lines = []
    for case in results.cases(dtype="bfloat16"):
        times = [results.median_us(OURS, case | {"dtype": dtype}) for dtype in dtypes]
        lines.append([name_of(case), case["shape"], case["batch"], *map(format_time, times)])
    return table(["op", "encoder", "B", *dtypes], lines)


def overhead_table(results: Results) -> str:
    cases = results.cases(setting=OVERHEAD)
    lines = [[f"`{case['op']}`", format_time(results.median_us(OURS, case))] for case in cases]
    return table(["op", "call on tiny inputs"], lines)


def memory_table(results: Results) -> str:
    measured = [row for row in results.rows if row["peak_extra_mb"]]
    lines = [[name_of(row), row["shape"], row["batch"], row["rival"], row["peak_extra_mb"]] for row in measured]
    return table(["op", "encoder", "B", "rival", "peak extra MB"], lines)


def speedup(results: Results, op: str, setting: str) -> float | None:
    case = {"op": op, "setting": setting, "shape": "CLIP-L/14-336", "batch": "1", "dtype": "float32"}
    ours, released = (results.median_us(rival, case) for rival in (OURS, RELEASED))
    return None if ours is None or released is None else released / ours


def worst_overhead(results: Results) -> float | None:
    return max((results.median_us(OURS, case) for case in results.cases(setting=OVERHEAD)), default=None)


def attention_memory(results: Results) -> float | None:
    rows = results.where(rival=OURS, op="attention_importance")
    return max((float(row["peak_extra_mb"]) for row in rows if row["peak_extra_mb"]), default=None)


# What is claimed, how it reads from the results, the aim, whether more is better, how it is written.
TARGETS: list[tuple[str, Callable[[Results], float | None], float, bool, Callable[[float], str]]] = [
    ("`attention_importance`, 3 layers, against released",
     lambda r: speedup(r, "attention_importance", "3 layers, all rows"), 5, True, format_ratio),
    ("`attention_importance`, peak extra memory", attention_memory, 4, False, lambda mb: f"{mb:.3g} MB"),
    ("`hierarchical_select` against released",
     lambda r: speedup(r, "hierarchical_select", ""), 100, True, format_ratio),
    ("`vispruner_select`, K=128, against released",
     lambda r: speedup(r, "vispruner_select", "K=128"), 8, True, format_ratio),
    ("the slowest call on tiny inputs", worst_overhead, 10, False, format_time),
]  # fmt: skip


def target_table(results: Results) -> str:
    """CLIP-L, B=1, float32."""
    lines = []
    for claim, measure, aim, more_is_better, write in TARGETS:
        value = measure(results)
        words = f"{'at least' if more_is_better else 'below'} {write(aim)}"
        if value is None:
            lines.append([claim, words, "-", "not measured"])
        else:
            reached = value >= aim if more_is_better else value < aim
            lines.append([claim, words, write(value), "yes" if reached else "no"])
    return table(["target", "aim", "measured", "reached"], lines)


def environment_line(results: Results) -> str:
    facts = results.rows[0]
    return (
        f"Measured on {facts['device']} ({facts['instruction_set']}, {facts['threads']} threads) with torch"
        f" {facts['torch']} at commit {facts['commit']} on {facts['date']}."
    )


TABLES: dict[str, Callable[[Results], str]] = {
    "environment": environment_line,
    "targets": target_table,
    "speed": speed_table,
    "half": half_table,
    "overhead": overhead_table,
    "memory": memory_table,
}


def render(text: str, results: Results | None) -> str:
    """The text with every table made anew. ValueError for an unknown name or a marker without its partner."""
    marker = re.compile(r"<!-- benchmark:(begin|end) (\S+) -->")
    marks = list(marker.finditer(text))
    pieces, done = [], 0
    for begin, end in zip(marks[0::2], marks[1::2], strict=False):
        name = begin[2]
        if name not in TABLES or (begin[1], end[1], end[2]) != ("begin", "end", name):
            raise ValueError(f"markers must be a begin and an end of one of {list(TABLES)}, got {begin[0]} {end[0]}")
        body = TABLES[name](results) if results else NO_RESULTS
        pieces += [text[done : begin.end()], "\n", body, "\n"]
        done = end.start()
    if len(marks) % 2:
        raise ValueError(f"markers must come in pairs, got {marks[-1][0]} alone")
    return "".join([*pieces, text[done:]])


def main(arguments: list[str] | None = None, readmes: tuple[Path, ...] = READMES) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a table is out of date")
    check = parser.parse_args(arguments).check
    results = load_results()
    stale = {path: text for path in readmes if (text := render(path.read_text(), results)) != path.read_text()}
    for path, text in stale.items():
        print(f"{path.parent.name}/{path.name}: {'out of date, run make bench-report' if check else 'written'}")
        if not check:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
