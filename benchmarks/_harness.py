"""What is measured: the cases worth it on a device, rivals that verify their result, and a row for each of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from types import ModuleType
from typing import Any, NamedTuple

import torch

from hvprune import ops
from hvprune._registry import BACKENDS, OPS
from hvprune.testing import map_tensors

from ._floor import Ceilings
from ._floor import measure as measure_ceilings
from ._results import ENVIRONMENT, Row, environment
from ._timing import Cpu, Gpu, NotCapturable, Time, device_samples, first_line, machine_of, summarise, wall_samples
from .shapes import CLIP_L, GRID64, Case

COLUMNS = (
    "op", "setting", "shape", "batch", "dtype", "rival",
    "device_us", "device_p20_us", "device_p80_us", "wall_us", "wall_p20_us", "wall_p80_us",
    "peak_extra_mb", "bytes", "flops", "exps", "gbs", "floor_us", "of_floor", "note",
    "launch_us", "copy_gbs", "matmul_tflops", "exp_gps", *ENVIRONMENT,
)  # fmt: skip
KEYS = COLUMNS[:6]  # what tells rows apart
FLASH = "flash-colreduce"  # from PyPI; needs a GPU
TOPK = "torch.topk"  # a yardstick that chooses as many tokens by score alone: less work, so no floor
TURNS = 3  # rivals take turns, so that a slow phase of the machine hits them all
BUDGET, QUICK_BUDGET = 0.1, 0.02  # seconds of samples per rival, turn and kind of time
INPUT_SETS = 2  # replays on a GPU rotate through equal inputs at other addresses
# What a CPU may need for one call of hvprune: beyond, a case is left out; beyond the second, its baselines are. On the
# 64x64 grid, where a reference and a baseline take longest beside it, more than that leaves out batches and baselines.
MAX_CPU_SECONDS, MAX_CPU_SECONDS_WITH_BASELINES, MAX_CPU_SECONDS_ON_GRID64 = 3.0, 0.5, 0.01


class Rival(NamedTuple):
    """One way to solve a case. ``verify`` raises AssertionError if what ``call(*inputs)`` returned is wrong."""

    call: Callable
    inputs: Sequence
    verify: Callable[[Any], None]
    # A baseline that makes choices from numbers it computed is verified on float64 inputs: in the case's dtype its
    # own rounding may flip a choice, and the dedup amplifies that.
    in_float64: bool = False
    compiles: bool = False  # whether torch.compile gets along with it in a minute
    optional: bool = False  # somebody else's package: not there, or less exact, is a remark and no failure

    def check(self) -> None:
        self.verify(self.call(*(as_float64(self.inputs) if self.in_float64 else self.inputs)))


def bench_modules(names: Iterable[str] | None = None) -> list[ModuleType]:
    """The bench files of ops, all by default; then, if all are asked for, that of the call as such."""
    files = sorted(OPS) if names is None else list(names)
    return [
        import_module(f".bench_{name}", __package__) for name in [*files, *(["call_overhead"] if not names else [])]
    ]


def backends(case: Case) -> list[str]:
    """The backends of hvprune that can run the case here; the reference is the oracle, not a rival."""
    op = OPS[case.op]
    return [b for b in BACKENDS if b != "reference" and op.why_unavailable(b, torch.device(case.device).type) is None]


def rival_names(case: Case) -> list[str]:
    return [f"hvprune {backend}" for backend in backends(case)] + list(case.baselines)


def hvprune_rivals(case: Case, *inputs, verify: Callable, per_backend: bool = False, **kwargs) -> dict[str, Rival]:
    """The op of the case on each backend. per_backend: ``verify(backend)`` returns the function that verifies."""
    function = getattr(ops, case.op)
    verify = cache(verify) if per_backend else verify
    return {
        f"hvprune {b}": Rival(
            partial(function, backend=b, **kwargs), inputs, partial(_verify_on, verify, b) if per_backend else verify
        )
        for b in backends(case)
    }


def _verify_on(verify: Callable, backend: str, actual: Any) -> None:
    verify(backend)(actual)


def equal_to(expected: Any) -> Callable[[Any], None]:
    """Bitwise equality of a tensor or of every tensor of a sequence."""

    def verify(actual):
        pair = ([actual], [expected]) if isinstance(expected, torch.Tensor) else (actual, expected)
        for got, want in zip(*pair, strict=True):
            assert torch.equal(got, want), f"differs from the reference: {got} is not {want}"

    return verify


def as_float64(inputs: Iterable) -> list:
    """The floating-point tensors of a sequence, nested or not, in float64; anything else unchanged."""
    return map_tensors(list(inputs), lambda x: x.double() if x.is_floating_point() else x)


def images_to_verify(batch: int) -> list[int]:
    """All of up to 8 images; of more, four at either end: float64 maps of 64 images take longer than all timings."""
    return list(range(batch)) if batch <= 8 else [*range(4), *range(batch - 4, batch)]


def no_worse_than_torch(
    oracle: torch.Tensor, same_dtype: torch.Tensor, images: list[int] | None = None
) -> Callable[[Any], None]:
    """Error against the float64 oracle at most twice that of PyTorch in the same dtype, plus one rounding."""
    torch_error = (same_dtype.double() - oracle).abs().max().item()

    def verify(actual):
        actual = actual if images is None else actual[images]
        error = (actual.double() - oracle).abs().max().item()
        limit = 2 * torch_error + torch.finfo(actual.dtype).eps * oracle.abs().max().item()
        assert error <= limit, f"error {error:.3g} is above {limit:.3g}; PyTorch's own is {torch_error:.3g}"

    return verify


def plan(module: ModuleType, device: str, quick: bool = False) -> list[Case]:
    """The cases of a bench file for a device; those in the dtype that models run in there have baselines.

    On a GPU that is bfloat16, every shape, batch and dtype runs, if it fits in memory, and baselines run on CLIP-L and
    on single images. On a CPU it is float32, half precision runs on one image of CLIP-L, and what would take seconds
    is left out. quick: CLIP-L in that dtype, on a CPU one image.
    """
    gpu = torch.device(device).type == "cuda"
    main = torch.bfloat16 if gpu else torch.float32
    memory = _memory(device)
    chosen = []
    for case in module.CASES:
        if case.setting == "call overhead":
            chosen.append(case._replace(device=device))
            continue
        work = module.work(case)
        single = case.batch == 1 and case.shape is CLIP_L
        baselines = case.dtype is main and (gpu or _cpu_seconds(work) <= MAX_CPU_SECONDS_WITH_BASELINES)
        if gpu:
            wanted = case.dtype is main and case.shape is CLIP_L if quick else True
            baselines &= case.shape is CLIP_L or case.batch == 1
        elif quick:
            wanted = case.dtype is main and single
        else:
            wanted = single or (case.dtype is main and _cpu_seconds(work) <= MAX_CPU_SECONDS)
            if case.shape is GRID64 and _cpu_seconds(work) > MAX_CPU_SECONDS_ON_GRID64:
                wanted &= case.batch == 1
                baselines = False
        needed = work.bytes * (INPUT_SETS + 3) + work.held  # a widened copy, and what the rivals allocate
        if wanted and needed <= memory:
            baselines &= needed + work.held_by_baselines <= memory
            names = [name for name in case.baselines if baselines and (gpu or name != FLASH)]
            chosen.append(case._replace(device=device, baselines=tuple(names)))
    return chosen


def _memory(device: str) -> float:
    if torch.device(device).type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds(work) -> float:
    """Roughly, of two cores; it only decides what is left out."""
    return work.flops / 1e11 + work.exps / 1e9 + work.bytes / 5e9


def with_compiled(rivals: dict[str, Rival]) -> dict[str, Rival]:
    """After each baseline that compiles, the same under torch.compile.

    That is verified in float64: compiled sums have an order of their own and are less exact than PyTorch's.
    """
    found = {}
    for name, rival in rivals.items():
        found[name] = rival
        if rival.compiles:
            found[f"{name}, compiled"] = rival._replace(call=torch.compile(rival.call, dynamic=False), in_float64=True)
    return found


class Measurement(NamedTuple):
    """What was found out about one rival; a rival without times says why in ``note``."""

    device: Time | None = None
    wall: Time | None = None
    peak_extra_mb: float | None = None
    note: str = ""
    failed: bool = False


def measure_case(
    module: ModuleType, case: Case, machine: Cpu | Gpu, names: Sequence[str], compiled: bool, budget: float
) -> dict[str, Measurement]:
    """Verifies the named rivals of a case, then times those that are right in TURNS turns of ``budget`` seconds."""
    rivals = {name: rival for name, rival in module.rivals(case).items() if name in names}
    if compiled:
        torch._dynamo.reset()  # or other cases count against the limit of recompilations
        rivals = with_compiled(rivals)
    calls, replays, peaks, notes, failed = {}, {}, {}, {}, set()
    copies: dict[int, torch.Tensor] = {}  # of inputs, which the rivals share
    for name, rival in rivals.items():
        call = partial(rival.call, *rival.inputs)
        try:
            call()  # a first call may try out configurations, which leaves its output dirty
            rival.check()
            if machine.type == "cuda" or case in getattr(module, "MEMORY_CASES", ()):
                peaks[name] = machine.peak_extra_mb(call)
            if machine.type == "cuda":
                replays[name] = _capture(rival, machine, copies)
            calls[name] = call
        except NotCapturable as error:
            notes[name] = f"no CUDA graph: {error}"
            calls[name] = call
        except AssertionError as error:
            notes[name] = f"wrong result: {first_line(error)}"
            failed |= set() if rival.optional else {name}
        except Exception as error:  # a rival that runs out of memory or does not compile leaves a row without times
            notes[name] = f"{type(error).__name__}: {first_line(error)}"
            failed |= {name} if name.startswith("hvprune") else set()
    device, wall = {name: [] for name in calls}, {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            wall[name] += wall_samples(call, machine, budget)
            if name in replays:
                device[name] += device_samples(replays[name], machine, budget)
    return {
        name: Measurement(
            summarise(device[name]) if device.get(name) else None,
            summarise(wall[name]) if name in calls else None,
            peaks.get(name),
            notes.get(name, ""),
            name in failed,
        )
        for name in rivals
    }


def _capture(rival: Rival, gpu: Gpu, copies: dict[int, torch.Tensor]) -> list[Callable[[], Any]]:
    """One graph for each set of equal inputs; what the first one computes is verified, if it can be as it is."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in copies:
            copies[id(x)] = x.clone()
        return copies[id(x)]

    replays = []
    for i in range(INPUT_SETS):
        inputs = map_tensors(list(rival.inputs), copy) if i else rival.inputs
        replay, result = gpu.capture(partial(rival.call, *inputs))
        if not i and not rival.in_float64:
            replay()
            gpu.synchronize()
            rival.verify(result)
        replays.append(_keep(replay, inputs, result))
    return replays


def _keep(replay: Callable[[], Any], *alive: Any) -> Callable[[], Any]:
    """The replay, with the tensors that its graph reads and writes."""

    def run():
        replay()

    run.alive = alive
    return run


def make_row(module: ModuleType, case: Case, rival: str, found: Measurement, ceilings: Ceilings, facts: Row) -> Row:
    work = module.work(case)
    floor = ceilings.floor(work, case.dtype) * 1e6
    best = None if rival == TOPK else found.device or found.wall
    row = {
        "op": case.op, "setting": case.setting, "shape": case.shape.name, "batch": str(case.batch),
        "dtype": case.dtype_name, "rival": rival,
        **_columns("device", found.device), **_columns("wall", found.wall),
        "peak_extra_mb": "" if found.peak_extra_mb is None else f"{found.peak_extra_mb:.3g}",
        "bytes": str(work.bytes), "flops": str(work.flops), "exps": str(work.exps),
        "gbs": f"{work.bytes / best.median / 1e3:.3g}" if best else "",
        "floor_us": f"{floor:.4g}", "of_floor": f"{best.median / floor:.3g}" if best else "",
        "note": found.note,
        "launch_us": f"{ceilings.launch * 1e6:.4g}", "copy_gbs": f"{ceilings.copy_rate(work.bytes) / 1e9:.4g}",
        "matmul_tflops": f"{ceilings.matmul_rate(case.dtype) / 1e12:.4g}",
        "exp_gps": "" if ceilings.exp is None else f"{ceilings.exp / 1e9:.4g}",
    }  # fmt: skip
    return row | facts


def _columns(kind: str, time: Time | None) -> Row:
    values = ("", "", "") if time is None else [f"{value:.4g}" for value in time]
    return dict(zip((f"{kind}_us", f"{kind}_p20_us", f"{kind}_p80_us"), values, strict=True))


def run(
    device: str,
    ops: Sequence[str] | None,
    backends: Sequence[str] | None,
    *,
    quick: bool,
    compiled: bool,
    show: Callable[[Row], None],
    progress: Callable[[list], Iterable],
) -> tuple[list[Row], list[str]]:
    """The rows, each given to ``show`` as it is measured, and what is wrong: rivals with a wrong result."""
    machine = machine_of(device)
    budget = QUICK_BUDGET if quick else BUDGET
    todo = [(module, case) for module in bench_modules(ops) for case in plan(module, device, quick)]
    ceilings = measure_ceilings(machine, dict.fromkeys(case.dtype for _, case in todo), budget)
    facts, rows, wrong = environment(device), [], []
    # What earlier ops made the allocator of a process keep or give back doubles or halves the time of a rival that
    # allocates much. Users' processes have not run them.
    alone = ProcessPerOp() if machine.type == "cpu" and ops is None and not quick else None
    for module, case in progress(todo):
        names = [n for n in rival_names(case) if backends is None or n in case.baselines or n.split()[1] in backends]
        if alone:
            measured = alone.measure(module, case, names, compiled, budget)
        else:
            measured = measure_case(module, case, machine, names, compiled, budget)
        for name, found in measured.items():
            rows.append(make_row(module, case, name, found, ceilings, facts))
            show(rows[-1])
            if found.failed:
                wrong.append(f"{case} {name}: {found.note}")
        if machine.type == "cuda":
            torch.cuda.empty_cache()
    if alone:
        alone.close()
    return rows, wrong


class ProcessPerOp:
    """``measure_case`` on a CPU, the cases of an op in a new process."""

    def __init__(self):
        self._module = self._executor = None

    def measure(self, module: ModuleType, case: Case, *arguments) -> dict[str, Measurement]:
        if module is not self._module:
            self.close()
            self._executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            self._module = module
        return self._executor.submit(_measure_on_cpu, module.__name__, case, *arguments).result()

    def close(self) -> None:
        if self._executor:
            self._executor.shutdown()


def _measure_on_cpu(module: str, case: Case, *arguments) -> dict[str, Measurement]:
    names, compiled, budget = arguments
    with torch.no_grad():
        return measure_case(import_module(module), case, machine_of("cpu"), names, compiled, budget)
