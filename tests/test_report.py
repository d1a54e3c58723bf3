"""The READMEs show the committed benchmark results and nothing else."""

from __future__ import annotations

import re

import pytest

from hvprune.benchmarks import papers, report
from hvprune.benchmarks._results import write_csv
from hvprune.benchmarks.plot import draw

FACTS = {
    "peak_extra_mb": "", "of_floor": "", "note": "", "device": "A processor", "driver": "", "instruction_set": "avx2",
    "threads": "2", "torch": "2.13.0", "commit": "abc1234", "date": "2026-01-02",
}  # fmt: skip
CASE = {"setting": "", "shape": "CLIP-L/14-336", "batch": "1", "dtype": "float32"}


def make_row(op, rival, median, **others):
    times = {"device_us": "", "wall_us": str(median), "wall_p20_us": str(median), "wall_p80_us": str(median)}
    return {"op": op, "rival": rival} | CASE | times | FACTS | others


ROWS = [
    make_row("hierarchical_select", "hvprune cpu", 8.25, of_floor="15.9"),
    make_row("hierarchical_select", "released", 1237.5),
    make_row("hierarchical_select", "plain PyTorch", 4.125),
    make_row("hierarchical_select", "hvprune cpu", 9.5, dtype="bfloat16"),
    make_row("gather_tokens", "hvprune cpu", 11.0, setting="call overhead", shape="4 tokens"),
    make_row("attention_importance", "hvprune cpu", 9000, setting="3 layers, all rows", peak_extra_mb="1.25"),
    make_row("attention_importance", "released", 27000, setting="3 layers, all rows", peak_extra_mb="190"),
]


@pytest.fixture
def results(tmp_path):
    """A folder of results of a CPU."""
    folder = tmp_path / "benchmarks" / "results"
    write_csv(folder / "cpu" / "micro.csv", list(ROWS[0]), ROWS)
    return folder


@pytest.fixture
def readme(tmp_path):
    """A README with every table."""
    path = tmp_path / "README.md"
    markers = "".join(f"<!-- benchmark:begin {t} -->\n<!-- benchmark:end {t} -->\n" for t in report.TABLES)
    path.write_text(f"before\n{markers}after\n")
    return path


def test_readmes_equal_the_csv():
    assert report.main(["--check"]) == 0


def test_every_table_is_shown():
    shown = "".join(path.read_text() for path in report.READMES)
    assert set(re.findall(r"benchmark:begin (\S+)", shown)) == set(report.TABLES)


def test_no_time_is_typed_by_hand():
    generated = re.compile(r"<!-- benchmark:begin (\S+) -->.*?<!-- benchmark:end \1 -->", re.DOTALL)
    for path in report.READMES:
        by_hand = generated.sub("", path.read_text())
        assert not re.findall(r"\d\s?(?:µs|us|ms)\b|\d(?:x|×) (?:faster|the speed)", by_hand), path.name


def test_tables_hold_the_numbers_of_the_csv(readme, results):
    assert report.main([], (readme,), results) == 0
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    for line in (
        "| op | encoder | B | hvprune cpu | of floor | released | plain PyTorch |",
        "| `hierarchical_select` | CLIP-L/14-336 | 1 | 8.25 µs | 16x | 1.24 ms (150x) | 4.12 µs (0.5x) |",  # losing too
        "| `hierarchical_select` | CLIP-L/14-336 | 1 | 8.25 µs | - | 9.5 µs |",
        "| `gather_tokens` | 11 µs |",
        "| `hierarchical_select` against released | at least 100x | 150x | yes |",
        "| `attention_importance`, 3 layers, against released | at least 5x | 3x | no |",
        "| `attention_importance`, peak extra memory | below 4 MB | 1.25 MB | yes |",
        "| `vispruner_select`, K=128, against released | at least 8x | - | not measured |",
        "| the slowest call on tiny inputs | below 10 µs | 11 µs | no |",
        "Measured on A processor (avx2, 2 threads) with torch 2.13.0 at commit abc1234 on 2026-01-02.",
        report.NO_GPU_RESULTS,
        report.NO_PICTURES,
    ):
        assert line in lines


def test_results_of_a_gpu_have_tables(readme, results):
    facts = {"device": "A GPU", "driver": "580", "cuda": "13.0", "triton": "3.6.0", "dtype": "bfloat16"}
    rows = [
        make_row("gather_tokens", "released", 60, note="no CUDA graph: it waits", **facts),
        make_row("gather_tokens", "hvprune cuda", 30, device_us="3", of_floor="1.25", **facts),
        make_row("gather_tokens", "hvprune triton", 45, device_us="4.5", **facts),
        make_row("gather_tokens", "plain PyTorch", "", note="OutOfMemoryError: no memory", **facts),
    ]
    write_csv(results / "a-gpu" / "micro.csv", list(rows[0]), rows)
    assert report.main([], (readme,), results) == 0
    lines = readme.read_text().splitlines()
    measured = (
        "Measured on A GPU with torch 2.13.0, driver 580, CUDA 13.0, Triton 3.6.0 at commit abc1234 on 2026-01-02."
    )
    assert measured in lines and report.NO_GPU_RESULTS not in lines
    assert "| op | encoder | B | hvprune cuda | of floor | hvprune triton | released | plain PyTorch |" in lines
    row = "| `gather_tokens` | CLIP-L/14-336 | 1 | 3 µs | 1.2x | 4.5 µs (1.5x) | 60 µs\\* (20x) | - |"
    assert row in lines


def test_check_refuses_an_edited_number(readme, results):
    assert report.main(["--check"], (readme,), results) == 1
    report.main([], (readme,), results)
    assert report.main(["--check"], (readme,), results) == 0
    readme.write_text(readme.read_text().replace("8.25", "7.25"))
    assert report.main(["--check"], (readme,), results) == 1
    assert "7.25" in readme.read_text()


def test_check_refuses_a_picture_of_other_results(readme, results):
    paths = draw(results)
    assert [path.name for path in paths] == ["micro-floor.png", "micro-batch.png"]
    report.main([], (readme,), results)
    link = "![Multiple of the floor on A processor](benchmarks/results/cpu/micro-floor.png)"
    assert link in readme.read_text().splitlines()
    assert report.main(["--check"], (readme,), results) == 0
    table = results / "cpu" / "micro.csv"
    table.write_text(table.read_text().replace("8.25", "8.26"))
    assert report.main([], (readme,), results) == 1
    draw(results)
    assert report.main(["--check"], (readme,), results) == 0


def test_without_results_the_readme_says_so(readme, tmp_path):
    report.main([], (readme,), tmp_path / "nothing")
    text = readme.read_text()
    others = {report.NO_GPU_RESULTS: "gpu", report.NO_PICTURES: "pictures"}
    assert all(line in text for line in others)
    assert text.count(papers.NO_E2E_RESULTS) == len(papers.TABLES) - 2  # claims and FLOPs stand anyway
    assert text.count(report.NO_RESULTS) == len(set(report.TABLES) - set(others.values()) - set(papers.TABLES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmark:begin speeds --><!-- benchmark:end speeds -->", "one of .*'speed'.*, got .*speeds"),
        ("<!-- benchmark:begin speed --><!-- benchmark:end half -->", "a begin and an end of one"),
        ("<!-- benchmark:begin speed -->", "in pairs, got <!-- benchmark:begin speed --> alone"),
    ],
)
def test_bad_markers(text, message):
    with pytest.raises(ValueError, match=message):
        report.render(text, report.RESULTS)


def test_two_rows_for_one_case_are_refused():
    with pytest.raises(ValueError, match=r"results must have one row for .*, got 2"):
        report.speed_table(report.Results([ROWS[0], ROWS[0]]))
