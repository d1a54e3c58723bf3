"""``hvprune bench``: what every op costs here, beside its rivals and the least that it could cost."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from hvprune._registry import BACKENDS, OPS

from .e2e import add_parser as add_e2e

STANDARD = Path()  # --csv without a path


def add_parser(commands) -> None:
    summary = "measure every op, its rivals and the floor of both; compare with an earlier run; draw the results"
    parser = commands.add_parser("bench", help=summary, description=summary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--quick", action="store_true", help="the sizes of LLaVA-1.5 in one dtype, fewer samples, no torch.compile")
    add("--ops", nargs="+", choices=sorted(OPS), metavar="OP", help="measure these only")
    add("--backends", nargs="+", choices=BACKENDS[:-1], metavar="BACKEND", help="cuda, triton, cpu: these only")
    add("--device", default=device, help=f"torch device of the tensors ({device})")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="baselines under torch.compile as well, which takes minutes (on a GPU, without --quick)",
    )
    add(
        "--csv", type=Path, nargs="?", const=STANDARD, metavar="PATH",
        help="write the rows; without PATH results/<device>/micro.csv, for a run of every op",
    )  # fmt: skip
    add("--json", type=Path, metavar="PATH", help="write the rows as JSON")
    add("--compare", type=Path, metavar="OLD.csv", help="ratios to an earlier run; exit 1 on a slow-down beyond noise")
    add(
        "--relative", action="store_true",
        help="compare times over those of a baseline in the same run: for an earlier run on another machine",
    )  # fmt: skip
    add("--tolerance", type=float, default=1.05, metavar="X", help="what a slow-down may be besides noise (1.05)")
    parser.set_defaults(run=lambda arguments: _bench(parser, arguments))
    suites = parser.add_subparsers(title="instead of the ops", metavar="WHAT")
    summary = "draw the committed results"
    plot = suites.add_parser("plot", help=summary, description=summary)
    plot.set_defaults(run=lambda _: _plot(plot))
    add_e2e(suites)


def _plot(parser: argparse.ArgumentParser) -> int:
    try:
        from .plot import draw
    except ImportError as error:
        parser.error(f"needs matplotlib (pip install 'hvprune[bench]'): {error}")
    for path in draw():
        print(path)
    return 0


def _bench(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from ._compare import compare, why_incomparable
    from ._harness import COLUMNS, KEYS, run
    from ._results import ENVIRONMENT, environment, read_csv, results_path, write_csv

    if arguments.tolerance < 1:
        parser.error(f"--tolerance must be at least 1, got {arguments.tolerance}")
    try:
        gpu = torch.empty(1, device=arguments.device).is_cuda
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0]
        parser.error(f"device must be one that torch can use here, got {arguments.device!r} ({reason})")
    path = arguments.csv
    if path == STANDARD:
        if arguments.ops or arguments.backends:
            parser.error("--csv must have a PATH with --ops or --backends: the standard file holds every row")
        path = results_path("micro", arguments.device)
    try:
        old = read_csv(arguments.compare) if arguments.compare else None
    except OSError as error:
        parser.error(str(error))
    facts = environment(arguments.device)
    if old is not None and (reason := why_incomparable(old, facts, arguments.relative)):
        parser.error(f"--compare must be a run on this machine, {reason}")
    for backend in arguments.backends or ():
        reason = OPS["gather_tokens"].why_unavailable(backend, "cuda" if gpu else "cpu")
        if reason:
            parser.error(f"backend {backend!r} is unavailable: {reason}")
    compiled = arguments.compile if arguments.compile is not None else gpu and not arguments.quick

    print(", ".join(f"{name} {value}" for name, value in facts.items() if value))
    print(_LINE.format(*_HEADER))
    with torch.no_grad():
        rows, wrong = run(
            arguments.device, arguments.ops, arguments.backends,
            quick=arguments.quick, compiled=compiled, show=_show, progress=_progress,
        )  # fmt: skip
    for line in wrong:
        print(f"hvprune bench: {line}", file=sys.stderr)
    if wrong:
        print("hvprune bench: nothing is written, since results are wrong", file=sys.stderr)
        return 1
    if path:
        write_csv(path, COLUMNS, rows)
        print(f"wrote {path}")
    if arguments.json:
        numbers = set(COLUMNS) - {*KEYS, *ENVIRONMENT, "note"} | {"batch"}
        typed = [{k: (float(v) if v else None) if k in numbers else v for k, v in row.items()} for row in rows]
        arguments.json.write_text(json.dumps(typed, indent=1) + "\n")
        print(f"wrote {arguments.json}")
    if old is None:
        return 0
    lines, slower = compare(old, rows, arguments.relative, arguments.tolerance)
    print("\n" + "\n".join(lines))
    return 1 if slower else 0


_HEADER = ("case", "rival", "device", "wall", "GB/s", "x floor", "")
_LINE = "{:64} {:24} {:>9} {:>9} {:>7} {:>8}  {}"


def _show(row: dict[str, str]) -> None:
    from ._results import format_time

    case = " ".join(filter(None, (row["op"], row["setting"], row["shape"], f"B={row['batch']}", row["dtype"])))
    times = [format_time(float(row[kind])) if row[kind] else "-" for kind in ("device_us", "wall_us")]
    line = _LINE.format(case, row["rival"], *times, row["gbs"] or "-", row["of_floor"] or "-", row["note"]).rstrip()
    if sys.stderr.isatty():  # the bar stands where the line goes
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
    print(line, flush=True)


def _progress(todo: list) -> Iterable:
    """The items, with a bar where somebody looks at it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return todo
    return tqdm(todo, unit="case", leave=False, disable=None)  # None: off unless stderr is a terminal
