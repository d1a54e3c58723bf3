"""The rows of ``hvprune bench e2e``: each verified, then timed, then written to the CSV at once."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from hvprune import HIVTP
from hvprune.integrations.random_models import ARCHITECTURES, random_model

from ._pipelines import (
    Prompt,
    StaticLoop,
    Variant,
    cache_bytes,
    last_logits,
    load_photos,
    mark,
    milliseconds,
    recorded,
    variants,
    watched,
)
from ._results import ENVIRONMENT, Row, environment, read_csv, results_path, write_csv
from ._timing import machine_of
from .flops import prefill_flops, tower_flops

PHOTO_SIZES = {"Llava": (640, 480), "LlavaNext": (1000, 750)}
# Where the time to the first token goes. "select" is scoring, selection and gather, "merge" puts the image into the
# prompt (LLaVA-NeXT packs its tiles there), "rest" is what generate does around the model.
STAGES = ("tower", "select", "projector", "merge", "prefill", "rest")

COLUMNS = (
    "preset", "batch", "variant", "mode", "dtype", "photo", "text_tokens", "visual_tokens", "prompt_tokens",
    "ttft_ms", "ttft_p20_ms", "ttft_p80_ms", "split_ttft_ms", *(f"{stage}_ms" for stage in STAGES), "pruning_percent",
    "new_tokens", "generation_ms", "generation_p20_ms", "generation_p80_ms", "tokens_per_second",
    "peak_mb", "peak_extra_mb", "kv_cache_mb", "tower_gflop", "prefill_gflop", "transformers", *ENVIRONMENT,
)  # fmt: skip
TOWER_COLUMNS = ("preset", "batch", "tower", "dtype", "median_ms", "p20_ms", "p80_ms", "transformers", *ENVIRONMENT)


class Job(NamedTuple):
    """What is done in one go: "first" token, whole "generation" (captured rows do both at once) or "tower"."""

    kind: str
    batch: int
    variant: Variant | None = None
    mode: str = ""

    def __str__(self) -> str:
        return " ".join(
            ["batch", str(self.batch), self.mode, self.kind, *([self.variant.name] if self.variant else ())]
        )


class Suite:
    """The rows of a run and how they are made."""

    def __init__(self, arguments: argparse.Namespace, photos: list[Path], transformers_version: str):
        self.arguments, self.photos = arguments, photos
        self.device = torch.device(arguments.device)
        self.machine = machine_of(arguments.device)
        self.gpu = self.machine.type == "cuda"
        name = arguments.dtype or ("bfloat16" if self.gpu else "float32")
        self.dtype = getattr(torch, name)
        self.path = arguments.csv or results_path("e2e", arguments.device)
        self.facts = {"dtype": name, "transformers": transformers_version, **environment(arguments.device)}
        kept = arguments.keep
        self.rows: dict[tuple, Row] = {row_key(row): row for row in (read_csv(kept) if kept else ())}
        towers = read_csv(tower_path(kept)) if kept and tower_path(kept).exists() else ()
        self.towers: dict[tuple, Row] = {tower_key(row): row for row in towers}
        self.measured: list[Row] = []  # in this run
        self.failures = 0

    def run(self, preset: str, deadline: float | None) -> None:
        started = time.monotonic()
        self.preset, self.family = preset, ARCHITECTURES[preset][0]
        self.photo_size = PHOTO_SIZES[self.family]
        self.model, self.processor = random_model(preset, dtype=self.dtype, device=self.device)
        self.machine.synchronize()
        print(f"{preset}: random weights in {time.monotonic() - started:.1f} s", flush=True)
        # Every photo of LLaVA-NeXT's size makes five tiles.
        jobs = self.plan(variants(5 if self.family == "LlavaNext" else 1))
        with torch.no_grad():
            for i, job in enumerate(jobs):
                if deadline is not None and time.monotonic() > deadline:
                    print(f"time limit: {len(jobs) - i} of {len(jobs)} steps left out, from {job}", flush=True)
                    break
                started = time.monotonic()
                try:
                    getattr(self, f"measure_{job.kind}")(job)
                except Exception as error:  # the other rows are worth having
                    self.failures += 1
                    traceback.print_exc()
                    print(f"[{i + 1}/{len(jobs)}] {job}: NOT MEASURED: {error}", flush=True)
                    continue
                finally:
                    if self.gpu:
                        torch.cuda.empty_cache()
                took = time.monotonic() - started
                print(f"[{i + 1}/{len(jobs)}] {job}: {self._summary(job)} ({took:.1f} s)", flush=True)
        del self.model, self.processor

    def plan(self, variants: list[Variant]) -> list[Job]:
        """What is most wanted comes first, in case that the time ends: eager and captured before static, the batches in
        the order given, and long eager generations of the first variants before those of the others."""
        quick = self.arguments.quick
        wanted = [v for v in variants if any(word in v.name.lower() for word in self.arguments.methods)]
        wanted = wanted[:4] if quick else wanted
        modes = [mode for mode in self.arguments.modes if self.gpu or mode != "captured"]
        jobs, later, last = [], [], []
        for batch in self.arguments.batch[:1] if quick else self.arguments.batch:
            made = {
                (kind, mode): [Job(kind, batch, v, mode) for v in wanted if mode == "eager" or v.static]
                for kind in ("first", "generation")
                for mode in modes
            }
            long = made.get(("generation", "eager"), [])
            jobs += made.get(("first", "eager"), []) + made.get(("first", "captured"), [])
            jobs += [Job("tower", batch), *long[:5]]
            later += long[5:]
            last += made.get(("first", "static"), []) + made.get(("generation", "static"), [])
        return jobs + later + last

    # One job

    def measure_first(self, job: Job) -> None:
        with self._prompt(job) as prompt:
            if job.mode == "captured":
                return self._measure_captured(job, prompt)

            def first_token(*_):
                return prompt.generate(1, static=job.mode == "static")

            width, cache = self._verify(prompt, job.mode)
            row = self._row(job, prompt, width, cache_bytes(cache))
            del cache
            self._sample_first_token(row, first_token)
            row |= self._peak(first_token)
            self._keep(row)
            self._split(row, prompt, first_token)

    def measure_generation(self, job: Job) -> None:
        row = self.rows.get((self.preset, str(job.batch), job.variant.name, job.mode))
        if row is None or row not in self.measured:
            raise RuntimeError("its first token was not measured")
        with self._prompt(job) as prompt:
            static = job.mode == "static"
            prompt.generate(4, static=static)
            self._sample_generation(row, lambda: prompt.generate(self.arguments.new_tokens, static=static).sequences)

    def _measure_captured(self, job: Job, prompt) -> None:
        loops = []
        new_tokens, capture = self.arguments.new_tokens, self.machine.capture
        peak = self._peak(lambda: loops.append(StaticLoop(prompt, new_tokens, capture)))
        loop = loops.pop()
        verify_loop(prompt, loop)
        row = self._row(job, prompt, loop.ids.shape[1], cache_bytes(loop.cache)) | peak
        self._sample_first_token(row, loop.first_token)
        self._keep(row)
        self._sample_generation(row, loop.generate)
        del loop
        captured = []  # by a second pair of graphs, with the marks inside
        with watched(prompt.model, captured):
            marked = StaticLoop(prompt, new_tokens, capture, captured)

        def first_token(marks):
            marked.first_token()
            marks.extend(captured)

        self._split(row, prompt, first_token)

    def measure_tower(self, job: Job) -> None:
        """Stock, with attach's hooks alone, and with the layer after the features skipped too, in turns."""
        # HIVTP has the most hooks. Nothing is behind the last layer, so with its features nothing is skipped.
        method = HIVTP(num_tokens=64)
        towers = {"stock": (None, -2), "hooks": (method, -1), "hooks, last layer skipped": (method, -2)}
        samples = {name: [] for name in towers}
        config = self.model.config
        feature_layer = config.vision_feature_layer
        try:
            for turn in range(2 if self.arguments.quick else 6):
                for name, (method, layer) in towers.items():
                    config.vision_feature_layer = layer
                    with self._prompt(job._replace(variant=Variant(name, method))) as prompt:
                        marks = []
                        with watched(self.model, marks):
                            for _ in range(2 if turn else 4):
                                marks.clear()
                                self.machine.synchronize()
                                prompt.core.get_image_features(**prompt.vision, return_dict=True)
                                self.machine.synchronize()
                                samples[name].append(milliseconds(marks)["tower"] / 1e3)
        finally:
            config.vision_feature_layer = feature_layer
        for name, seconds in samples.items():
            times = dict(zip(("median_ms", "p20_ms", "p80_ms"), quantiles(seconds[2:]), strict=True))
            row = {"preset": self.preset, "batch": str(job.batch), "tower": name} | times | self.facts
            self.towers[tower_key(row)] = row
        self._write()

    # The parts of a job

    def _prompt(self, job: Job):
        photos = load_photos(self.photos, self.photo_size, job.batch)
        return Prompt.opened(self.model, self.processor, job.variant, photos, self.arguments.text_tokens)

    def _verify(self, prompt, mode: str):
        """(prompt tokens, cache) of a first token whose embeddings are those by hand."""
        with recorded(self.model) as seen:
            result = prompt.generate(1, static=mode == "static")
        (embeds,) = seen
        assert prompt.text_tokens == self.arguments.text_tokens, f"{prompt.text_tokens} tokens of text in the prompt"
        if prompt.variant.released:
            check_released(prompt, embeds)
        else:
            check_prompt(embeds, prompt.by_hand())
        length = int(result.past_key_values.get_seq_length())
        assert length == embeds.shape[1], f"{length} tokens in the cache after a prompt of {embeds.shape[1]}"
        return length, result.past_key_values

    def _row(self, job: Job, prompt, width: int, kv_bytes: int) -> Row:
        config, text = self.model.config, self.model.config.get_text_config()
        layers = len(prompt.core.vision_tower.encoder.layers) - (prompt.handle is not None)
        images = prompt.vision["pixel_values"].flatten(0, -4).shape[0]
        row = {
            "preset": self.preset, "batch": str(job.batch), "variant": job.variant.name, "mode": job.mode,
            "photo": "{}x{}".format(*self.photo_size), "text_tokens": str(prompt.text_tokens),
            "visual_tokens": str(width - prompt.text_tokens), "prompt_tokens": str(width),
            "kv_cache_mb": number(kv_bytes / 1e6),
            "tower_gflop": number(tower_flops(config.vision_config, images, layers) / 1e9),
            "prefill_gflop": number(prefill_flops(text, job.batch, width) / 1e9),
        }  # fmt: skip
        return row | self.facts

    def _keep(self, row) -> None:
        self.rows[row_key(row)] = row
        self.measured.append(row)
        self._write()

    def _sample_first_token(self, row, call: Callable) -> None:
        quick = self.arguments.quick
        self._sample(call, 1, 2, 0.5)
        seconds = self._sample(call, 3, 3 if quick else 10, 1.0)
        row.update(zip(("ttft_ms", "ttft_p20_ms", "ttft_p80_ms"), quantiles(seconds), strict=True))

    def _sample_generation(self, row, call: Callable) -> None:
        shape = tuple(call().shape) if row["mode"] == "captured" else None  # the others are warm
        seconds = self._sample(call, 1, 1 if self.arguments.quick else 3, 3.0)
        assert shape in (None, (int(row["batch"]), self.arguments.new_tokens)), f"{shape} tokens"
        row.update(zip(("generation_ms", "generation_p20_ms", "generation_p80_ms"), quantiles(seconds), strict=True))
        row["new_tokens"] = str(self.arguments.new_tokens)
        tokens = int(row["batch"]) * self.arguments.new_tokens
        row["tokens_per_second"] = number(tokens / float(row["generation_ms"]) * 1e3)
        self._write()

    def _split(self, row, prompt, call: Callable) -> None:
        """Medians of each stage, from runs apart: the marks may cost time, and split_ttft_ms tells how much."""
        runs, marks = [], []

        def once():
            marks.clear()
            mark(marks, "rest", self.device)
            call(marks)
            mark(marks, "end", self.device)

        with watched(self.model, marks):
            for _ in range(2 if self.arguments.quick else 5):
                self.machine.synchronize()
                once()
                self.machine.synchronize()
                runs.append(milliseconds(marks))
        for stage in STAGES:
            row[f"{stage}_ms"] = quantiles([run[stage] / 1e3 for run in runs])[0]
        row["split_ttft_ms"] = quantiles([sum(run.values()) / 1e3 for run in runs])[0]
        if prompt.variant.method is not None:
            shares = sorted(100 * run["select"] / sum(run.values()) for run in runs)
            row["pruning_percent"] = number(shares[len(shares) // 2])
        self._write()

    def _sample(self, call: Callable, least: int, most: int, budget: float) -> list[float]:
        """Seconds per call, waiting for the device: ``least`` calls, more up to ``most`` or ``budget`` seconds."""
        seconds: list[float] = []
        while len(seconds) < least or (len(seconds) < most and sum(seconds) < budget):
            self.machine.synchronize()
            start = time.perf_counter()
            result = call()
            self.machine.synchronize()
            seconds.append(time.perf_counter() - start)
            del result
        return seconds

    def _peak(self, call: Callable) -> dict[str, str]:
        """Memory that the call adds at its highest point, and that with the weights."""
        weights = sum(x.nbytes for x in (*self.model.parameters(), *self.model.buffers())) / 1e6
        extra = self.machine.peak_extra_mb(call)
        return {"peak_mb": number(weights + extra), "peak_extra_mb": number(extra)}

    def _write(self) -> None:
        write_csv(self.path, COLUMNS, self.rows.values())
        if self.towers:
            write_csv(tower_path(self.path), TOWER_COLUMNS, self.towers.values())

    def _summary(self, job: Job) -> str:
        if job.kind == "tower":
            where = (self.preset, str(job.batch))
            return ", ".join(f"{key[2]} {row['median_ms']} ms" for key, row in self.towers.items() if key[:2] == where)
        row = self.rows[self.preset, str(job.batch), job.variant.name, job.mode]
        rate = f", {row['tokens_per_second']} tokens/s" if "tokens_per_second" in row else ""
        return f"{row['visual_tokens']} visual tokens, first token {row['ttft_ms']} ms{rate}"


def row_key(row: Row) -> tuple[str, ...]:
    return row["preset"], row["batch"], row["variant"], row["mode"]


def tower_key(row: Row) -> tuple[str, ...]:
    return row["preset"], row["batch"], row["tower"]


def tower_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_tower.csv")


def number(value: float) -> str:
    return f"{value:.5g}"


def quantiles(seconds: list[float]) -> tuple[str, str, str]:
    """Median, 20th and 80th percentile in milliseconds."""
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return tuple(number(value * 1e3) for value in torch.tensor(seconds, dtype=torch.float64).quantile(levels).tolist())


def check_prompt(embeds: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit."""
    assert embeds.shape == expected.shape, f"a prompt of {tuple(embeds.shape)}, by hand it is {tuple(expected.shape)}"
    differ = (embeds != expected).any(-1).sum().item()
    assert not differ, f"{differ} of {embeds.shape[:-1].numel()} tokens of the prompt are not those by hand"


def check_released(prompt, embeds: torch.Tensor) -> None:
    """The released selection has its own rounding; here only its counts matter, the other benchmarks verify it."""
    visual, method = embeds.shape[1] - prompt.text_tokens, prompt.variant.method
    if method.num_tokens is None:
        assert 252 <= visual <= 288, f"{visual} visual tokens kept by HIVTP"
    else:
        tiles = prompt.vision["pixel_values"].flatten(0, -4).shape[0] // prompt.batch
        assert visual == tiles * method.num_tokens, f"{visual} visual tokens kept"


def verify_loop(prompt, loop) -> None:
    """The prompt equals the one by hand; the first and last logits are no further from those of one plain pass over the
    whole sequence than twice what PyTorch's rounding makes of computing that in another way, plus one rounding."""
    prompt.generate(1)  # by_hand wants the selection
    tokens = loop.generate()
    check_prompt(loop.embeds, prompt.by_hand())
    lengths = set(loop.lengths.tolist())
    assert lengths == {loop.ids.shape[1] + loop.new_tokens - 1}, f"{lengths} tokens in the cache"
    answer = prompt.model.get_input_embeddings()(tokens[:, :-1])
    for step, embeds, logits in (
        ("first", loop.embeds, loop.first_logits),
        ("last", torch.cat([loop.embeds, answer], 1), loop.logits),
    ):
        plain = last_logits(prompt.model, embeds).float()
        noise = (last_logits(prompt.model, embeds, otherwise=True).float() - plain).norm().item()
        limit = 2 * noise + torch.finfo(logits.dtype).eps * plain.norm().item()
        error = (logits.float() - plain).norm().item()
        assert error <= limit, f"logits of the {step} token are off by {error:.3g} (norm), limit {limit:.3g}"
