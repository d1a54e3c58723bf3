"""``hvprune generate``: ask a LLaVA model about a picture, with and without pruning."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from .integrations import HIVTP, VisPruner, attach
from .integrations.random_models import ARCHITECTURES, random_model

_DIMMED = 0.25  # brightness of the patches that were dropped


def add_parser(subparsers) -> None:
    summary = "ask a LLaVA model about a picture, with and without pruning, and time both"
    parser = subparsers.add_parser("generate", help=summary, description=summary)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any image file that Pillow reads")
    parser.add_argument("prompt", metavar="PROMPT", help="the question")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint: a folder or a hub id")
    parser.add_argument(
        "--random-weights", choices=ARCHITECTURES, help="time an architecture without its checkpoint: random weights"
    )
    parser.add_argument("--method", choices=("vispruner", "hivtp"), default="vispruner")
    parser.add_argument(
        "--num-tokens",
        type=int,
        metavar="K",
        help="visual tokens kept (VisPruner: 128; HIVTP: as many as the image asks for)",
    )
    parser.add_argument("--per", choices=("tile", "image"), default="tile", help="LLaVA-NeXT: what K counts (tile)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="T", help="length of the answer (64)")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="timed runs; their median is shown (3)")
    parser.add_argument("--overlay", type=Path, metavar="PNG", help="draw what is kept, as the model sees the image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="the checkpoint's by default")
    parser.set_defaults(run=run)


class Timing(NamedTuple):
    answer: str
    prompt_tokens: int  # the language model's, images included
    first_token: float  # seconds from the call of generate to its first token, vision tower included
    tokens_per_second: float  # of the tokens after the first


def run(arguments: argparse.Namespace) -> int:
    """Print the answer and the timings; exit status 2 when an argument does not work."""
    try:
        from PIL import Image

        image = Image.open(arguments.image).convert("RGB")
        method = _method(arguments)
        model, processor = _load(arguments)
        text = _prompt(processor, arguments.prompt)
        inputs = processor(images=image, text=text, return_tensors="pt").to(model.device, model.dtype)
        visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
        before = _time(model, processor, inputs, arguments)
        with attach(model, method, processor=processor) as handle:
            inputs = processor(images=image, text=text, return_tensors="pt").to(model.device, model.dtype)
            after = _time(model, processor, inputs, arguments)
            mask = handle.last_selection.mask[0].cpu()  # LLaVA-NeXT: the base tile, which shows the whole image
    except ImportError as error:
        return _fail(f"needs transformers 5.17 or newer (pip install 'hvprune[llava]'): {error}")
    except (OSError, ValueError, TypeError) as error:
        return _fail(str(error))

    kept = visual - (before.prompt_tokens - after.prompt_tokens)
    note = ", random weights: the answers mean nothing" if arguments.random_weights else ""
    print(f"{arguments.model or arguments.random_weights} on {model.device}, {str(model.dtype)[6:]}{note}")
    print(f"{method}\n")
    print(f"unpruned  {before.answer!r}\npruned    {after.answer!r}\n")
    print(f"{'':10}{'visual tokens':>14}{'prompt tokens':>15}{'first token':>15}{'tokens/s':>11}")
    for name, tokens, timing in (("unpruned", visual, before), ("pruned", kept, after)):
        print(
            f"{name:10}{tokens:>14}{timing.prompt_tokens:>15}{timing.first_token * 1e3:>12.1f} ms"
            f"{timing.tokens_per_second:>11.1f}"
        )
    print(
        f"{'ratio':10}{kept / visual:>14.3f}{after.prompt_tokens / before.prompt_tokens:>15.3f}"
        f"{after.first_token / before.first_token:>15.3f}{after.tokens_per_second / before.tokens_per_second:>11.3f}"
    )
    if arguments.overlay:
        _overlay(inputs["pixel_values"], mask, processor.image_processor).save(arguments.overlay)
        print(f"\nwrote {arguments.overlay}")
    return 0


def _fail(message: str) -> int:
    print(f"hvprune generate: {message}", file=sys.stderr)
    return 2


def _method(arguments) -> HIVTP | VisPruner:
    if arguments.max_new_tokens < 2:
        raise ValueError(f"--max-new-tokens must be at least 2, got {arguments.max_new_tokens}")
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {arguments.repeats}")
    if arguments.method == "hivtp":
        return HIVTP(num_tokens=arguments.num_tokens, per=arguments.per)
    return VisPruner(num_tokens=128 if arguments.num_tokens is None else arguments.num_tokens, per=arguments.per)


def _load(arguments):
    """(model, processor) on the device, in eval mode; transformers shows its own bar while it loads."""
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    if arguments.random_weights and not arguments.model:
        dtype = dtype or (torch.float32 if arguments.device == "cpu" else torch.bfloat16)
        return random_model(arguments.random_weights, dtype=dtype, device=arguments.device, progress=True)
    if not arguments.model or arguments.random_weights:
        names = "|".join(ARCHITECTURES)
        raise ValueError(
            "give either --model PATH_OR_ID, a checkpoint (for example llava-hf/llava-1.5-7b-hf), or, without one, "
            f"--random-weights {names} to time the architecture"
        )
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(arguments.model)
        model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=dtype or "auto")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"no checkpoint at {arguments.model!r}: {reason} (--random-weights times without one)") from error
    return model.to(arguments.device).eval(), processor


def _prompt(processor, question: str) -> str:
    if processor.chat_template is None:
        return f"USER: {processor.image_token}\n{question} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class _Clock:
    """A streamer that notes when the prompt and each token come by."""

    def __init__(self):
        self.times = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _time(model, processor, inputs, arguments) -> Timing:
    """The answer, and medians over runs of full length that a first run has warmed up."""
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    answer = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    one = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    first, rate = [], []
    for _ in range(arguments.repeats):
        clock, start = _Clock(), time.perf_counter()
        model.generate(**inputs, **options, min_new_tokens=arguments.max_new_tokens, streamer=clock)
        _, head, *tail = clock.times
        first.append(head - start)
        rate.append(len(tail) / (tail[-1] - head))
    return Timing(
        answer=processor.decode(answer, skip_special_tokens=True).strip(),
        prompt_tokens=one.past_key_values.get_seq_length(),
        first_token=median(first),
        tokens_per_second=median(rate),
    )


def _overlay(pixel_values, mask, image_processor):
    """The image after resizing and cropping, dropped patches dark."""
    from PIL import Image

    pixels = pixel_values.flatten(0, -4)[0].float().cpu()
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    deviation = torch.tensor(image_processor.image_std)[:, None, None]
    side = round(len(mask) ** 0.5)
    light = torch.where(mask, 1.0, _DIMMED).view(1, side, side)
    light = torch.nn.functional.interpolate(light[None], pixels.shape[1:], mode="nearest")[0]
    shown = ((pixels * deviation + mean) * light).clamp(0, 1).mul(255).byte()
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
