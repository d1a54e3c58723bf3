"""From photos and a question to tokens: the stock model, pruned by hvprune, pruned as released, with static shapes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

import hvprune
from hvprune import HIVTP, VisPruner

from .baselines import (
    released_cls_attention,
    released_gather_tokens,
    released_hierarchical_select,
    released_mean_attention,
    released_vispruner_select,
)

_PREFIX = 1  # CLIP's CLS token


@dataclass(frozen=True)
class Variant:
    """A row of the tables. ``static``: the count does not depend on the image, and no step waits for the device."""

    name: str
    method: HIVTP | VisPruner | None = None
    released: bool = False

    @property
    def static(self) -> bool:
        return not self.released and (self.method is None or self.method.num_tokens is not None)


def variants(tiles: int) -> list[Variant]:
    """The rows for a model that makes this many tiles of a photo (1: LLaVA-1.5), the most wanted ones first.

    A name counts the tokens of all tiles, before the newline tokens that LLaVA-NeXT adds. The released HIVTP cannot
    run on LLaVA-NeXT.
    """
    budgets = (192, 128, 64, 32) if tiles == 1 else (128, 64, 32)
    ratios = {64: 0.75}  # the published one; else 0.5
    pruners = {budget: VisPruner(budget, ratios.get(budget, 0.5)) for budget in budgets}
    middle = 128 if tiles == 1 else 64
    half = HIVTP(num_tokens=288)  # the most that the natural mode keeps of 576
    made = [
        Variant("unpruned"),
        Variant("hvprune HIVTP", HIVTP()),
        Variant(f"hvprune VisPruner {tiles * middle}", pruners.pop(middle)),
        Variant(f"hvprune HIVTP {tiles * 288}", half),
    ]
    if tiles == 1:
        made.append(Variant("released HIVTP", HIVTP(), released=True))
    made.append(Variant(f"released VisPruner {tiles * middle}", made[2].method, released=True))
    made += [Variant(f"hvprune VisPruner {tiles * budget}", method) for budget, method in pruners.items()]
    return made


def load_photos(paths: list[Path], size: tuple[int, int], count: int) -> list[Image.Image]:
    """``count`` photos cut and scaled to ``size``, the given ones in turn."""
    photos = [ImageOps.fit(Image.open(path).convert("RGB"), size) for path in paths]
    return [photos[i % len(photos)] for i in range(count)]


_BEFORE, _AFTER = "USER: ", "\nWhat is in this picture, and what is odd about it? Answer in a few words. "
LEAST_TEXT_TOKENS = len(_BEFORE) + 1


def ask(processor, photos: list[Image.Image], text_tokens: int) -> dict[str, Tensor]:
    """Model inputs: every photo with exactly ``text_tokens`` tokens of text around it (the tokenizer is byte-level)."""
    question = (_AFTER * (text_tokens // len(_AFTER) + 1))[: text_tokens - len(_BEFORE)]
    text = [f"{_BEFORE}{processor.image_token}{question}"] * len(photos)
    return dict(processor(images=photos, text=text, return_tensors="pt"))


class Prompt:
    """Photos and question of one variant, on the device, for a model that is ready to answer them.

    Everything that a variant changes in the model lasts as long as ``opened``.
    """

    def __init__(self, model, variant: Variant, inputs: dict[str, Tensor], handle):
        self.model, self.variant, self.inputs, self.handle = model, variant, inputs, handle
        self.core = model.model
        ids = inputs["input_ids"]
        places = (ids == model.config.image_token_id)[0].nonzero().flatten().tolist()
        self.first, self.placeholders = places[0], len(places)
        self.text_tokens = ids.shape[1] - len(places)
        self.vision = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
        self.batch = len(ids)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, model, processor, variant: Variant, photos, text_tokens: int) -> Iterator[Prompt]:
        with contextlib.ExitStack() as stack:
            handle = None
            if variant.released:
                tower = model.model.vision_tower
                stack.callback(tower.set_attn_implementation, tower.config._attn_implementation)
                tower.set_attn_implementation("eager")
            elif variant.method is not None:
                handle = stack.enter_context(hvprune.attach(model, variant.method, processor=processor))
            inputs = ask(processor, photos, text_tokens)
            inputs = {
                name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in inputs.items()
            }
            yield cls(model, variant, inputs, handle)

    def generate(self, new_tokens: int, static: bool = False, **options):
        """``new_tokens`` tokens of every row, greedily. Returns transformers' dictionary."""
        length = self.inputs["input_ids"].shape[1] + new_tokens
        # A new cache in every call, as generate would make it: its own remembers the longest one.
        config = self.model.config
        cache = StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
        inputs = self.released_inputs() if self.variant.released else self.inputs
        return self.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            disable_compile=True,
            return_dict_in_generate=True,
            **options,
        )

    def released_inputs(self) -> dict[str, Tensor]:
        """The released way to the language model: eager attention in the tower, all maps and hidden states kept."""
        method, tower, projector = self.variant.method, self.core.vision_tower, self.core.multi_modal_projector
        keep_all = {"output_hidden_states": True, "output_attentions": True}
        pixels = self.vision["pixel_values"]
        if isinstance(method, HIVTP):
            images = []
            for image in pixels:  # the released code takes one image at a time
                output = tower(image[None], **keep_all)
                scores = released_mean_attention([output.attentions[layer] for layer in method.layers], _PREFIX)
                side = round(scores.shape[1] ** 0.5)
                kept = released_hierarchical_select(scores[0], (side, side))
                images.append(projector(output.hidden_states[-2][:, _PREFIX:][:, kept])[0])
        else:
            output = tower(pixels.flatten(0, -4), **keep_all)
            features = output.hidden_states[-2][:, _PREFIX:]
            importance = released_cls_attention([output.attentions[-2]], _PREFIX)
            mask = released_vispruner_select(features, importance, method.num_tokens, method.important_ratio)
            kept = projector(released_gather_tokens(features, mask))
            images = list(kept.reshape(self.batch, -1, kept.shape[-1]))  # LLaVA-NeXT: no newline tokens, as released
        embeds, mask = self.splice(images)
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def splice(self, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """inputs_embeds and attention_mask with images[i] (K, D) in the text of row i, padded on the left."""
        ids, embed = self.inputs["input_ids"], self.model.get_input_embeddings()
        before, after = ids[:, : self.first], ids[:, self.first + self.placeholders :]
        rows = [
            torch.cat([embed(left), image, embed(right)])
            for left, image, right in zip(before, images, after, strict=True)
        ]
        width = max(map(len, rows))
        pad = embed(ids.new_full((1,), self.model.config.get_text_config().pad_token_id))
        embeds = torch.stack([torch.cat([pad.expand(width - len(row), -1), row]) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
        return embeds, mask

    # What the language model must get, from the stock model and plain indexing

    def by_hand(self) -> Tensor:
        """inputs_embeds of this variant made by hand. AssertionError if the kept tokens are not those of the method."""
        found = self.inputs["input_ids"] == self.model.config.image_token_id
        assert found[:, self.first : self.first + self.placeholders].all(), "text between the placeholders of a photo"
        assert found.sum().item() == self.batch * self.placeholders, "rows that differ in their placeholders"
        pixels = self.vision["pixel_values"].flatten(0, -4)
        tower = self.core.vision_tower
        hidden_states = tower(pixels, output_hidden_states=True).hidden_states
        features = hidden_states[-2][:, _PREFIX:]
        if self.variant.method is None:
            images = self._pack(self.core.multi_modal_projector(features), None)
        else:
            selection, method = self.handle.last_selection, self.variant.method
            if not self.tiled:
                expected = self._select_by_hand(hidden_states, features)
                assert torch.equal(selection.indices, expected.indices), "the kept tokens differ from those by hand"
            self._check_counts(selection)
            if method.num_tokens is None and not self.tiled:
                rows = self.core.multi_modal_projector(features[selection.mask][None])[0]
                images = list(rows.split(selection.counts.tolist()))
            else:
                width = features.shape[-1]
                index = selection.indices.clamp(min=0)[..., None].expand(-1, -1, width)
                images = self._pack(self.core.multi_modal_projector(features.gather(1, index)), selection)
        return self.splice(images)[0]

    @property
    def tiled(self) -> bool:
        return "image_sizes" in self.vision

    def _select_by_hand(self, hidden_states, features):
        """LLaVA-1.5: Q and K computed again from the hidden states."""
        layers, method = self.core.vision_tower.encoder.layers, self.variant.method
        queries, keys = [], []
        for index in method.capture_layers(len(layers) - 2):
            normed, attention = layers[index].layer_norm1(hidden_states[index]), layers[index].self_attn
            for projection, into in ((attention.q_proj, queries), (attention.k_proj, keys)):
                into.append(projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
        side = round(features.shape[1] ** 0.5)
        return method.select(queries, keys, features, (side, side), _PREFIX, attention.scale, method.num_tokens)

    def _check_counts(self, selection) -> None:
        """As many tokens in every image or tile as the budget says; the natural mode within its bounds."""
        method, counts = self.variant.method, selection.counts.tolist()
        assert selection.mask.sum(1).tolist() == counts
        full = selection.mask.shape[1]
        for count, valid in zip(counts, self._valid(full), strict=True):
            if method.num_tokens is not None:
                assert count == min(method.num_tokens, valid), f"{count} tokens kept, got budget {method.num_tokens}"
            elif valid == full:
                assert 252 / 576 <= count / full <= 288 / 576, f"{count} of {full} tokens kept by HIVTP"

    def _valid(self, patches: int) -> list[int]:
        """Per image or tile the patches that the stock model does not cut off as padding."""
        tiles = self.vision["pixel_values"].flatten(0, -4).shape[0]
        if not self.tiled:
            return [patches] * tiles
        numbers = torch.arange(tiles, dtype=torch.float64).repeat_interleave(patches).view(self.batch, -1, patches, 1)
        packed, _ = self._stock_pack(list(numbers), torch.full((1,), -1.0, dtype=torch.float64))
        packed = torch.cat(packed).flatten().long()
        return torch.bincount(packed[packed >= 0], minlength=tiles).tolist()

    def _stock_pack(self, images: list[Tensor], newline: Tensor):
        sizes = self.vision["image_sizes"].cpu()
        return type(self.core).pack_image_features(self.core, images, sizes, "default", image_newline=newline)

    def _pack(self, projected: Tensor, selection) -> list[Tensor]:
        """(images or tiles, M, D) to (K, D) per image. The stock model packs tiles in which what is dropped is NaN."""
        if not self.tiled:
            return list(projected)
        if selection is not None:
            whole = projected.new_full((*selection.mask.shape, projected.shape[-1]), float("nan"))
            whole[selection.mask] = projected[selection.indices >= 0]
            projected = whole
        tiles = projected.unflatten(0, (self.batch, -1))
        packed, _ = self._stock_pack(list(tiles), self.core.image_newline)
        return [image[~image.isnan().any(-1)] for image in packed]


# A call to its replay and its result: _timing.Gpu.capture.
Capture = Callable[[Callable[[], object]], tuple[Callable[[], None], object]]
Marks = list[tuple[str, "float | torch.cuda.Event"]]  # a stage and the moment it begins


class StaticLoop:
    """Prefill and greedy decoding whose shapes never change: on a GPU, replays of captured CUDA graphs.

    There is one graph for vision tower, selection and projector, one for the prefill and one for a decoding step.
    LLaVA-NeXT's encoder stays eager: the stock model copies sizes from the host while it packs the tiles. No stopping
    criteria are looked at.
    """

    def __init__(self, prompt: Prompt, new_tokens: int, capture: Capture | None, marks: Marks | None = None):
        model, ids = prompt.model, prompt.inputs["input_ids"]
        text, (batch, length) = model.config.get_text_config(), ids.shape
        self.prompt, self.new_tokens, self.ids = prompt, new_tokens, ids
        self.cache = _FixedCache(config=model.config, max_cache_len=length + new_tokens)
        heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
        self.cache.early_initialization(batch, heads, dim, model.dtype, model.device)
        self.lengths = torch.zeros(len(self.cache.layers), dtype=torch.int64, device=model.device)
        for layer, count in zip(self.cache.layers, self.lengths, strict=True):
            layer.cumulative_length = count  # views, so that one kernel empties the cache
        self.positions = torch.arange(length, device=model.device).expand(batch, -1)
        # Buffers that one step writes and the next one reads: their addresses are part of the graphs.
        self.features = torch.empty(
            (batch, prompt.placeholders, text.hidden_size), dtype=model.dtype, device=model.device
        )
        self.position, self.token = torch.zeros_like(ids[:, :1]), torch.zeros_like(ids[:, :1])
        self.embeds = self.first_logits = self.logits = None  # what the language model got, and gave first and last
        self.encode, self.prefill, self.decode = self._encode, self._prefill, self._decode
        if capture is not None:
            if not prompt.tiled:
                self.encode = _captured(self._encode, capture, marks)
            self.prefill = _captured(self._prefill, capture, marks)
            if marks is None:  # with marks only the way to the first token matters
                self.decode = _captured(self._decode, capture, marks)

    def _encode(self) -> None:
        features = self.prompt.core.get_image_features(**self.prompt.vision, return_dict=True).pooler_output
        torch.stack(list(features), out=self.features)

    def _prefill(self) -> None:
        first = self.prompt.first
        self.embeds = self.prompt.model.get_input_embeddings()(self.ids)
        self.embeds[:, first : first + self.features.shape[1]] = self.features
        self.lengths.zero_()
        self.position.fill_(self.ids.shape[1])
        with self.cache.empty():
            self._forward(inputs_embeds=self.embeds, position_ids=self.positions)
        self.first_logits = self.logits

    def _decode(self) -> None:
        self._forward(input_ids=self.token, position_ids=self.position)
        self.position.add_(1)

    def _forward(self, **inputs) -> None:
        output = self.prompt.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits = output.logits[:, -1]
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def first_token(self) -> list:
        self.encode()
        self.prefill()
        return self.token.tolist()

    def generate(self) -> Tensor:
        """(B, new_tokens)"""
        self.encode()
        self.prefill()
        tokens = [self.token.clone()]
        for _ in range(self.new_tokens - 1):
            self.decode()
            tokens.append(self.token.clone())
        return torch.cat(tokens, 1)


def _captured(step: Callable[[], None], capture: Capture, marks: Marks | None) -> Callable[[], None]:
    """The step as a CUDA graph. It runs a few times before it is captured; the marks kept are those in the graph."""
    marks = [] if marks is None else marks

    def run() -> Marks:
        start = len(marks)
        step()
        made = marks[start:]
        del marks[start:]
        return made

    replay, made = capture(run)
    marks.extend(made)
    return replay


class _FixedCache(StaticCache):
    """Says that it is empty without asking the device, which a capture forbids and the causal mask needs to know."""

    _empty = False

    @contextlib.contextmanager
    def empty(self):
        self._empty = True
        try:
            yield
        finally:
            self._empty = False

    def get_seq_length(self, layer_idx: int = 0):
        return 0 if self._empty else super().get_seq_length(layer_idx)


# Where the time goes


def mark(marks: Marks, stage: str, device: torch.device) -> None:
    """CUDA events on a GPU, part of the graph while one is captured; the clock on a CPU."""
    if device.type == "cuda":
        captured = {"external": True} if torch.cuda.is_current_stream_capturing() else {}
        moment = torch.cuda.Event(enable_timing=True, **captured)
        moment.record()
    else:
        moment = time.perf_counter()
    marks.append((stage, moment))


@contextlib.contextmanager
def watched(model, marks: Marks) -> Iterator[None]:
    """While open, running the model marks where its stages begin. To be opened after attach, whose hooks go first."""
    core = model.model

    def marker(stage: str) -> Callable:
        def hook(*_) -> None:
            mark(marks, stage, model.device)

        return hook

    hooks = [
        core.vision_tower.register_forward_pre_hook(marker("tower")),
        core.vision_tower.register_forward_hook(marker("select")),
        core.multi_modal_projector.register_forward_pre_hook(marker("projector")),
        core.multi_modal_projector.register_forward_hook(marker("merge")),
        core.language_model.register_forward_pre_hook(marker("prefill")),
        model.lm_head.register_forward_hook(marker("rest")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def milliseconds(marks: Marks) -> dict[str, float]:
    """Time in each stage. A stage may come up several times; the last mark is the end."""
    total: dict[str, float] = defaultdict(float)
    for (stage, start), (_, stop) in pairwise(marks):
        total[stage] += (stop - start) * 1e3 if isinstance(start, float) else start.elapsed_time(stop)
    return total


@contextlib.contextmanager
def recorded(model) -> Iterator[list[Tensor]]:
    """While open, every inputs_embeds that the language model gets."""
    seen: list[Tensor] = []

    def hook(module, args, kwargs) -> None:
        seen.append(kwargs["inputs_embeds"].clone())

    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def last_logits(model, embeds: Tensor, otherwise: bool = False) -> Tensor:
    """Logits after the last of unpadded embeddings. ``otherwise``: with PyTorch's plainest attention, and the last
    token in a pass of its own; what this changes is rounding."""
    with sdpa_kernel(SDPBackend.MATH) if otherwise else contextlib.nullcontext():
        cache = DynamicCache(config=model.config)  # without one transformers looks for packed sequences
        for part in embeds.tensor_split([-1], dim=1) if otherwise else [embeds]:
            output = model(inputs_embeds=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1]
