"""The READMEs show the committed benchmark results and nothing else."""

from __future__ import annotations

import csv
import re

import pytest

from hvprune.benchmarks import report

FACTS = {
    "peak_extra_mb": "", "device": "A processor", "instruction_set": "avx2", "threads": "2",
    "torch": "2.13.0", "commit": "abc1234", "date": "2026-01-02",
}  # fmt: skip
CASE = {"setting": "", "shape": "CLIP-L/14-336", "batch": "1", "dtype": "float32"}


def make_row(op, rival, median, **others):
    times = {"median_us": str(median), "p20_us": str(median), "p80_us": str(median)}
    return {"op": op, "rival": rival} | CASE | times | FACTS | others


ROWS = [
    make_row("hierarchical_select", "hvprune cpu", 8.25),
    make_row("hierarchical_select", "released", 1237.5),
    make_row("hierarchical_select", "plain PyTorch", 4.125),
    make_row("hierarchical_select", "hvprune cpu", 9.5, dtype="bfloat16"),
    make_row("gather_tokens", "hvprune cpu", 11.0, setting="call overhead", shape="4 tokens"),
    make_row("attention_importance", "hvprune cpu", 9000, setting="3 layers, all rows", peak_extra_mb="1.25"),
    make_row("attention_importance", "released", 27000, setting="3 layers, all rows", peak_extra_mb="190"),
]


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """A README with every table, and a folder of results to fill them from."""
    (tmp_path / "cpu").mkdir()
    with (tmp_path / "cpu" / "micro.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    results = report.load_results(tmp_path)
    monkeypatch.setattr(report, "load_results", lambda: results)
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


def test_tables_hold_the_numbers_of_the_csv(readme):
    assert report.main([], (readme,)) == 0
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    for line in (
        "| `hierarchical_select` | CLIP-L/14-336 | 1 | 8.25 µs | 1.24 ms (150x) | 4.12 µs (0.5x) |",  # losing rows too
        "| `hierarchical_select` | CLIP-L/14-336 | 1 | 8.25 µs | - | 9.5 µs |",
        "| `gather_tokens` | 11 µs |",
        "| `hierarchical_select` against released | at least 100x | 150x | yes |",
        "| `attention_importance`, 3 layers, against released | at least 5x | 3x | no |",
        "| `attention_importance`, peak extra memory | below 4 MB | 1.25 MB | yes |",
        "| `vispruner_select`, K=128, against released | at least 8x | - | not measured |",
        "| the slowest call on tiny inputs | below 10 µs | 11 µs | no |",
        "Measured on A processor (avx2, 2 threads) with torch 2.13.0 at commit abc1234 on 2026-01-02.",
    ):
        assert line in lines


def test_check_refuses_an_edited_number(readme):
    assert report.main(["--check"], (readme,)) == 1
    report.main([], (readme,))
    assert report.main(["--check"], (readme,)) == 0
    readme.write_text(readme.read_text().replace("8.25", "7.25"))
    assert report.main(["--check"], (readme,)) == 1
    assert "7.25" in readme.read_text()


def test_without_results_the_readme_says_so(readme, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "load_results", lambda: None)
    report.main([], (readme,))
    assert readme.read_text().count(report.NO_RESULTS) == len(report.TABLES)


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
        report.render(text, None)


def test_two_rows_for_one_case_are_refused():
    with pytest.raises(ValueError, match=r"results must have one row for .*, got 2"):
        report.speed_table(report.Results([ROWS[0], ROWS[0]]))
