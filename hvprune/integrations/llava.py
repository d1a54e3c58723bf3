"""LLaVA-1.5, and every model whose image features go from one ViT straight into the projector."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from itertools import accumulate
from types import SimpleNamespace

import torch
from torch import Tensor

from .. import ops
from .._checks import type_error, value_error
from ..selection import Selection
from .methods import check_budget

# Vision towers and their tokens before the patches. The feature selection strategy must leave exactly the patches.
_PREFIX_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
_IGNORED_LABEL = -100
# Decoding that feeds the prompt's ids, or feeds the prompt twice: silently wrong with inputs_embeds in transformers.
_NEED_IDS = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit", "assistant_model")


class PrunedLlava:
    """A model with a pruning method attached; made by :func:`hvprune.attach`."""

    def __init__(self, model, method, processor):
        self.model, self.method, self.processor = model, method, processor
        self.last_selection: Selection | None = None
        self._core = model.model
        self._undo = contextlib.ExitStack()
        # One model may serve several threads. A plain threading.local, read with getattr, is what torch.compile
        # traces without a graph break.
        self._local = threading.local()

        config = model.config
        vision, self._strategy = config.vision_config, config.vision_feature_select_strategy
        if vision.model_type not in _PREFIX_TOKENS:
            raise type_error("attach", "the vision tower", f"one of {tuple(_PREFIX_TOKENS)}", vision.model_type)
        self._prefix = _PREFIX_TOKENS[vision.model_type]
        expected = "default" if self._prefix else "full"
        if self._strategy != expected:
            raise value_error(
                "attach", f"vision_feature_select_strategy of {vision.model_type}", repr(expected), self._strategy
            )
        side = vision.image_size // vision.patch_size
        self._grid = (side, side)
        self._num_patches = side * side
        self._check_budget("attach", method.num_tokens)

        tower = self._core.image_tower if hasattr(self._core, "image_tower") else self._core.vision_tower
        self._layers = tower.encoder.layers
        self._hidden_state = config.vision_feature_layer
        if not isinstance(self._hidden_state, int):
            raise type_error("attach", "vision_feature_layer", "an int", self._hidden_state)
        # hidden_states[0] is the embedding and hidden_states[i + 1] the output of layer i.
        self._feature_layer = self._hidden_state % (len(self._layers) + 1) - 1
        self._sources = method.capture_layers(self._feature_layer)
        if not all(0 <= layer <= self._feature_layer for layer in self._sources):
            raise value_error("attach", "layers", f"in [0, {self._feature_layer}] for this model", self._sources)
        self._scale = self._layers[0].self_attn.scale

    def install(self) -> None:
        """Hook into the model and the processor, then compare their counts on a dummy image."""
        for index in self._sources:
            attention = self._layers[index].self_attn
            for name, projection in (("queries", attention.q_proj), ("keys", attention.k_proj)):
                hook = projection.register_forward_hook(self._capture_hook(name, index))
                self.on_detach(hook.remove)
        for layer in self._layers[self._feature_layer + 1 :]:
            self._override(layer, "forward", self._skippable(layer.forward))
        hook = self._core.multi_modal_projector.register_forward_pre_hook(self._prune)
        self.on_detach(hook.remove)
        self._vision_signature = inspect.signature(self._core.get_image_features)
        self._stock_features = self._core.get_image_features
        self._override(self._core, "get_image_features", self._image_features)
        self._stock_generate = self.model.generate
        self._encodes_first = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        self._override(self.model, "generate", self._generate)
        if self.processor is not None:
            # Video-LLaVA's processor counts videos by the same attribute: it stays as it is.
            fixed = self.method.num_tokens is not None and not hasattr(self.processor, "video_token")
            if fixed:
                self._patch_processor(self.processor)
            self._self_check(self.processor, fixed)

    def detach(self) -> None:
        """Give the model and the processor back as they were. Calling it again does nothing."""
        self._undo.close()

    def __enter__(self) -> PrunedLlava:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def on_detach(self, function, *args) -> None:
        self._undo.callback(function, *args)

    def prepare(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs) -> dict:
        """Inputs for a plain ``model(**handle.prepare(**inputs))`` whatever the processor counted.

        For a forward pass (with labels, say) in HIVTP's natural mode or with an unmodified processor: it runs the
        vision tower, shortens every (B, L) input, and returns ``inputs_embeds`` in place of ids and pixels.
        Gradients flow to the projector and the embeddings. ``num_tokens=...`` overrides the budget.
        """
        prompt, embeds = self._embed(input_ids, attention_mask, inputs)
        del prompt["input_ids"]
        return {**inputs, **prompt, "inputs_embeds": embeds}

    # The vision tower

    def _capture_hook(self, name: str, index: int):
        local = self._local

        def hook(module, args, output):
            captured = getattr(local, "captured", None)
            if captured is not None:
                captured[name, index] = output

        return hook

    def _skippable(self, forward):
        local = self._local

        def skip(hidden_states, *args, **kwargs):
            if getattr(local, "captured", None) is not None:
                return hidden_states
            return forward(hidden_states, *args, **kwargs)

        return skip

    def _image_features(self, *args, **kwargs):
        """get_image_features of the model, with the hooks of this thread awake."""
        arguments = self._vision_signature.bind(*args, **kwargs).arguments
        for name, attached in (
            ("vision_feature_layer", self._hidden_state),
            ("vision_feature_select_strategy", self._strategy),
        ):
            if arguments.get(name) not in (None, attached):
                raise value_error("hvprune", name, f"{attached!r} while attached", arguments[name])
        request = getattr(self._local, "request", None)
        self._local.call = request or SimpleNamespace(num_tokens=self.method.num_tokens, natural=False)
        sizes = arguments.get("image_sizes")  # read before the tower is at work: reading waits for the device
        self._local.call.sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        self._local.captured = {}
        try:
            return self._stock_features(*args, **kwargs)
        finally:
            self._local.call = self._local.captured = None

    def _prune(self, projector, args):
        """Before the projector: image features (B, N, C) in, the kept ones out."""
        call = getattr(self._local, "call", None)
        if call is None:  # video features, or somebody else's call
            return None
        if call.num_tokens is None and not call.natural:
            raise RuntimeError(
                "hvprune: forward must know the token count beforehand, got HIVTP in its natural mode: use "
                "model.generate, model(**handle.prepare(**inputs)), or set num_tokens"
            )
        captured = self._local.captured
        if len(captured) != 2 * len(self._sources):
            raise RuntimeError(
                "hvprune: the vision tower must run with the hooks of attach, got a graph compiled without them: "
                "attach before the first compiled call, or call torch._dynamo.reset()"
            )
        (features,) = args
        queries = [self._heads(captured["queries", index]) for index in self._sources]
        keys = [self._heads(captured["keys", index]) for index in self._sources]
        self.last_selection = call.selection = self._select(call, queries, keys, features)
        return (self._gather(call, features),)

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, L, H * D) as the projection emits it, seen as (B, H, L, D)."""
        return projected.unflatten(-1, (self._layers[0].self_attn.num_heads, -1)).transpose(1, 2)

    def _select(self, call, queries, keys, features) -> Selection:
        return self.method.select(queries, keys, features, self._grid, self._prefix, self._scale, call.num_tokens)

    def _gather(self, call, features: Tensor) -> Tensor:
        """(B, K, C), or (1, sum of counts, C) in the natural mode."""
        if call.num_tokens is None:
            return features[call.selection.mask][None]
        return gather(features, call.selection.indices)

    # The prompt

    def _generate(self, inputs=None, generation_config=None, *args, num_tokens: int | None = None, **kwargs):
        """model.generate, with the prompt shortened when its placeholders are not those of the budget."""
        input_ids = kwargs.pop("input_ids", inputs)
        mask = kwargs.pop("attention_mask", None)
        stock = functools.partial(self._stock_generate, None, generation_config, *args)
        has_images = any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_images"))
        if input_ids is None or not has_images or kwargs.get("inputs_embeds") is not None:
            return stock(input_ids=input_ids, attention_mask=mask, **kwargs)
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        if num_tokens is None and self.method.num_tokens is not None:
            given = self._counts(kwargs, self.method.num_tokens)
            per_row = self._placeholders(input_ids, mask).sum(1).tolist()
            # Before 5.18 beams and returned sequences of a prompt with several images get each other's images.
            safe = self._encodes_first or len(given) == sum(count > 0 for count in per_row)
            # With a cache the ids may hold images of earlier turns too; the stock model counts those of this one.
            if cached or (safe and _fill_rows(per_row, given)):
                return stock(input_ids=input_ids, attention_mask=mask, **kwargs)

        if cached:
            raise value_error("generate", "past_key_values", "of length 0 when the prompt is shortened", cached)
        settings = generation_config or self.model.generation_config
        for name in _NEED_IDS:
            value = kwargs.get(name, getattr(settings, name, None))
            if value is not None:
                raise value_error("generate", name, "None when the prompt is shortened", value)
        if mask is None and len(input_ids) > 1:
            raise value_error("generate", "attention_mask", "given for a batch of prompts", None)
        kwargs["num_tokens"] = num_tokens
        with torch.no_grad():
            prompt, embeds = self._embed(input_ids, mask, kwargs)
        width = prompt["input_ids"].shape[1]
        for name in ("max_length", "min_length"):  # they count the prompt as the caller sees it
            if kwargs.get(name) is not None:
                kwargs[name] += width - input_ids.shape[1]
        result = stock(inputs_embeds=embeds, **prompt, **kwargs)
        sequences = result if isinstance(result, Tensor) else result.sequences
        prefix = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0).to(sequences.device)
        sequences = torch.cat([prefix, sequences[:, width:]], 1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result

    def _embed(self, input_ids: Tensor, attention_mask: Tensor | None, inputs: dict) -> tuple[dict, Tensor]:
        """The prompt with as many placeholders as tokens are kept, and its embeddings with the images in place.

        Takes what it uses out of ``inputs``: the images, the budget and everything shaped like the ids.
        """
        num_tokens = inputs.pop("num_tokens", None)
        if num_tokens is not None:
            check_budget("generate", num_tokens)
            self._check_budget("generate", num_tokens)
        vision = {name: inputs.pop(name) for name in list(inputs) if name in self._vision_signature.parameters}
        call = SimpleNamespace(num_tokens=num_tokens or self.method.num_tokens, natural=True)
        self._local.request = call
        try:
            outputs = self._core.get_image_features(**vision, return_dict=True)
        finally:
            self._local.request = None
        features = self._per_image(call, outputs.pooler_output)

        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
        for name in ("labels", "position_ids"):
            if inputs.get(name) is not None:
                prompt[name] = inputs.pop(name)
        repeats = self._repeats(input_ids, attention_mask, vision, [len(image) for image in features])
        pad = self.model.config.get_text_config().pad_token_id
        fill = {"input_ids": pad or 0, "labels": _IGNORED_LABEL}
        on_the_right = not bool(attention_mask[:, -1].all())
        prompt = {name: _repeat(rows, repeats, fill.get(name, 0), on_the_right) for name, rows in prompt.items()}

        embeds = self.model.get_input_embeddings()(prompt["input_ids"])
        images = torch.cat([image.flatten(0, -2) for image in features]).to(embeds.device, embeds.dtype)
        at = self._placeholders(prompt["input_ids"], prompt["attention_mask"])
        return prompt, embeds.masked_scatter(at[..., None].to(embeds.device), images)

    def _repeats(self, input_ids, attention_mask, vision: dict, counts: list[int]) -> Tensor:
        """(B, L) int64: how often each token of the prompt stays, so that image i has counts[i] placeholders."""
        placeholders = self._placeholders(input_ids, attention_mask)
        per_row = placeholders.sum(1).tolist()
        for num_tokens in (self.method.num_tokens, None):  # the attached processor, then the stock one
            given = self._counts(vision, num_tokens)
            if _fill_rows(per_row, given):
                break
        else:
            expected = f"{counts} kept or {given} stock ones per image"
            raise value_error("hvprune", "image placeholders of the prompts", expected, per_row)
        repeats = attention_mask.to(torch.int64, copy=True)
        per_image = []
        for have, want in zip(given, counts, strict=True):
            image = torch.zeros(have, dtype=torch.int64)
            image[: min(have, want)] = 1
            image[-1] += max(0, want - have)
            per_image.append(image)
        repeats[placeholders] = torch.cat(per_image).to(repeats.device)
        return repeats

    def _placeholders(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        found = input_ids == self.model.config.image_token_id
        return found if attention_mask is None else found & attention_mask.bool()

    def _check_budget(self, who: str, num_tokens: int | None) -> None:
        if num_tokens is not None and num_tokens > self._num_patches:
            raise value_error(who, "num_tokens", f"in [1, N] with N={self._num_patches}", num_tokens)

    def _counts(self, vision: dict, num_tokens: int | None) -> list[int]:
        """Placeholders of each image for a budget; None counts them as the stock processor does."""
        pixels = vision.get("pixel_values")
        pixels = vision["pixel_values_images"] if pixels is None else pixels
        return [num_tokens or self._num_patches] * len(pixels)

    def _per_image(self, call, features) -> list[Tensor]:
        """The projected features as one (K, D) per image."""
        if call.num_tokens is None:
            return list(features[0].split(call.selection.counts.tolist()))
        return list(features)

    # The processor

    def _patch_processor(self, processor) -> None:
        """K placeholders per image. The attribute is part of the processor's configuration: it survives saving."""
        stock = processor.num_additional_image_tokens
        self.on_detach(setattr, processor, "num_additional_image_tokens", stock)
        processor.num_additional_image_tokens = self.method.num_tokens - self._num_patches + self._prefix

    def _self_check(self, processor, fixed: bool) -> None:
        from PIL import Image

        image = Image.new("RGB", (640, 480), (128, 128, 128))
        inputs = processor(images=image, text=processor.image_token, return_tensors="pt")
        input_ids = inputs.pop("input_ids").to(self._core.device)
        inputs = {name: value.to(self._core.device) for name, value in inputs.items()}
        with torch.no_grad():
            prompt, _ = self._embed(input_ids, inputs.pop("attention_mask"), inputs)
        self.last_selection = None
        given = int(self._placeholders(input_ids, None).sum())
        kept = int(self._placeholders(prompt["input_ids"], None).sum())
        if fixed and given != kept:
            raise value_error("attach", "processor", f"one that emits {kept} placeholders for a 640x480 image", given)

    def _override(self, owner, name: str, function) -> None:
        """Shadow a method on one instance. The signature stays visible: generate inspects it."""

        @functools.wraps(getattr(owner, name))
        def override(*args, **kwargs):
            return function(*args, **kwargs)

        if name in vars(owner):
            self.on_detach(setattr, owner, name, vars(owner)[name])
        else:
            self.on_detach(delattr, owner, name)
        setattr(owner, name, override)


def gather(features: Tensor, indices: Tensor) -> Tensor:
    """ops.gather_tokens, or a gather that autograd follows when the vision tower is being trained."""
    if features.requires_grad and torch.is_grad_enabled():
        return features.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1]))
    return ops.gather_tokens(features, indices)


def _fill_rows(per_row: list[int], per_image: list[int]) -> bool:
    """Whether images of these sizes, in order, fill the rows exactly, none reaching into the next row."""
    ends = list(accumulate(per_image, initial=0))
    row_ends = list(accumulate(per_row, initial=0))
    return ends[-1] == row_ends[-1] and set(row_ends) <= set(ends)


def _repeat(rows: Tensor, repeats: Tensor, fill: int, on_the_right: bool) -> Tensor:
    """Each token of rows (B, L) as often as repeats (B, L) says, padded with ``fill`` to one length."""
    rows = [row.repeat_interleave(count) for row, count in zip(rows, repeats, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=fill, padding_side="right" if on_the_right else "left"
    )
