"""The tables of ``hvprune bench e2e``: what the papers claim beside what was measured, and the aims of this project.

Numbers come from the committed CSV files of GPUs, and FLOPs from formulas; none is typed here but the claims.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from hvprune.integrations.random_models import ARCHITECTURES

from ._results import RESULTS, Row, committed, format_ratio, format_time, table
from .e2e import PRESETS
from .flops import prefill_flops, projector_flops, tower_flops, visual_prefill_macs

NO_E2E_RESULTS = "No end-to-end results from a GPU exist yet: `make gpu-e2e` writes them."
TITLES = {"llava-1.5-7b": "LLaVA-1.5-7B", "llava-1.5-13b": "LLaVA-1.5-13B", "llava-next-7b": "LLaVA-NeXT-7B"}
MODES = ("eager", "static", "captured")
BATCHES = ("1", "4", "16")
UNPRUNED = "unpruned"


class Claim(NamedTuple):
    """A published change in percent; ``column`` is what was measured for it, of each of ``variants``."""

    method: str
    what: str
    preset: str
    percent: float
    column: str
    variants: tuple[str, ...]


_HIVTP = {
    "llava-1.5-7b": ("hvprune HIVTP", "hvprune HIVTP 288"),
    "llava-next-7b": ("hvprune HIVTP", "hvprune HIVTP 1440"),
}
_VISPRUNER = tuple(f"hvprune VisPruner {kept}" for kept in (192, 128, 64, 32))
# The abstracts of arXiv 2509.23663 and 2412.01818. They do not say which latency; both are here.
CLAIMS = (
    Claim("HIVTP", "time to first token", "llava-1.5-7b", -50.0, "ttft_ms", _HIVTP["llava-1.5-7b"]),
    Claim("HIVTP", "time to first token", "llava-next-7b", -55.1, "ttft_ms", _HIVTP["llava-next-7b"]),
    Claim("HIVTP", "throughput", "llava-1.5-7b", 60.9, "tokens_per_second", _HIVTP["llava-1.5-7b"]),
    Claim("HIVTP", "throughput", "llava-next-7b", 47.3, "tokens_per_second", _HIVTP["llava-next-7b"]),
    Claim("VisPruner", "latency, as time to first token", "llava-1.5-7b", -75.0, "ttft_ms", _VISPRUNER),
    Claim("VisPruner", "latency, as time of the whole answer", "llava-1.5-7b", -75.0, "generation_ms", _VISPRUNER),
)
FLOPS_CLAIM = -91.0  # VisPruner, LLaVA-1.5-7B


def gpu_rows(results: Path, suite: str = "e2e") -> list[list[Row]]:
    """The rows of each GPU, those of whole models only."""
    tables = [rows for folder, rows in committed(suite, results).items() if folder != "cpu"]
    return [kept for rows in tables if (kept := [row for row in rows if row["preset"] in PRESETS])]


def claims_table(results: Path = RESULTS) -> str:
    """Each claim beside the change measured, per mode and batch; bold where the claim is met."""
    settings = [(mode, batch) for mode in ("eager", "captured") for batch in BATCHES]
    header = ["claim", "published", "measured with", *(f"{mode}, B={batch}" for mode, batch in settings)]
    texts = []
    for rows in gpu_rows(results):
        lines = []
        for claim in CLAIMS:
            for variant in claim.variants:
                cells = [_claim_cell(rows, claim, variant, *setting) for setting in settings]
                lines.append([_name(claim), percent(claim.percent), variant.removeprefix("hvprune "), *cells])
        texts += [environment_line(rows), "", table(header, lines), ""]
    if not texts:
        lines = [[_name(claim), percent(claim.percent), "not measured"] for claim in CLAIMS]
        texts = [table([*header[:2], "measured"], lines)]
    return "\n".join(texts).strip()


def _name(claim: Claim) -> str:
    return f"{claim.method}, {TITLES[claim.preset]}: {claim.what}"


def _claim_cell(rows: list[Row], claim: Claim, variant: str, mode: str, batch: str) -> str:
    change = change_of(rows, claim.column, claim.preset, variant, mode, batch)
    if change is None:
        return "not measured" if variant.split()[-1].isdigit() or mode == "eager" else "cannot be static"
    met = change >= claim.percent if claim.percent > 0 else change <= claim.percent
    return f"**{percent(change)}**" if met else percent(change)


def change_of(rows: list[Row], column: str, preset: str, variant: str, mode: str, batch: str) -> float | None:
    """Percent against the unpruned model in the same mode and batch."""
    found = [_value(rows, column, preset, name, mode, batch) for name in (variant, UNPRUNED)]
    return None if None in found else 100 * (found[0] / found[1] - 1)


def _value(rows: list[Row], column: str, preset: str, variant: str, mode: str, batch: str) -> float | None:
    wanted = {"preset": preset, "variant": variant, "mode": mode, "batch": batch}
    found = [row for row in rows if wanted.items() <= row.items()]
    if len(found) > 1:
        raise ValueError(f"results must have one row for {wanted}, got {len(found)}")
    return float(found[0][column]) if found and found[0][column] else None


def flops_table(results: Path = RESULTS) -> str:
    """FLOPs of LLaVA-1.5-7B by budget, and the largest budget that meets VisPruner's claim. Needs no measurement."""
    vision, text = _config("llava-1.5-7b")

    def visual(kept: int) -> float:
        return 100 * (visual_prefill_macs(text, kept) / visual_prefill_macs(text, 576) - 1)

    def whole(kept: int) -> int:
        tower = tower_flops(vision, 1, 24 if kept == 576 else 23)
        return tower + projector_flops(vision, text, kept) + prefill_flops(text, 1, kept + 40)

    least = max((kept for kept in range(577) if visual(kept) <= FLOPS_CLAIM), default=None)
    budgets = sorted({576, 288, 192, 128, 64, 32, least} - {None}, reverse=True)
    lines = []
    for kept in budgets:
        change, total = visual(kept), whole(kept)
        met = "yes" if change <= FLOPS_CLAIM else "no"
        lines.append(
            [str(kept), percent(change), met, f"{total / 1e12:.3g} TFLOP", percent(100 * (total / whole(576) - 1))]
        )
    claim = percent(FLOPS_CLAIM)
    return table(["visual tokens", "prefill of those", f"meets {claim}", "tower to first token", "change"], lines)


def _config(preset: str) -> tuple[SimpleNamespace, SimpleNamespace]:
    _, vision, text, vocabulary = ARCHITECTURES[preset]
    heads = {"num_key_value_heads": text["num_attention_heads"]} | text
    return (
        SimpleNamespace(image_size=336, patch_size=14, num_channels=3, **vision),
        SimpleNamespace(vocab_size=vocabulary, **heads),
    )


def models_table(results: Path = RESULTS, batches: tuple[str, ...] = ("1",)) -> str:
    """Time to first token and throughput of every variant, with the ratio to the unpruned model in the same mode."""
    header = ["model", "B", "variant", "visual tokens"]
    header += [f"first token, {mode}" for mode in MODES] + [f"tokens/s, {mode}" for mode in MODES]
    header += ["pruning's share", "peak memory", "KV cache", "FLOPs"]
    texts = []
    for rows in gpu_rows(results):
        lines = []
        for preset in PRESETS:
            for batch in batches:
                for variant in dict.fromkeys(r["variant"] for r in rows if r["preset"] == preset):
                    line = _model_line(rows, preset, batch, variant)
                    if line is not None:
                        lines.append([TITLES[preset], batch, variant, *line])
        texts += [environment_line(rows), "", table(header, lines), ""]
    return "\n".join(texts).strip() or NO_E2E_RESULTS


def _model_line(rows: list[Row], preset: str, batch: str, variant: str) -> list[str] | None:
    found = [r for r in rows if (r["preset"], r["batch"], r["variant"]) == (preset, batch, variant)]
    if not found:
        return None
    cells = []
    for column in ("ttft_ms", "tokens_per_second"):
        for mode in MODES:
            value, base = (_value(rows, column, preset, name, mode, batch) for name in (variant, UNPRUNED))
            if value is None:
                cells.append("-")
                continue
            faster = (
                "" if base is None or variant == UNPRUNED else value / base if column != "ttft_ms" else base / value
            )
            text = format_time(value * 1e3) if column == "ttft_ms" else f"{value:.3g}"
            cells.append(text + (f" ({format_ratio(faster)})" if faster else ""))
    first = found[0]
    shares = [float(row["pruning_percent"]) for row in found if row["pruning_percent"]]
    share = f"{max(shares):.2g} %" if shares else "-"
    flops = (float(first["tower_gflop"]) + float(first["prefill_gflop"])) / 1e3
    memory = [f"{float(first[name]) / 1e3:.3g} GB" for name in ("peak_mb", "kv_cache_mb")]
    return [first["visual_tokens"], *cells, share, *memory, f"{flops:.3g} TFLOP"]


def all_batches_table(results: Path = RESULTS) -> str:
    return models_table(results, BATCHES)


def aims_table(results: Path = RESULTS) -> str:
    """The worst row of each aim."""
    texts = []
    for rows, towers in zip(gpu_rows(results), _towers(results), strict=True):
        ours = [row for row in rows if row["variant"].startswith("hvprune")]
        shares = [(float(row["pruning_percent"]), row) for row in ours if row["pruning_percent"]]
        slower = []
        for row in ours:
            change = change_of(rows, "ttft_ms", row["preset"], row["variant"], row["mode"], row["batch"])
            if change is not None:
                slower.append((change, row))
        hooks = [(abs(_tower_change(towers, row)), row) for row in towers if row["tower"] == "hooks"]
        skipped = [(_tower_change(towers, row), row) for row in towers if row["tower"].endswith("skipped")]
        lines = [
            _aim("pruning's share of the time to first token", shares, "below 1 %", 1.0),
            _aim("time to first token against unpruned", slower, "below 0 %", 0.0),
            _aim("the tower with hooks against the stock tower", hooks, "within 1 %", 1.0),
            _aim("the tower with its last layer skipped", skipped, "below 0 %", 0.0),
        ]
        texts += [environment_line(rows), "", table(["aim", "wanted", "worst", "in", "reached"], lines), ""]
    return "\n".join(texts).strip() or NO_E2E_RESULTS


def _towers(results: Path) -> list[list[Row]]:
    """One table of towers, may be an empty one, for each GPU that has rows."""
    towers = {rows[0]["device"]: rows for rows in gpu_rows(results, "e2e_tower")}
    return [towers.get(rows[0]["device"], []) for rows in gpu_rows(results)]


def _tower_change(towers: list[Row], row: Row) -> float:
    where = {"preset": row["preset"], "batch": row["batch"], "tower": "stock"}
    (stock,) = (other for other in towers if where.items() <= other.items())
    return 100 * (float(row["median_ms"]) / float(stock["median_ms"]) - 1)


def _aim(name: str, found: list[tuple[float, Row]], wanted: str, limit: float) -> list[str]:
    if not found:
        return [name, wanted, "-", "-", "not measured"]
    value, row = max(found, key=lambda pair: pair[0])
    words = (TITLES[row["preset"]], f"B={row['batch']}", row.get("variant", row.get("tower")), row.get("mode", ""))
    return [name, wanted, percent(value), ", ".join(filter(None, words)), "yes" if value < limit else "no"]


def percent(value: float) -> str:
    return f"{value:+.3g} %" if abs(value) < 99.95 else f"{value:+.0f} %"


def environment_line(rows: list[Row]) -> str:
    facts = rows[0]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "driver", "cuda", "commit"))
    return (
        f"{facts['device']}, {facts['dtype']}, {facts['text_tokens']} text tokens, {_new_tokens(rows)} new tokens;"
        f" {versions}, {facts['date']}."
    )


def _new_tokens(rows: list[Row]) -> str:
    return "/".join(sorted({row["new_tokens"] for row in rows if row["new_tokens"]})) or "no"


# For report.py, each with what it says when there are no results.
TABLES = {
    "claims": claims_table,
    "flops": flops_table,
    "e2e": models_table,
    "e2e-batches": all_batches_table,
    "e2e-aims": aims_table,
}
