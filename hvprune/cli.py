"""The command line, ``hvprune`` or ``python -m hvprune``: one function per subcommand."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from . import BackendUnavailable, __version__
from ._registry import BACKENDS
from .benchmarks.cli import add_parser as add_bench
from .generate import add_parser as add_generate


class _Parser(argparse.ArgumentParser):
    """Errors take one line, not the usage and a line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 1 for a wrong result, 2 for arguments that do not work."""
    parser = _Parser(prog="hvprune", description="Fused kernels for visual token pruning.")
    parser.add_argument("--version", action="version", version=f"hvprune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in (_add_info, _add_demo, add_generate, add_bench):
        add_command(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _add_info(commands) -> None:
    summary = "show versions, the instruction set in use, and each backend with what it lacks"
    commands.add_parser("info", help=summary, description=summary).set_defaults(run=_info)


def _info(_) -> int:
    from .info import report

    print(report())
    return 0


def _add_demo(commands) -> None:
    summary = "prune a photo with every method, time the ops and draw what is kept"
    parser = commands.add_parser("demo", help=summary, description=summary)
    add = parser.add_argument
    add("photo", type=Path, metavar="PHOTO", help="any image file that Pillow reads")
    add("--grid", type=_grid, default=(24, 24), metavar="R[xC]", help="rows x columns of patches (24)")
    add("--num-tokens", type=int, nargs="+", metavar="K", help="budgets (64 128, scaled with the grid)")
    add("--keep", type=float, default=0.25, metavar="RATIO", help="HIVTP's share of a region (0.25)")
    add("--method", choices=("hivtp", "vispruner", "all"), default="all")
    add("--out", type=Path, metavar="PNG", help="the picture to write (<PHOTO>_pruned.png, here)")
    add("--backend", choices=("auto", *BACKENDS), default="auto")
    add("--device", default="cpu", help="torch device of the tensors (cpu)")
    parser.set_defaults(run=lambda arguments: _demo(parser, arguments))


def _demo(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from . import demo

    try:
        right = demo.run(
            arguments.photo,
            arguments.out or Path(f"{arguments.photo.stem}_pruned.png"),
            grid=arguments.grid,
            num_tokens=arguments.num_tokens,
            keep_ratio=arguments.keep,
            methods=demo.METHODS if arguments.method == "all" else (arguments.method,),
            backend=arguments.backend,
            device=arguments.device,
        )
    except (demo.DemoError, BackendUnavailable) as error:
        parser.error(str(error))
    return 0 if right else 1


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be rows or rows x columns such as 24 or 18x32, got {text!r}")
    return int(match[1]), int(match[2] or match[1])
