"""Writes the tables of the READMEs from the CSV: the only source of their numbers.

    python -m hvprune.benchmarks.report           rewrite what stands between the markers
    python -m hvprune.benchmarks.report --check   exit 1 if that would change anything

A table stands between ``<!-- benchmark:begin NAME -->`` and ``<!-- benchmark:end NAME -->``. Pictures are drawn by
``hvprune bench plot``; one that shows other results than the CSV beside it is an error either way.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import papers
from ._results import RESULTS, ROOT, Row, committed, format_ratio, format_time, pictures, stale_pictures, table

READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
NO_RESULTS = "No results yet: `make bench` writes them, `make bench-report` puts them here."
NO_GPU_RESULTS = "No results from a GPU exist yet."
NO_PICTURES = "No pictures yet: `make bench-report` draws the results that are there."
LLAVA_SHAPE = "CLIP-L/14-336"
OVERHEAD = "call overhead"
OURS, RELEASED = "hvprune cpu", "released"


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

    def row(self, rival: str, case: Row) -> Row | None:
        """None if it was not measured."""
        found = self.where(rival=rival, **case)
        if len(found) > 1:
            raise ValueError(f"results must have one row for {rival} on {case}, got {len(found)}")
        return found[0] if found else None

    def wall_us(self, rival: str, case: Row) -> float | None:
        """None if it was not measured."""
        row = self.row(rival, case)
        return float(row["wall_us"]) if row and row["wall_us"] else None


def load_results(results: Path) -> Results | None:
    """The committed results of the CPU, None if there are none."""
    rows = committed("micro", results).get("cpu")
    return Results(rows) if rows else None


def time_of(row: Row | None) -> float | None:
    """Microseconds on the GPU, or on the wall where there are no others."""
    text = row and (row["device_us"] or row["wall_us"])
    return float(text) if text else None


def format_rival(row: Row | None, ours: float | None) -> str:
    """Time and, with something to compare it with, the ratio; a star: of a rival that is no CUDA graph, on the wall."""
    time = time_of(row)
    if time is None:
        return "-"
    star = "\\*" if row["note"] and not row["device_us"] else ""
    return format_time(time) + star + (f" ({format_ratio(time / ours)})" if ours else "")


def name_of(case: Row) -> str:
    return f"`{case['op']}`" + (f", {case['setting']}" if case["setting"] else "")


def compared(results: Results, **values: str) -> str:
    """The first rival is hvprune's preferred backend; the others with the ratio to it. All that were measured."""
    cases = [case for case in results.cases(**values) if case["setting"] != OVERHEAD]
    rivals = list(dict.fromkeys(row["rival"] for case in cases for row in results.where(**case)))
    rivals.sort(key=lambda name: not name.startswith("hvprune"))
    lines = []
    for case in cases:
        ours, *others = (results.row(rival, case) for rival in rivals)
        floor = ours and ours["of_floor"] and format_ratio(float(ours["of_floor"]))
        cells = [format_rival(ours, None), floor or "-", *(format_rival(row, time_of(ours)) for row in others)]
        lines.append([name_of(case), case["shape"], case["batch"], *cells])
    return table(["op", "encoder", "B", *rivals[:1], "of floor", *rivals[1:]], lines)


def speed_table(results: Results) -> str:
    return compared(results, dtype="float32")


def one_image_table(results: Results) -> str:
    """The part of the speed table for one image of LLaVA-1.5."""
    return compared(results, dtype="float32", shape=LLAVA_SHAPE, batch="1")


def gpu_tables(results: Path) -> str:
    """Of every GPU: where it was measured, device times in bfloat16, and by dtype."""
    parts = []
    for folder, rows in committed("micro", results).items():
        if folder != "cpu":
            of_gpu = Results(rows)
            parts += [environment_line(of_gpu), compared(of_gpu, dtype="bfloat16")]
    return "\n\n".join(parts) or NO_GPU_RESULTS


def picture_links(results: Path) -> str:
    """Of every picture that was drawn; paths as the README of the repository sees them."""
    base = results.parent.parent
    links = [f"![{title}]({path.relative_to(base).as_posix()})" for path, title in pictures(results).items()]
    return "\n".join(links) or NO_PICTURES


def half_table(results: Results) -> str:
    """hvprune by dtype."""
    dtypes = ("float32", "float16", "bfloat16")
    lines = []
    for case in results.cases(dtype="bfloat16"):
        times = [results.wall_us(OURS, case | {"dtype": dtype}) for dtype in dtypes]
        lines.append([name_of(case), case["shape"], case["batch"], *map(format_time, times)])
    return table(["op", "encoder", "B", *dtypes], lines)


def overhead_table(results: Results) -> str:
    cases = results.cases(setting=OVERHEAD)
    lines = [[f"`{case['op']}`", format_time(results.wall_us(OURS, case))] for case in cases]
    return table(["op", "call on tiny inputs"], lines)


def memory_table(results: Results) -> str:
    measured = [row for row in results.rows if row["peak_extra_mb"]]
    lines = [[name_of(row), row["shape"], row["batch"], row["rival"], row["peak_extra_mb"]] for row in measured]
    return table(["op", "encoder", "B", "rival", "peak extra MB"], lines)


def speedup(results: Results, op: str, setting: str) -> float | None:
    case = {"op": op, "setting": setting, "shape": LLAVA_SHAPE, "batch": "1", "dtype": "float32"}
    ours, released = (results.wall_us(rival, case) for rival in (OURS, RELEASED))
    return None if ours is None or released is None else released / ours


def worst_overhead(results: Results) -> float | None:
    return max((results.wall_us(OURS, case) for case in results.cases(setting=OVERHEAD)), default=None)


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
    gpu = f", driver {facts['driver']}, CUDA {facts['cuda']}, Triton {facts['triton']}" if facts["driver"] else ""
    inside = "" if gpu else f" ({facts['instruction_set']}, {facts['threads']} threads)"
    return (
        f"Measured on {facts['device']}{inside} with torch {facts['torch']}{gpu} at commit {facts['commit']} on"
        f" {facts['date']}."
    )


def of_cpu(write: Callable[[Results], str]) -> Callable[[Path], str]:
    """A table of the CPU's results, or the line that there are none."""

    def write_if_any(folder: Path) -> str:
        results = load_results(folder)
        return write(results) if results else NO_RESULTS

    return write_if_any


# Each takes the folder of results.
TABLES: dict[str, Callable[[Path], str]] = {
    "environment": of_cpu(environment_line),
    "targets": of_cpu(target_table),
    "one-image": of_cpu(one_image_table),
    "speed": of_cpu(speed_table),
    "half": of_cpu(half_table),
    "overhead": of_cpu(overhead_table),
    "memory": of_cpu(memory_table),
    "gpu": gpu_tables,
    "pictures": picture_links,
    **papers.TABLES,
}


def render(text: str, results: Path) -> str:
    """The text with every table made anew. ValueError for an unknown name or a marker without its partner."""
    marker = re.compile(r"<!-- benchmark:(begin|end) (\S+) -->")
    marks = list(marker.finditer(text))
    pieces, done = [], 0
    for begin, end in zip(marks[0::2], marks[1::2], strict=False):
        name = begin[2]
        if name not in TABLES or (begin[1], end[1], end[2]) != ("begin", "end", name):
            raise ValueError(f"markers must be a begin and an end of one of {list(TABLES)}, got {begin[0]} {end[0]}")
        pieces += [text[done : begin.end()], "\n", TABLES[name](results), "\n"]
        done = end.start()
    if len(marks) % 2:
        raise ValueError(f"markers must come in pairs, got {marks[-1][0]} alone")
    return "".join([*pieces, text[done:]])


def main(arguments: list[str] | None = None, readmes: tuple[Path, ...] = READMES, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if something is out of date")
    check = parser.parse_args(arguments).check
    stale = {path: text for path in readmes if (text := render(path.read_text(), results)) != path.read_text()}
    for path, text in stale.items():
        print(f"{path.parent.name}/{path.name}: {'out of date, run make bench-report' if check else 'written'}")
        if not check:
            path.write_text(text)
    old = stale_pictures(results)
    for path in old:
        print(f"{path.parent.name}/{path.name}: shows other results, run make bench-report")
    return 1 if (check and stale) or old else 0


if __name__ == "__main__":
    sys.exit(main())
