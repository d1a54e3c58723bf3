"""``hvprune bench e2e``: time to first token, throughput, memory and FLOPs of whole models with random weights.

Time does not depend on the weights. A row is verified before it is timed: what the language model gets must equal, bit
for bit, what pruning by hand gives, and every row is in the CSV as soon as it exists.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from hvprune.integrations.random_models import ARCHITECTURES

from ._results import ROOT

PRESETS = ("llava-1.5-7b", "llava-next-7b", "llava-1.5-13b")  # "all"
MODES = ("eager", "captured", "static")
METHODS = ("unpruned", "released", "hivtp", "vispruner")


def add_parser(commands) -> None:
    summary = "time whole LLaVA models with random weights: first token, throughput, memory"
    parser = commands.add_parser("e2e", help=summary, description=summary)
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--preset", nargs="+", choices=(*ARCHITECTURES, "all"), default=["all" if gpu else "tiny"], metavar="NAME",
        help=f"{', '.join(ARCHITECTURES)}, or all: the three big ones (the default on a GPU; else tiny)")  # fmt: skip
    add("--batch", type=int, nargs="+", default=[1, 16, 4], metavar="B", help="in this order (1 16 4)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="rows to measure (all)")
    add("--modes", nargs="+", choices=MODES, default=MODES, help="eager: generate; static: with a static cache; "
        "captured: CUDA graphs, on a GPU only (all)")  # fmt: skip
    add("--new-tokens", type=int, default=128, metavar="T", help="length of the answer (128)")
    add("--text-tokens", type=int, default=40, metavar="T", help="tokens of the prompt besides the photo (40)")
    add("--photos", type=Path, nargs="+", metavar="PHOTO", help="cut and scaled to real sizes (examples/*.jpg)")
    add("--device", default="cuda" if gpu else "cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU")
    add("--csv", type=Path, metavar="PATH", help="benchmarks/results/<cpu or GPU>/e2e.csv by default; the vision "
        "tower's rows go beside it, to <name>_tower.csv")  # fmt: skip
    add("--keep", type=Path, metavar="CSV", help="rows of an earlier run to write too, unless this run measures them")
    add("--time-limit", type=float, metavar="S", help="stop after so many seconds; the presets share them")
    add("--quick", action="store_true", help="batch 1, four variants, few repeats")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 1 if a row was wrong or could not be measured, 2 for arguments that do not work."""
    try:
        import transformers

        from ._pipelines import LEAST_TEXT_TOKENS
        from ._suite import Suite
    except ImportError as error:
        return _fail(f"needs transformers 5.17 or newer (pip install 'hvprune[llava]'): {error}")
    photos = arguments.photos or sorted(ROOT.glob("examples/*.jpg"))
    if not photos:
        return _fail("--photos must be given outside of a checkout, got none")
    for name, paths in (("photos", photos), ("keep", [arguments.keep] if arguments.keep else [])):
        missing = [path for path in paths if not path.is_file()]
        if missing:
            return _fail(f"--{name} must be a file, got {missing[0]}")
    for name, least in (("batch", 1), ("new_tokens", 2), ("text_tokens", LEAST_TEXT_TOKENS)):
        value = min(arguments.batch) if name == "batch" else getattr(arguments, name)
        if value < least:
            return _fail(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    transformers.logging.set_verbosity_error()  # it warns of settings that are meant
    suite = Suite(arguments, photos, transformers.__version__)
    presets = PRESETS if "all" in arguments.preset else arguments.preset
    end = None if arguments.time_limit is None else time.monotonic() + arguments.time_limit
    for i, preset in enumerate(presets):
        now = time.monotonic()
        suite.run(preset, None if end is None else now + (end - now) / (len(presets) - i))
    print(f"\nwritten: {suite.path}" if suite.measured else "\nnothing measured")
    return 1 if suite.failures or not suite.measured else 0


def _fail(message: str) -> int:
    print(f"hvprune bench e2e: {message}", file=sys.stderr)
    return 2
