"""Floating-point operations of LLaVA's parts, counted from the configuration: a multiply-add is two.

Matrix products, convolutions and attention count; norms, activations and softmax do not. Causal attention counts in
full, as PyTorch's own counter and the papers have it. A test compares with torch.utils.flop_counter.
"""

from __future__ import annotations


def tower_flops(vision, images: int, layers: int) -> int:
    """``layers`` encoder layers of a CLIP tower on ``images`` images or tiles."""
    patches = (vision.image_size // vision.patch_size) ** 2
    length, width, inner = patches + 1, vision.hidden_size, vision.intermediate_size
    embedding = 2 * patches * width * vision.num_channels * vision.patch_size**2
    projections, attention, mlp = 8 * length * width**2, 4 * length**2 * width, 4 * length * width * inner
    return images * (embedding + layers * (projections + attention + mlp))


def projector_flops(vision, text, tokens: int) -> int:
    return 2 * tokens * text.hidden_size * (vision.hidden_size + text.hidden_size)


def prefill_flops(text, batch: int, length: int) -> int:
    """The language model on prompts of ``length`` tokens, logits of the last one only."""
    width, heads = text.hidden_size, text.num_attention_heads
    shared = text.num_key_value_heads / heads
    projections = 4 * length * width**2 * (1 + shared)
    attention, mlp = 4 * length**2 * width, 6 * length * width * text.intermediate_size
    return round(batch * (text.num_hidden_layers * (projections + attention + mlp) + 2 * width * text.vocab_size))


def visual_prefill_macs(text, tokens: int) -> int:
    """The usual estimate for the visual tokens alone, L * (4 n d^2 + 2 n^2 d + 2 n d m); a multiply-add is one."""
    width, inner = text.hidden_size, text.intermediate_size
    return text.num_hidden_layers * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * inner)
