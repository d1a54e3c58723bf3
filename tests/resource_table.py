"""build/kernel_resources.csv: what every GPU kernel takes, one row per backend, arch and kernel."""

from __future__ import annotations

import csv
import fcntl
from pathlib import Path

TABLE = Path(__file__).parent.parent / "build" / "kernel_resources.csv"
COLUMNS = ("backend", "arch", "kernel", "registers", "shared", "stack", "local")


def record(backend: str, rows: list[dict]) -> None:
    """Put the rows of a backend in place of those that the table has; other processes may do so for another one."""
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        others = [row for row in csv.DictReader(file) if row["backend"] != backend]
        file.truncate(0)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        rows = [*others, *({"backend": backend, **row} for row in rows)]
        writer.writerows(sorted(rows, key=lambda row: (row["backend"], row["kernel"], row["arch"])))
