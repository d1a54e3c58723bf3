"""``hvprune demo PHOTO``: the real ops on a real photo, drawn, and timed against the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from .. import Selection, ops, reference
from .._registry import OPS
from ..reference.hierarchical_select import region_bounds
from .encoder import DemoError, encode, load_photo
from .picture import COVERING, FILLING, IMPORTANT, Panel, draw

__all__ = ["METHODS", "DemoError", "run"]

METHODS = ("hivtp", "vispruner")
MAX_PATCHES = 64 * 64  # the reference holds several float32 maps of N x N
REGIONS = (2, 2)
IMPORTANT_RATIO = 0.5
DIFFERS = "DIFFERS"


class Call(NamedTuple):
    """A call of an op, one line of the table."""

    op: str
    setting: str
    args: tuple
    options: dict
    expected: Selection | None = None  # what it has to return; None: what the op's own reference does

    def run(self, backend: str) -> Tensor | Selection:
        return getattr(ops, self.op)(*self.args, **self.options, backend=backend)

    def run_reference(self) -> Tensor | Selection:
        return getattr(reference, self.op)(*self.args, **self.options)


def run(
    photo: Path,
    out: Path,
    *,
    grid: tuple[int, int] = (24, 24),
    num_tokens: Sequence[int] | None = None,
    keep_ratio: float = 0.25,
    methods: Sequence[str] = METHODS,
    backend: str = "auto",
    device: str = "cpu",
) -> bool:
    """Prune ``photo``, write the picture to ``out`` and print the table.

    Args:
        grid: patches (rows, columns), at most 4096 in all.
        num_tokens: budgets K of both methods; HIVTP also runs at its natural count. The default, 64 and 128
            of 576 patches, scales with the grid.
        keep_ratio: HIVTP's share of each region in its global stage.
        methods: of "hivtp" and "vispruner".

    Returns:
        Whether every result agrees with the reference.

    Raises:
        DemoError: an argument, the photo or ``out`` cannot be worked with.
        BackendUnavailable: the backend cannot run here.
    """
    _check(photo, out, grid, num_tokens, keep_ratio, device)
    total = grid[0] * grid[1]
    budgets = sorted(set(num_tokens or (max(1, total // 9), max(1, total * 2 // 9))))
    image = load_photo(photo, grid)
    queries, keys, features = (x.to(device) for x in encode(image, grid))

    numeric = Call("attention_importance", "", (queries, keys), {"num_prefix_tokens": 0})
    importance = numeric.run(backend)
    calls, rows = [numeric], []
    for method, plan in (("hivtp", _hivtp), ("vispruner", _vispruner)):
        if method in methods:
            more, panels = plan(queries, keys, features, importance, grid, budgets, keep_ratio, backend)
            calls += more
            rows.append(panels)
    picture = draw(image, importance[0].cpu(), grid, rows)
    try:
        picture.save(out, optimize=True)
    except OSError as error:
        raise DemoError(f"out must be a writable file, got {str(out)!r} ({error.strerror})") from None

    print(f"{photo.name!r} in {grid[0]} x {grid[1]} = {total} patches on {importance.device}: ", end="")
    print(f"{keys.shape[1]} heads of {keys.shape[3]} dimensions, {features.shape[2]} features\n")
    lines = [_line(call, backend, importance.device) for call in calls]
    print(_aligned([("op", "", "kept", "backend", "ms", "reference ms", "ratio"), *lines]))
    print(f"\nMedian times; every result was compared with the reference first.\nPicture: {str(out)!r}")
    return all(line[-1] != DIFFERS for line in lines)


def _check(photo, out, grid, num_tokens, keep_ratio, device) -> None:
    total = grid[0] * grid[1]
    if min(grid) < 1 or total > MAX_PATCHES:
        raise DemoError(f"grid must be of 1 to {MAX_PATCHES} patches, got {grid[0]}x{grid[1]}")
    for budget in num_tokens or ():
        if not 0 <= budget <= total:
            raise DemoError(f"num-tokens must be in [0, N] with N={total} patches, got {budget}")
    if not 0 <= keep_ratio <= 1:
        raise DemoError(f"keep must be in [0, 1], got {keep_ratio}")
    if out.suffix.lower() != ".png":
        raise DemoError(f"out must end in .png, got {str(out)!r}")
    if out.resolve() == photo.resolve():
        raise DemoError(f"out must be another file than the photo, got {str(out)!r}")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # RuntimeError, AssertionError or ImportError, depending on the device
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise DemoError(f"device must be one that torch can use here, got {device!r} ({reason})") from None


def _hivtp(queries, keys, features, importance, grid, budgets, keep_ratio, backend):
    """Calls: the selection op, then the pipeline per budget and in natural mode; a panel per pipeline."""
    selecting = Call("hierarchical_select", "natural", (importance, grid), {"keep_ratio": keep_ratio})
    natural = selecting.run(backend).mask
    quotas = (
        int(keep_ratio * ((bottom - top) * (right - left)))
        for top, bottom in region_bounds(grid[0], REGIONS[0])
        for left, right in region_bounds(grid[1], REGIONS[1])
    )
    # With no more budget than the quotas of the regions, the fixed mode is the global stage alone.
    regional = ops.hierarchical_select(
        importance, grid, keep_ratio=keep_ratio, num_tokens=sum(quotas), backend=backend
    ).mask
    calls, panels = [selecting], []
    for budget in (*budgets, None):
        options = {"keep_ratio": keep_ratio, "num_tokens": budget}
        expected = reference.hierarchical_select(importance, grid, **options)
        setting = "natural" if budget is None else f"K = {budget}"
        options["num_prefix_tokens"] = 0
        calls.append(Call("hivtp_select", setting, (queries, keys, grid), options, expected))
        mask = calls[-1].run(backend).mask
        masks = {IMPORTANT: mask & regional, COVERING: mask & natural & ~regional, FILLING: mask & ~natural}
        panels.append(_panel("HIVTP, natural count" if budget is None else f"HIVTP, {setting}", masks))
    return calls, panels


def _vispruner(queries, keys, features, importance, grid, budgets, keep_ratio, backend):
    """Calls: the two ops, the second with the largest budget, then the pipeline per budget with its panel."""
    similarity = ops.cosine_similarity(features, backend=backend)
    options = {"important_ratio": IMPORTANT_RATIO}
    args = (similarity, importance, budgets[-1])
    calls = [
        Call("cosine_similarity", "", (features,), {}),
        Call("diverse_select", f"K = {budgets[-1]}", args, options),
    ]
    panels = []
    for budget in budgets:
        expected = reference.diverse_select(similarity, importance, budget, **options)
        calls.append(Call("vispruner_select", f"K = {budget}", (features, importance, budget), options, expected))
        mask = calls[-1].run(backend).mask
        num_important = int(budget * IMPORTANT_RATIO)
        important = ops.vispruner_select(features, importance, num_important, important_ratio=1.0, backend=backend).mask
        masks = {IMPORTANT: important, COVERING: mask & ~important}
        panels.append(_panel(f"VisPruner, K = {budget}", masks))
    return calls, panels


def _panel(title: str, masks: dict[str, Tensor]) -> Panel:
    masks = {colour: mask[0].cpu() for colour, mask in masks.items()}
    total = next(iter(masks.values())).numel()
    kept = sum(int(mask.sum()) for mask in masks.values())
    return Panel(title, f"{kept} of {total} patches kept", masks)


def _line(call: Call, backend: str, device: torch.device) -> tuple[str, ...]:
    """A line of the table; the ratio only if the result is right, and only against another backend."""
    backend = OPS[call.op].resolve(backend, device.type)
    result = call.run(backend)
    kept = str(int(result.counts)) if isinstance(result, Selection) else ""
    expected = call.run_reference() if call.expected is None else call.expected
    if not _agree(result, expected):
        return call.op, call.setting, kept, backend, "", "", DIFFERS
    if backend == "reference":
        (reference_ms,) = _median_ms([call.run_reference], device)
        return call.op, call.setting, kept, backend, "", f"{reference_ms:.3f}", ""
    ms, reference_ms = _median_ms([lambda: call.run(backend), call.run_reference], device)
    ratio = f"{reference_ms / ms:.1f}x"
    return call.op, call.setting, kept, backend, f"{ms:.3f}", f"{reference_ms:.3f}", ratio


def _agree(result: Tensor | Selection, expected: Tensor | Selection) -> bool:
    """Selections bit for bit; numbers up to the rounding of float32."""
    if isinstance(result, Selection):
        return all(map(torch.equal, result, expected))
    return torch.allclose(result, expected, rtol=1e-4, atol=1e-6)


def _median_ms(calls: list[Callable], device: torch.device, budget: float = 0.4) -> list[float]:
    """Median time of each call, repeated within a budget of seconds.

    They take turns of 20 ms: what else the machine does falls on all alike, and each runs with warm caches.
    """
    times: list[list[float]] = [[] for _ in calls]
    while sum(map(sum, times)) < budget:
        for call, spent in zip(calls, times, strict=True):
            turn = 0.0
            while turn < 0.02:
                _wait(device)
                start = time.perf_counter()
                call()
                _wait(device)
                spent.append(time.perf_counter() - start)
                turn += spent[-1]
    return [median(spent) * 1e3 for spent in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """Columns of text: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (True, True, False, True, False, False, False)
    rows = []
    for line in (lines[0], tuple("-" * width for width in widths), *lines[1:]):
        cells = zip(line, widths, left, strict=True)
        row = "  ".join(cell.ljust(width) if words else cell.rjust(width) for cell, width, words in cells)
        rows.append(row.rstrip())
    return "\n".join(rows)
