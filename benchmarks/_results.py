"""The results of every suite: where their CSV files are, which machine made a row, how a number reads in a table."""

from __future__ import annotations

import csv
import hashlib
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

import hvprune
from hvprune import _native

ROOT = Path(__file__).parent.parent  # of the checkout, if this is one
IN_CHECKOUT = (ROOT / "pyproject.toml").is_file() and Path(__file__).parent.name == "benchmarks"
RESULTS = Path(__file__).parent / "results" if IN_CHECKOUT else Path()

Row = dict[str, str]


def results_path(suite: str, device: str) -> Path:
    """``results/<cpu or the GPU's name>/<suite>.csv`` of a checkout; the same below the current folder elsewhere."""
    return RESULTS / slug("cpu" if torch.device(device).type == "cpu" else device_name(device)) / f"{suite}.csv"


def committed(suite: str, results: Path = RESULTS) -> dict[str, list[Row]]:
    """The rows of ``results/<folder>/<suite>.csv`` by folder: "cpu", then the GPUs."""
    paths = sorted(results.glob(f"*/{suite}.csv"), key=lambda path: (path.parent.name != "cpu", path))
    return {path.parent.name: read_csv(path) for path in paths}


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def pictures(results: Path = RESULTS) -> dict[Path, str]:
    """``results/<folder>/<suite>-<what>.png`` with their titles."""
    return {path: Image.open(path).text["Title"] for path in sorted(results.glob("*/*-*.png"))}


def picture_metadata(title: str, source: Path) -> dict[str, str | None]:
    """What a picture says about itself: the results that it shows, by their hash. For matplotlib's savefig."""
    return {"Title": title, "Source": _digest(source), "Software": None}


def stale_pictures(results: Path = RESULTS) -> list[Path]:
    """Those that show other results than the CSV file beside them."""
    suites = {path: path.with_name(f"{path.name.partition('-')[0]}.csv") for path in pictures(results)}
    return [p for p, csv in suites.items() if not csv.exists() or Image.open(p).text["Source"] != _digest(csv)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


ENVIRONMENT = (
    "device", "driver", "cuda", "triton", "instruction_set", "threads", "torch", "commit", "date",
)  # fmt: skip


def environment(device: str = "cpu") -> Row:
    """What a row has to say about where and when it was measured; the CUDA fields are empty on a CPU."""
    gpu = torch.device(device).type == "cuda"
    return {
        "device": device_name(device),
        "driver": _driver() if gpu else "",
        "cuda": torch.version.cuda or "" if gpu else "",
        "triton": _version("triton") if gpu else "",
        "instruction_set": _native.C.cpu_isa() if _native.C else "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def device_name(device: str) -> str:
    """The model name of the processor or GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    if not IN_CHECKOUT:
        return f"version {hvprune.__version__}"
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def format_time(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def format_ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.2g}x"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown; all columns but the first are flush right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
