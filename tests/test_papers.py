"""Tables and pictures of the end-to-end results: every figure comes from the CSV files of GPUs."""

from __future__ import annotations

import pytest

from hvprune.benchmarks import papers
from hvprune.benchmarks._results import write_csv
from hvprune.benchmarks._suite import COLUMNS, STAGES, TOWER_COLUMNS
from hvprune.benchmarks.plot import draw

FACTS = {
    "dtype": "bfloat16", "text_tokens": "40", "new_tokens": "128", "transformers": "5.17.0", "device": "NVIDIA GPU",
    "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "commit": "abc1234", "date": "2026-01-02",
}  # fmt: skip


def make_row(variant, ttft, rate, mode="eager", batch="1", preset="llava-1.5-7b", visual="576", share="0.4"):
    stages = {f"{stage}_ms": str(ttft / len(STAGES)) for stage in STAGES}
    measured = {
        "ttft_ms": str(ttft), "tokens_per_second": str(rate), "generation_ms": str(128e3 / rate), "split_ttft_ms": "1",
        "pruning_percent": "" if variant == "unpruned" else share, "peak_mb": "15000", "kv_cache_mb": "323",
        "tower_gflop": "380", "prefill_gflop": "8200",
    }  # fmt: skip
    where = {"variant": variant, "mode": mode, "batch": batch, "preset": preset, "visual_tokens": visual}
    return where | stages | measured | FACTS


ROWS = [
    make_row("unpruned", 40.0, 50),
    make_row("hvprune HIVTP", 20.0, 90, visual="284"),
    make_row("hvprune VisPruner 128", 50.0, 51, visual="128", share="1.25"),
    make_row("released HIVTP", 80.0, 40, visual="284", share="30"),
    make_row("unpruned", 30.0, 200, mode="captured"),
    make_row("hvprune HIVTP 288", 15.75, 220, mode="captured", visual="288"),
]
TOWERS = [
    {"preset": "llava-1.5-7b", "batch": "1", "tower": tower, "median_ms": time} | FACTS
    for tower, time in (("stock", "10"), ("hooks", "10.05"), ("hooks, last layer skipped", "9.6"))
]


@pytest.fixture
def results(tmp_path):
    """A GPU's results, and a CPU's, which no table shows."""
    for folder in ("gpu", "cpu"):
        for name, columns, rows in (("e2e", COLUMNS, ROWS), ("e2e_tower", TOWER_COLUMNS, TOWERS)):
            known = [{key: value for key, value in row.items() if key in columns} for row in rows]
            write_csv(tmp_path / folder / f"{name}.csv", columns, known)
    return tmp_path


def test_claims_beside_what_was_measured(results):
    lines = papers.claims_table(results).splitlines()
    assert lines[0] == (
        "NVIDIA GPU, bfloat16, 40 text tokens, 128 new tokens; torch 2.11.0, transformers 5.17.0, driver 580.1,"
        " cuda 13.0, commit abc1234, 2026-01-02."
    )
    rest = " | not measured | not measured"
    static = " | cannot be static | cannot be static | cannot be static |"
    for line in (
        f"| HIVTP, LLaVA-1.5-7B: time to first token | -50 % | HIVTP | **-50 %**{rest}{static}",
        f"| HIVTP, LLaVA-1.5-7B: time to first token | -50 % | HIVTP 288 | not measured{rest} | -47.5 %{rest} |",
        f"| HIVTP, LLaVA-1.5-7B: throughput | +60.9 % | HIVTP | **+80 %**{rest}{static}",
        f"| HIVTP, LLaVA-1.5-7B: throughput | +60.9 % | HIVTP 288 | not measured{rest} | +10 %{rest} |",
        "| VisPruner, LLaVA-1.5-7B: latency, as time to first token | -75 % | VisPruner 128 | +25 %" + rest * 2
        + " | not measured |",
    ):  # fmt: skip
        assert line in lines


def test_models(results):
    lines = papers.models_table(results).splitlines()
    for line in (
        "| LLaVA-1.5-7B | 1 | unpruned | 576 | 40 ms | - | 30 ms | 50 | - | 200 | - | 15 GB | 0.323 GB | 8.58 TFLOP |",
        "| LLaVA-1.5-7B | 1 | hvprune HIVTP 288 | 288 | - | - | 15.8 ms (1.9x) | - | - | 220 (1.1x) | 0.4 % | 15 GB |"
        " 0.323 GB | 8.58 TFLOP |",
        "| LLaVA-1.5-7B | 1 | hvprune VisPruner 128 | 128 | 50 ms (0.8x) | - | - | 51 (1x) | - | - | 1.2 % | 15 GB |"
        " 0.323 GB | 8.58 TFLOP |",
    ):
        assert line in lines


def test_aims_show_the_worst_row(results):
    lines = papers.aims_table(results).splitlines()
    worst = "LLaVA-1.5-7B, B=1, hvprune VisPruner 128, eager"
    for line in (
        f"| pruning's share of the time to first token | below 1 % | +1.25 % | {worst} | no |",
        f"| time to first token against unpruned | below 0 % | +25 % | {worst} | no |",
        "| the tower with hooks against the stock tower | within 1 % | +0.5 % | LLaVA-1.5-7B, B=1, hooks | yes |",
        "| the tower with its last layer skipped | below 0 % | -4 % | LLaVA-1.5-7B, B=1, hooks, last layer skipped |"
        " yes |",
    ):
        assert line in lines


def test_without_a_gpu_nothing_is_claimed(results):
    for path in (results / "gpu").iterdir():
        path.unlink()
    assert papers.claims_table(results).count("| not measured |") == len(papers.CLAIMS)
    for make in (papers.models_table, papers.all_batches_table, papers.aims_table):
        assert make(results) == papers.NO_E2E_RESULTS
    assert "e2e-kept.png" not in [path.name for path in draw(results / "nothing")]


def test_two_rows_for_one_setting_are_refused(results):
    with pytest.raises(ValueError, match=r"results must have one row for .*, got 2"):
        papers.change_of([ROWS[0], ROWS[0]], "ttft_ms", "llava-1.5-7b", "unpruned", "eager", "1")


def test_budget_of_the_flops_claim():
    """By the formula, in a loop of its own."""

    def cost(n, d=4096, m=11008):
        return 32 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)

    (line,) = [line for line in papers.flops_table().splitlines() if " yes " in line and not line.startswith("| 32 ")]
    kept = int(line.split("|")[1])
    assert cost(kept) <= 0.09 * cost(576) < cost(kept + 1)


def test_pictures(results):
    names = {path.relative_to(results).as_posix() for path in draw(results)}
    assert {f"gpu/e2e-{what}.png" for what in ("kept", "stages", "batch")} <= names
