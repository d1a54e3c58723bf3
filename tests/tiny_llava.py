"""Tiny random LLaVA models with their processors, and a reference that prunes by hand."""

from __future__ import annotations

import random

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from hvprune import HIVTP, ops
from hvprune.integrations.random_models import build, byte_tokenizer

PATCH = 14
GRID = 8  # patches per side
NUM_PATCHES = GRID * GRID
SIDE = GRID * PATCH
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def tiny(kind: str, seed: int = 0):
    """(model, processor) for kind "clip", "siglip", "next" or "video"; the last has no processor."""
    tokenizer = byte_tokenizer()
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=300,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    vision = SiglipVisionConfig(**_VISION) if kind == "siglip" else CLIPVisionConfig(**_VISION)
    strategy = "full" if kind == "siglip" else "default"
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": strategy,
    }
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS) if kind == "next" else CLIPImageProcessorPil()
    images.size, images.crop_size = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    processor_type = LlavaNextProcessor if kind == "next" else LlavaProcessor
    processor = processor_type(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=0 if kind == "siglip" else 1,
    )
    if kind == "next":
        config = LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
        model = build(LlavaNextForConditionalGeneration, config, seed=seed)
    elif kind == "video":
        video = tokenizer.convert_tokens_to_ids("<video>")
        config = VideoLlavaConfig(**common, video_token_index=video)
        return build(VideoLlavaForConditionalGeneration, config, seed=seed), None
    else:
        model = build(LlavaForConditionalGeneration, LlavaConfig(**common), seed=seed)
    with torch.no_grad():  # by default the weights are so small that the answer hardly depends on the image
        for name, parameter in model.named_parameters():
            if "vision_tower" in name or "projector" in name:
                parameter.mul_(8.0)
    return model, processor


def photo(seed: int, width: int = 150, height: int = 120) -> Image.Image:
    """A picture of random blocks."""
    generator = random.Random(seed)
    blocks = bytes(generator.randrange(256) for _ in range(8 * 6 * 3))
    return Image.frombytes("RGB", (8, 6), blocks).resize((width, height), Image.Resampling.NEAREST)


def select_by_hand(model, method, pixel_values, num_tokens=None):
    """Features (B, N, C) of the stock tower and the Selection of the method on Q and K computed from its layers."""
    tower = getattr(model.model, "vision_tower", None) or model.model.image_tower
    hidden_states = tower(pixel_values, output_hidden_states=True).hidden_states
    layers = tower.encoder.layers
    prefix = hidden_states[0].shape[1] - NUM_PATCHES
    features = hidden_states[-2][:, prefix:]
    queries, keys = [], []
    for index in method.layers if isinstance(method, HIVTP) else [len(layers) - 2]:
        normed = layers[index].layer_norm1(hidden_states[index])
        attention = layers[index].self_attn
        for projection, into in ((attention.q_proj, queries), (attention.k_proj, keys)):
            into.append(projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
    if isinstance(method, HIVTP):
        selection = ops.hivtp_select(
            queries,
            keys,
            num_prefix_tokens=prefix,
            regions=method.regions,
            keep_ratio=method.keep_ratio,
            window=method.window,
            num_tokens=num_tokens or method.num_tokens,
        )
    else:
        rows = "cls" if prefix else "all"
        importance = ops.attention_importance(queries, keys, num_prefix_tokens=prefix, rows=rows)
        selection = ops.vispruner_select(
            features, importance, num_tokens or method.num_tokens, important_ratio=method.important_ratio
        )
    return features, selection


def embed_by_hand(model, inputs, images, given):
    """inputs_embeds and attention_mask, left padded: placeholders of the prompt, ``given[i]`` of them for image i,
    replaced by the rows of images[i]."""
    embedding = model.get_input_embeddings()
    rows, image = [], 0
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()].tolist()
        parts, at = [], 0
        while at < len(ids):
            if ids[at] == model.config.image_token_id:
                assert ids[at : at + given[image]] == [model.config.image_token_id] * given[image]
                parts.append(images[image])
                at += given[image]
                image += 1
            else:
                parts.append(embedding(torch.tensor([ids[at]])))
                at += 1
        rows.append(torch.cat(parts))
    assert image == len(images)
    width = max(len(row) for row in rows)
    pad = embedding(torch.tensor([model.config.text_config.pad_token_id]))
    embeds = torch.stack([torch.cat([pad.expand(width - len(row), -1), row]) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return embeds, mask


def prune_by_hand(model, method, inputs, num_tokens=None):
    """inputs_embeds and attention_mask of a LLaVA-1.5 prompt from a stock processor, pruned on the stock model."""
    features, selection = select_by_hand(model, method, inputs["pixel_values"], num_tokens)
    kept = [image[mask] for image, mask in zip(features, selection.mask, strict=True)]
    projected = model.model.multi_modal_projector(torch.cat(kept))
    images = projected.split([len(image) for image in kept])
    return embed_by_hand(model, inputs, images, [NUM_PATCHES] * len(images))
