"""LLaVA architectures with random weights: for timing and tests, without a checkpoint."""

from __future__ import annotations

import contextlib

import torch

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
# Deep enough for HIVTP's default layers.
_CLIP_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
_LLAMA_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

# Name: model class, vision encoder, language model, vocabulary
ARCHITECTURES = {
    "llava-1.5-7b": ("Llava", _CLIP_LARGE, _LLAMA_7B, 32064),
    "llava-1.5-13b": ("Llava", _CLIP_LARGE, _LLAMA_13B, 32064),
    "llava-next-7b": ("LlavaNext", _CLIP_LARGE, _LLAMA_7B, 32064),
    "tiny": ("Llava", _CLIP_TINY, _LLAMA_TINY, 512),
    "tiny-next": ("LlavaNext", _CLIP_TINY, _LLAMA_TINY, 512),
}


def random_model(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", progress: bool = False):
    """(model, processor) of one of ARCHITECTURES with random weights and a byte-level tokenizer."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    family, vision, text, vocabulary = ARCHITECTURES[name]
    tokenizer = byte_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        vision_config=transformers.CLIPVisionConfig(image_size=336, patch_size=14, **vision),
        text_config=transformers.LlamaConfig(vocab_size=vocabulary, pad_token_id=tokenizer.pad_token_id, **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    if family == "LlavaNext":
        config.image_grid_pinpoints = PINPOINTS
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS)
    else:
        images = CLIPImageProcessorPil()
    images.size, images.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
    processor = getattr(transformers, f"{family}Processor")(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model_type = getattr(transformers, f"{family}ForConditionalGeneration")
    return build(model_type, config, dtype=dtype, device=device, progress=progress), processor


def build(model_type, config, *, dtype=torch.float32, device="cpu", progress=False, seed=0):
    """A model in eval mode with reproducible random weights, and a progress bar over them when asked for."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _progress_bar(model_type, config, progress), torch.device(device), torch.random.fork_rng():
            torch.manual_seed(seed)
            model = model_type(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


@contextlib.contextmanager
def _progress_bar(model_type, config, enabled: bool):
    if not enabled:
        yield
        return
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from tqdm import tqdm

    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in model_type(config).parameters())
    with tqdm(total=total, unit="weight", unit_scale=True, desc="Drawing random weights") as bar:
        hook = register_module_parameter_registration_hook(lambda module, name, value: bar.update(value.numel()))
        try:
            yield
        finally:
            hook.remove()


def byte_tokenizer():
    """One token per byte, so that any text can be encoded; pads on the left, as generation needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<image>", "<video>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<video>"],
        padding_side="left",
    )
