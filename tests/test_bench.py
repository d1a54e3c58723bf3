"""hvprune bench: what it counts as time, what it refuses to report, what it calls slower. No test looks at a real time
other than beside another of the same run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hvprune import reference
from hvprune.benchmarks import _compare, _exp_kernel, _harness, _results, _timing, baselines, bench_diverse_select
from hvprune.benchmarks import bench_hierarchical_select as bench_hierarchical
from hvprune.benchmarks._floor import Ceilings, Work
from hvprune.benchmarks.shapes import BATCHES, CLIP_L, DTYPES, SHAPES, Case, make_scores
from hvprune.cli import main

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu" / "micro.csv"


class FakeGpu:
    """A GPU whose clock goes on by what calls say they take; it is on the CPU as far as tensors are concerned."""

    type = "cuda"
    shortest_sample = 0.0
    flush_seconds = 50e-6

    def __init__(self):
        self.now, self.log = 0.0, []

    def clock(self):
        return self.now

    def work(self, seconds, name="call"):
        self.now += seconds
        self.log.append(name)

    def flush(self):
        self.work(self.flush_seconds, "flush")

    def record(self):
        return self.now

    def seconds_between(self, start, end):
        return end - start

    def synchronize(self):
        pass

    def capture(self, call):
        call()
        return call, call()

    def peak_extra_mb(self, call):
        call()
        return 1.5


def test_device_time_leaves_the_flush_out():
    gpu = FakeGpu()
    replays = [lambda: gpu.work(3e-6, "a"), lambda: gpu.work(5e-6, "b")]
    samples = _timing.device_samples(replays, gpu, budget=1e-3)
    assert samples == pytest.approx(([3e-6, 5e-6] * len(samples))[: len(samples)])
    assert len(samples) == 18  # as many as the budget has room for, flushes included
    assert gpu.log == ["flush", "a", "flush", "b", "flush", "a"] + (["flush", "a", "flush", "b"] * 9)


def test_wall_time_repeats_short_calls_on_a_cpu_only():
    machine = FakeGpu()
    for shortest, calls in ((0.0, 1), (1e-3, 50)):
        machine.shortest_sample, machine.log = shortest, []
        samples = _timing.wall_samples(lambda: machine.work(20e-6), machine, budget=0.1)
        assert samples == pytest.approx([20e-6] * len(samples))
        assert len(machine.log) == 2 + calls * len(samples)


def test_wall_time_does_not_repeat_a_call_beyond_the_budget():
    machine = FakeGpu()
    assert _timing.wall_samples(lambda: machine.work(2.0), machine, budget=0.1) == [2.0]
    assert len(machine.log) == 1


def rivals_of(gpu):
    """Rivals that take known times; what they compute is the sum of an input."""
    x = torch.arange(4.0)

    def solve(seconds, result=6.0):
        def call(values):
            gpu.work(seconds)
            return values.sum() - 6.0 + result

        return call

    def no_graph(values):
        gpu.work(1e-3)
        return values.sum()

    def broken(values):
        raise RuntimeError("out of registers\nand more")

    verify = _harness.equal_to(torch.tensor(6.0))
    return {
        "hvprune cuda": _harness.Rival(solve(1e-5), (x,), verify),
        "released": _harness.Rival(no_graph, (x,), verify),
        "plain PyTorch": _harness.Rival(solve(2e-5, result=7.0), (x,), verify),
        "flash-colreduce": _harness.Rival(solve(2e-5, result=8.0), (x,), verify, optional=True),
        "broken": _harness.Rival(broken, (x,), verify),
        "hvprune triton": _harness.Rival(broken, (x,), verify),
    }, no_graph


def test_a_wrong_result_is_not_timed_and_named():
    gpu = FakeGpu()
    rivals, no_graph = rivals_of(gpu)
    capture = gpu.capture

    def refuse(call):
        if call.func is no_graph:
            raise _timing.NotCapturable("it waits")
        return capture(call)

    gpu.capture = refuse
    case = Case("gather_tokens", "", CLIP_L, 1, torch.float32)
    module = SimpleNamespace(rivals=lambda case: rivals, work=lambda case: Work(4000))
    found = _harness.measure_case(module, case, gpu, [*rivals], compiled=False, budget=1e-3)
    assert found["hvprune cuda"].device.median == pytest.approx(10) == found["hvprune cuda"].wall.median
    assert found["hvprune cuda"].peak_extra_mb == 1.5 and not found["hvprune cuda"].note
    assert found["released"].device is None and found["released"].wall.median == pytest.approx(1000)
    assert found["released"].note == "no CUDA graph: it waits"
    for name, note in {
        "plain PyTorch": "wrong result: differs from the reference: 7.0 is not 6.0",
        "flash-colreduce": "wrong result: differs from the reference: 8.0 is not 6.0",
        "broken": "RuntimeError: out of registers",
        "hvprune triton": "RuntimeError: out of registers",
    }.items():
        assert found[name].note == note and found[name].device is found[name].wall is None
    assert [name for name in rivals if found[name].failed] == ["plain PyTorch", "hvprune triton"]

    ceilings = Ceilings(1e-6, {4000: 1e9}, {torch.float32: 1e12}, None)
    row = _harness.make_row(module, case, "hvprune cuda", found["hvprune cuda"], ceilings, {"device": "A GPU"})
    assert (row["device_us"], row["floor_us"], row["of_floor"], row["gbs"]) == ("10", "5", "2", "0.4")
    empty = _harness.make_row(module, case, "broken", found["broken"], ceilings, {})
    assert empty["device_us"] == empty["wall_us"] == empty["of_floor"] == ""


def test_floor_is_launch_and_the_slowest_part():
    ceilings = Ceilings(2e-6, {1 << 10: 1e9, 1 << 20: 2e9}, {torch.float32: 1e12}, 1e10)
    floor = ceilings.floor
    assert floor(Work(0), torch.float32) == 2e-6
    assert floor(Work(1000), torch.float32) == pytest.approx(3e-6)  # at the rate of the copy nearest in size
    assert floor(Work(1 << 21), torch.float32) == pytest.approx(2e-6 + (1 << 21) / 2e9)
    assert floor(Work(1000, flops=10**8), torch.float32) == pytest.approx(102e-6)
    assert floor(Work(1000, flops=10**8, exps=10**7), torch.float32) == pytest.approx(1002e-6)
    assert ceilings._replace(exp=None).floor(Work(1000, exps=10**9), torch.float32) == pytest.approx(3e-6)


def nbytes(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


@pytest.mark.parametrize("op", ["attention_importance", "cosine_similarity", "hierarchical_select", "hivtp_select"])
def test_bytes_are_those_of_inputs_and_result(op):
    (module,) = _harness.bench_modules([op])
    small = CLIP_L._replace(grid=(6, 7), num_heads=2, head_dim=8, num_features=16)
    for case in {case._replace(shape=small, batch=2, baselines=()) for case in module.CASES}:
        if case.setting.startswith("1 layer"):
            continue  # of Q, one row counts
        rival = module.rivals(case)["hvprune cpu"]
        assert module.work(case).bytes == nbytes(rival.inputs) + nbytes(rival.call(*rival.inputs))


def test_work_knows_the_rounds_and_the_width_of_a_selection():
    for total, (num_tokens, ratio) in ((576, (128, 0.5)), (729, (64, 0.75))):
        _, trace = reference.diverse_select(
            torch.zeros(1, total, total), torch.zeros(1, total), num_tokens, important_ratio=ratio, return_trace=True
        )
        sizes = (trace[0] >= 0).sum(1).tolist()
        assert bench_diverse_select.rounds(total, num_tokens, ratio) == sizes[:-1]
    for grid in ((24, 24), (27, 27), (6, 7)):
        scores = torch.zeros(1, grid[0] * grid[1])
        assert reference.hierarchical_select(scores, grid).indices.shape[1] == bench_hierarchical.most_kept(grid)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_differ_in_every_dtype(dtype):
    for shape in SHAPES:
        scores = make_scores(Case("", "", shape, 1, dtype))
        assert scores.isfinite().all() and scores.unique().numel() == shape.num_tokens


def test_a_gpu_gets_every_size_and_dtype(monkeypatch):
    monkeypatch.setattr(_harness, "_memory", lambda device: 141e9)
    for op in ("gather_tokens", "attention_importance"):
        (module,) = _harness.bench_modules([op])
        cases = _harness.plan(module, "cuda")
        assert {(c.shape, c.batch, c.dtype) for c in cases} == {
            (s, b, d) for s in SHAPES for b in BATCHES for d in DTYPES
        }
        assert {case.dtype for case in cases if case.baselines} == {torch.bfloat16}
        quick = _harness.plan(module, "cuda", quick=True)
        assert {(c.shape, c.batch, c.dtype) for c in quick} == {(CLIP_L, b, torch.bfloat16) for b in BATCHES}
    assert _harness.FLASH in quick[0].baselines
    assert _harness.FLASH not in _harness.plan(module, "cpu", quick=True)[0].baselines
    monkeypatch.setattr(_harness, "_memory", lambda device: 1e9)
    assert len(_harness.plan(module, "cuda")) < len(cases)


def test_exponentials_leave_the_output_alone(monkeypatch):
    monkeypatch.setattr(_exp_kernel, "PROGRAMS", 2)
    monkeypatch.setattr(_exp_kernel, "ROUNDS", 3)
    out = torch.full((1,), 5.0)
    _exp_kernel.exponentiate(out)
    assert out.item() == 5


def row_of(rival, wall, low=None, high=None, **others):
    row = dict.fromkeys(_harness.COLUMNS, "") | {"op": "gather_tokens", "shape": "CLIP-L", "batch": "1", "rival": rival}
    times = {"wall_us": str(wall), "wall_p20_us": str(low or wall), "wall_p80_us": str(high or wall)}
    return row | times | others


@pytest.mark.parametrize(
    ("now", "relative", "slower"),
    [
        ((100, 98, 103), False, False),
        ((104, 103, 110), False, False),  # what the tolerance allows
        ((130, 100, 140), False, False),  # as noisy as that, nobody can tell
        ((110, 107, 112), False, True),
        ((50, 49, 51), False, False),
        ((110, 107, 112), True, True),
    ],
)
def test_slower_is_what_noise_does_not_explain(now, relative, slower):
    baseline = row_of("plain PyTorch", 1000)
    old = [row_of("hvprune cpu", 100, 99, 101), baseline]
    lines, found = _compare.compare(old, [row_of("hvprune cpu", *now), baseline], relative, tolerance=1.05)
    assert bool(found) == slower
    assert ("SLOWER" in lines[1]) == slower and f"{now[0] / 100:.2f}" in lines[1]


def test_relative_comparison_does_not_see_the_machine():
    def run(factor):
        return [row_of("hvprune cpu", 100 * factor), row_of("plain PyTorch", 1000 * factor)]

    assert not _compare.compare(run(1), run(3), relative=True, tolerance=1.05)[1]
    assert _compare.compare(run(1), run(3), relative=False, tolerance=1.05)[1]


def test_baselines_may_become_slower_and_both_times_count():
    old = [row_of("released", 10), row_of("hvprune cuda", 20, device_us="3", device_p20_us="3", device_p80_us="3")]
    slower = {"device_us": "4", "device_p20_us": "4", "device_p80_us": "4"}
    lines, found = _compare.compare(old, [row_of("released", 90), row_of("hvprune cuda", 20, **slower)], False, 1.05)
    assert len(found) == 1 and " device " in found[0]
    assert lines[-1] == "2 times compared, 1 slower; 0 only now, 0 only in the earlier run"


def test_nothing_in_common_is_no_success():
    assert _compare.compare([row_of("hvprune cpu", 1)], [row_of("hvprune cpu", 1, batch="8")], False, 1.05)[1]


def bench(capsys, *arguments):
    status = main(["bench", "--quick", "--device", "cpu", "--backends", "cpu", *map(str, arguments)])
    return status, capsys.readouterr()


def test_compare_exits_1_when_it_is_slower(tmp_path, capsys):
    """No load changes a time a million times; threads that wait for a core alone do it a thousand times."""
    new, run = tmp_path / "new.csv", ("--ops", "gather_tokens")
    status, said = bench(capsys, *run, "--csv", new, "--json", tmp_path / "new.json")
    assert status == 0 and "hvprune cpu" in said.out
    rows = _results.read_csv(new)
    assert [row["rival"] for row in rows] == ["hvprune cpu", "released", "plain PyTorch"]
    assert all(float(row["wall_us"]) > 0 and float(row["of_floor"]) > 0 and not row["device_us"] for row in rows)
    assert [row["wall_us"] for row in json.loads((tmp_path / "new.json").read_text())] == [
        float(row["wall_us"]) for row in rows
    ]
    for factor, status in ((1e6, 0), (1e-6, 1)):
        old = tmp_path / "old.csv"
        times = ("wall_us", "wall_p20_us", "wall_p80_us")
        _results.write_csv(old, _harness.COLUMNS, [r | {k: str(float(r[k]) * factor) for k in times} for r in rows])
        found, said = bench(capsys, *run, "--compare", old)
        assert found == status and ("SLOWER" in said.out) == bool(status)
    _results.write_csv(old, _harness.COLUMNS, [row | {"device": "Another"} for row in rows])
    with pytest.raises(SystemExit) as error:
        bench(capsys, *run, "--compare", old)
    assert error.value.code == 2
    assert "a run on this machine, got one on Another" in capsys.readouterr().err


def test_no_op_became_slower_beside_its_rivals(capsys):
    """Ratios to a rival in the same run, five times worse than the committed ones at most: for any machine."""
    status, said = bench(capsys, "--compare", COMMITTED, "--relative", "--tolerance", 5)
    assert status == 0, said.out
    compared = len(
        [case for op in _harness.bench_modules() for case in _harness.plan(op, "cpu", True) if case.baselines]
    )
    assert f"\n{compared} times compared, 0 slower" in said.out


def test_a_mismatch_writes_nothing(tmp_path, monkeypatch, capsys):
    right = baselines.plain_gather_tokens
    monkeypatch.setattr(baselines, "plain_gather_tokens", lambda *inputs: right(*inputs) + 1)
    status, said = bench(capsys, "--ops", "gather_tokens", "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json")
    assert status == 1 and not any(tmp_path.iterdir())
    assert "gather_tokens K=128 CLIP-L/14-336 B=1 float32 plain PyTorch: wrong result" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "gather"], "argument --ops: invalid choice: 'gather'"),
        (["--ops", "gather_tokens", "--csv"], "--csv must have a PATH with --ops or --backends"),
        (["--compare", "missing.csv"], "[Errno 2] No such file or directory: 'missing.csv'"),
        (["--tolerance", "0.5"], "--tolerance must be at least 1, got 0.5"),
        (["--device", "cpu", "--backends", "cuda"], "backend 'cuda' is unavailable: it takes cuda tensors, got cpu"),
        (["--device", "a"], "device must be one that torch can use here, got 'a' (Expected one of"),
    ],
)
def test_bench_refuses_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as status:
        main(["bench", *arguments])
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert error.startswith(f"hvprune bench: {message}") and error.count("\n") == 1


def test_other_commands_load_only_its_options():
    code = "import sys; from hvprune.cli import main; main(['info']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = result.stdout.splitlines()[-1].split()
    assert {name for name in loaded if name.startswith("hvprune.benchmarks.")} == {
        f"hvprune.benchmarks.{name}" for name in ("_results", "cli", "e2e")
    }
    assert "matplotlib" not in loaded and "transformers" not in loaded


def test_committed_results_have_the_columns_of_a_run():
    for path in (Path(__file__).parents[1] / "benchmarks" / "results").glob("*/micro.csv"):
        with path.open(newline="") as file:
            assert tuple(next(csv.reader(file))) == _harness.COLUMNS
