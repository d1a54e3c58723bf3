"""hvprune bench e2e on tiny models: its rows, its checks, and that it refuses what is wrong."""

from __future__ import annotations

import argparse
import csv

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hvprune import VisPruner
from hvprune.benchmarks import _pipelines, _suite, e2e
from hvprune.benchmarks._pipelines import Prompt, StaticLoop, Variant, load_photos, milliseconds, variants
from hvprune.benchmarks._results import ROOT
from hvprune.benchmarks._timing import Cpu
from hvprune.benchmarks.flops import prefill_flops, projector_flops, tower_flops, visual_prefill_macs
from hvprune.cli import main
from hvprune.integrations import llava
from hvprune.integrations.random_models import random_model

PHOTOS = sorted(ROOT.glob("examples/*.jpg"))
SIZES = {"tiny": (640, 480), "tiny-next": (1000, 750)}
GPU_ONLY = {"driver", "cuda", "triton"}


@pytest.fixture(scope="module")
def models():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield {name: random_model(name) for name in SIZES}
    torch.set_num_threads(threads)


def opened(models, preset, variant, batch=2, text_tokens=40):
    photos = load_photos(PHOTOS, SIZES[preset], batch)
    return Prompt.opened(*models[preset], variant, photos, text_tokens)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    e2e.add_parser(parser.add_subparsers())
    return parser.parse_args(["e2e", "--device", "cpu", *arguments])


def run(tmp_path, *arguments):
    """Exit status, rows and the tower's rows."""
    path = tmp_path / "e2e.csv"
    status = main(["bench", "e2e", "--device", "cpu", "--csv", str(path), *arguments])
    tables = [path, tmp_path / "e2e_tower.csv"]
    return status, *([*csv.DictReader(table.open(newline=""))] if table.exists() else [] for table in tables)


def test_quick_run(tmp_path, capsys):
    status, rows, towers = run(tmp_path, "--preset", "tiny", "--quick", "--new-tokens", "4")
    assert status == 0, capsys.readouterr().out
    eager = ["unpruned", "hvprune HIVTP", "hvprune VisPruner 128", "hvprune HIVTP 288"]
    assert [(row["mode"], row["variant"]) for row in rows] == [
        *[("eager", name) for name in eager],
        *[("static", name) for name in eager if name != "hvprune HIVTP"],
    ]
    for row in rows:
        empty = {name for name, value in row.items() if not value}
        assert empty == GPU_ONLY | ({"pruning_percent"} if row["variant"] == "unpruned" else set())
        visual, prompt = int(row["visual_tokens"]), int(row["prompt_tokens"])
        assert prompt == visual + 40 and row["text_tokens"] == "40" and row["new_tokens"] == "4"
        words = row["variant"].split()
        if words[-1].isdigit() or words == ["unpruned"]:
            assert visual == (576 if words == ["unpruned"] else int(words[-1]))
        else:
            assert 252 <= visual <= 288
        allocated = prompt + (row["mode"] == "static")
        assert float(row["kv_cache_mb"]) == pytest.approx(2 * 2 * allocated * 64 * 4 / 1e6, rel=1e-4)
        stages = sum(float(row[f"{stage}_ms"]) for stage in _suite.STAGES)
        assert stages == pytest.approx(float(row["split_ttft_ms"]), rel=0.3)
        assert 0 < float(row["ttft_p20_ms"]) <= float(row["ttft_ms"]) <= float(row["ttft_p80_ms"])
        assert float(row["tokens_per_second"]) == pytest.approx(4000 / float(row["generation_ms"]), rel=1e-3)
    assert [row["tower"] for row in towers] == ["stock", "hooks", "hooks, last layer skipped"]


@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize("variant", [Variant("unpruned"), Variant("VisPruner", VisPruner(40))], ids=lambda v: v.name)
def test_static_loop_equals_generate(models, preset, variant):
    with torch.no_grad(), opened(models, preset, variant, batch=1 if preset == "tiny-next" else 2) as prompt:
        expected = prompt.generate(6).sequences[:, -6:]
        loop = StaticLoop(prompt, 6, None)
        for _ in range(2):  # again, on the same buffers
            assert torch.equal(loop.generate(), expected)
            assert loop.first_token() == expected[:, :1].tolist()
        _suite.verify_loop(prompt, loop)


@pytest.mark.parametrize("preset", SIZES)
def test_every_variant_is_verified(models, preset):
    """By hand, bit for bit; the names say what is kept of a photo."""
    tiles = 5 if preset == "tiny-next" else 1
    names = set()
    for variant in variants(tiles):
        with torch.no_grad(), opened(models, preset, variant, batch=1 if tiles == 5 else 2) as prompt:
            suite = _suite.Suite(parse(), PHOTOS, "")
            suite.model = prompt.model
            width, _ = suite._verify(prompt, "eager")
            newlines = 36 if preset == "tiny-next" and not variant.released else 0
            if variant.name.split()[-1].isdigit():
                assert width == 40 + int(variant.name.split()[-1]) + newlines
        names.add(variant.name)
    assert len(names) == (9 if tiles == 1 else 7)


def break_rows(monkeypatch):
    right = llava.gather
    monkeypatch.setattr(llava, "gather", lambda features, indices: right(features, indices).roll(1, 1))


def break_count(monkeypatch):
    right = llava.PrunedLlava._patch_processor

    def one_less(handle, processor):
        right(handle, processor)
        processor.num_additional_image_tokens -= 1

    monkeypatch.setattr(llava.PrunedLlava, "_self_check", lambda *_: None)
    monkeypatch.setattr(llava.PrunedLlava, "_patch_processor", one_less)


def break_selection(monkeypatch):
    right = llava.PrunedLlava._select
    monkeypatch.setattr(llava.PrunedLlava, "_select", lambda self, call, q, k, x: right(self, call, k, q, x))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (break_rows, "40 of 80 tokens of the prompt are not those by hand"),
        (break_count, "image placeholders of the prompts must be"),
        (break_selection, "the kept tokens differ from those by hand"),
    ],
)
def test_a_wrong_prompt_is_noticed(models, monkeypatch, mistake, message):
    mistake(monkeypatch)
    suite = _suite.Suite(parse(), PHOTOS, "")
    suite.model = models["tiny"][0]
    with (
        torch.no_grad(),
        opened(models, "tiny", Variant("VisPruner", VisPruner(40)), batch=1) as prompt,
        pytest.raises((AssertionError, ValueError), match=message),
    ):
        suite._verify(prompt, "eager")


def test_a_wrong_row_is_not_in_the_csv(tmp_path, monkeypatch, capsys):
    break_rows(monkeypatch)
    arguments = ["--preset", "tiny", "--new-tokens", "2", "--modes", "eager", "--quick", "--methods", "vispruner"]
    status, rows, _ = run(tmp_path, *arguments)
    assert status == 1
    assert capsys.readouterr().out.count("are not those by hand") == 3
    assert {row["variant"] for row in rows} == {"released VisPruner 128"}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("stale features", "80 of 160 tokens of the prompt are not those by hand"),
        ("position", "logits of the last token are off by"),
        ("cache length", "tokens in the cache"),
    ],
)
def test_a_wrong_loop_is_refused(models, mistake, message):
    with torch.no_grad(), opened(models, "tiny", Variant("VisPruner", VisPruner(40))) as prompt:
        loop = StaticLoop(prompt, 6, None)
        loop.generate()
        if mistake == "stale features":
            loop.features = loop.features.roll(1, 0)
            loop.encode = lambda: None
        elif mistake == "position":
            loop.decode = lambda: (loop.position.add_(7), loop._decode())
        else:
            loop.decode = lambda: (loop.lengths.sub_(1), loop._decode())
        with pytest.raises(AssertionError, match=message):
            _suite.verify_loop(prompt, loop)


class PretendedGpu(Cpu):
    """A CPU that captures: the step runs a few times beforehand, as on a GPU, and a replay leaves no marks."""

    type = "cuda"

    def capture(self, step):
        for _ in range(2):
            step()
        result = step()

        def replay():
            with pytest.MonkeyPatch.context() as context:
                context.setattr(_pipelines, "mark", lambda *_: None)
                step()

        return replay, result


@pytest.mark.parametrize(
    ("preset", "batch", "kept"),
    [
        ("tiny", 2, {"hvprune HIVTP 288": 288}),
        ("tiny-next", 1, {"unpruned": 2340}),
    ],
)
def test_captured_rows(tmp_path, monkeypatch, capsys, preset, batch, kept):
    """The plan of a GPU, in bfloat16. The stages come from the marks made in capturing (LLaVA-NeXT's encoder is eager),
    each once and in order."""
    monkeypatch.setattr(_suite, "machine_of", lambda device: PretendedGpu())
    seen = []
    monkeypatch.setattr(_suite, "milliseconds", lambda marks: seen.append([*marks]) or milliseconds(marks))
    arguments = ["--preset", preset, "--batch", str(batch), "--new-tokens", "4", "--quick", "--modes", "captured"]
    status, rows, _ = run(tmp_path, *arguments, "--methods", "unpruned" if "unpruned" in kept else "hivtp")
    assert status == 0, capsys.readouterr().out
    assert {row["variant"]: int(row["visual_tokens"]) for row in rows} == kept
    for row in rows:
        assert row["dtype"] == "bfloat16" and row["mode"] == "captured"
        assert all(row[name] for name in set(row) - GPU_ONLY - {"pruning_percent"})
        allocated = batch * (int(row["visual_tokens"]) + 40 + 4)
        assert float(row["kv_cache_mb"]) == pytest.approx(2 * 2 * allocated * 64 * 2 / 1e6, rel=1e-4)
    stages = ["rest", "tower", "select", "projector", "merge", "prefill", "rest", "end"]
    split = [[stage for stage, _ in marks] for marks in seen if marks[0][0] == "rest"]
    assert split == [stages] * (2 * len(kept))


def test_a_failing_step_leaves_the_other_rows(tmp_path, monkeypatch, capsys):
    right = Prompt.generate

    def generate(prompt, new_tokens, static=False, **options):
        if static:
            raise RuntimeError("no static caches today")
        return right(prompt, new_tokens, static=static, **options)

    monkeypatch.setattr(Prompt, "generate", generate)
    status, rows, _ = run(tmp_path, "--preset", "tiny", "--new-tokens", "2", "--quick", "--methods", "unpruned")
    assert status == 1
    assert [row["mode"] for row in rows] == ["eager"] and rows[0]["tokens_per_second"]
    printed = capsys.readouterr().out
    assert "static first unpruned: NOT MEASURED: no static caches today" in printed


def test_rows_of_an_earlier_run_stay(tmp_path):
    arguments = ["--preset", "tiny", "--new-tokens", "2", "--quick", "--modes", "eager", "--methods"]
    _, first, _ = run(tmp_path, *arguments, "unpruned")
    (tmp_path / "second").mkdir()
    _, both, towers = run(tmp_path / "second", *arguments, "vispruner", "--keep", str(tmp_path / "e2e.csv"))
    assert both[:1] == first and [row["variant"] for row in both[1:]] == [
        "hvprune VisPruner 128", "released VisPruner 128", "hvprune VisPruner 192", "hvprune VisPruner 64",
    ]  # fmt: skip
    assert len(towers) == 3


def test_the_most_wanted_rows_come_first():
    suite = _suite.Suite(parse(), PHOTOS, "")
    jobs = suite.plan(variants(1))
    assert len(jobs) == len(set(jobs)) == 3 * (2 * 9 + 2 * 6 + 1)
    batches = [job.batch for job in jobs[: 3 * 15]]
    assert batches == sorted(batches, key=[1, 16, 4].index) and {job.mode for job in jobs[: 3 * 15]} == {"eager", ""}
    assert {job.mode for job in jobs[-3 * 12 :]} == {"static"}


def test_time_limit(tmp_path, capsys):
    status, rows, _ = run(tmp_path, "--preset", "tiny", "--time-limit", "0")
    assert status == 1 and not rows
    assert "steps left out, from batch 1 eager first unpruned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new-tokens", "1"], "--new-tokens must be at least 2, got 1"),
        (["--text-tokens", "6"], "--text-tokens must be at least 7, got 6"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--photos", "no.jpg"], "--photos must be a file, got no.jpg"),
        (["--keep", "no.csv"], "--keep must be a file, got no.csv"),
    ],
)
def test_arguments_that_do_not_work(tmp_path, capsys, arguments, message):
    assert run(tmp_path, "--preset", "tiny", *arguments) == (2, [], [])
    assert message in capsys.readouterr().err


def test_stages_add_up():
    marks = [("rest", 0.0), ("tower", 1.0), ("select", 3.0), ("tower", 4.0), ("select", 4.5), ("end", 5.0)]
    assert milliseconds(marks) == {"rest": 1000.0, "tower": 2500.0, "select": 1500.0}


def counted(call) -> int:
    """What PyTorch counts, less the angles of rotary embeddings, which transformers 5.17 makes by a matrix product."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    angles = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


def test_flops_equal_those_of_the_counter(models):
    model, _ = models["tiny"]
    config, text = model.config, model.config.get_text_config()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    pixels = torch.zeros(2, 3, 336, 336)
    assert tower_flops(config.vision_config, 2, 12) == counted(lambda: tower(pixels))
    layer = tower.encoder.layers[-1]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        assert tower_flops(config.vision_config, 2, 11) == counted(lambda: tower(pixels))
    finally:
        del layer.forward
    rows = torch.zeros(2, 50, 64)
    assert projector_flops(config.vision_config, text, 100) == counted(lambda: projector(rows))
    assert prefill_flops(text, 2, 50) == counted(lambda: model(inputs_embeds=rows, logits_to_keep=1))


@pytest.mark.parametrize(("kept", "percent"), [(288, 50.7), (192, 67.3), (128, 78.3), (64, 89.2), (32, 94.6)])
def test_flops_as_the_papers_count_them(kept, percent):
    from transformers import LlamaConfig

    text = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    assert 100 * (1 - visual_prefill_macs(text, kept) / visual_prefill_macs(text, 576)) == pytest.approx(
        percent, abs=0.05
    )
