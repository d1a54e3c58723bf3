"""hvprune.attach on LLaVA-1.5: the pruned model equals pruning by hand, bit for bit, and leaves no trace."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

import hvprune
from hvprune import HIVTP, VisPruner
from hvprune.generate import add_parser
from hvprune.integrations.random_models import random_model
from tiny_llava import NUM_PATCHES, embed_by_hand, photo, prune_by_hand, select_by_hand, tiny

LAYERS = (0, 1)  # of the four; feature layer 2
METHODS = {
    "vispruner": VisPruner(num_tokens=20),
    "hivtp-fixed": HIVTP(layers=LAYERS, num_tokens=24),
    "hivtp-natural": HIVTP(layers=LAYERS),
}
# No image, one image, and two images over two turns: rows of different lengths, padded on the left.
PROMPTS = ["no picture", "<image> what?", "user: <image> this?\nassistant: that\nuser: and <image>?"]
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(processor, prompts=PROMPTS, seed=0):
    images = [photo(seed + i) for i in range(sum(prompt.count("<image>") for prompt in prompts))]
    return processor(images=images, text=list(prompts), return_tensors="pt", padding=True)


def generate(model, inputs, **options):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    torch.manual_seed(0)
    return model.generate(**inputs, **options)


def assert_same_answer(result, expected, inputs):
    """``expected`` came from inputs_embeds, so it holds the new tokens only."""
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, expected.sequences)
    for step, (got, want) in enumerate(zip(result.logits, expected.logits, strict=True)):
        assert torch.equal(got, want), f"logits of step {step} differ by {(got - want).abs().max()}"
    rows = len(result.sequences) // len(inputs["input_ids"])
    assert torch.equal(result.sequences[:, : -new.shape[1]], inputs["input_ids"].repeat_interleave(rows, 0))


@pytest.mark.parametrize("with_processor", [True, False], ids=["processor", "stock-processor"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_generate_equals_pruning_by_hand(tower, method, with_processor):
    model, processor = tiny(tower)
    stock_inputs = ask(processor)
    with torch.no_grad():
        embeds, mask = prune_by_hand(model, method, stock_inputs)
    expected = generate(model, {"inputs_embeds": embeds, "attention_mask": mask}, **LOGITS)
    stock = generate(model, stock_inputs, **LOGITS)
    assert not torch.equal(stock.logits[0], expected.logits[0])  # pruning matters to these weights
    with hvprune.attach(model, method, processor=processor if with_processor else None) as handle:
        inputs = ask(processor) if with_processor else stock_inputs
        result = generate(model, inputs, **LOGITS)
        _, selection = select_by_hand(model, method, stock_inputs["pixel_values"])
        assert torch.equal(handle.last_selection.indices, selection.indices)
    assert_same_answer(result, expected, inputs)
    if with_processor and method.num_tokens:
        kept = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
        assert kept == [0, method.num_tokens, 2 * method.num_tokens]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 2.0},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_generate_modes(method, options):
    model, processor = tiny("clip")
    stock_inputs = ask(processor)
    with torch.no_grad():
        embeds, mask = prune_by_hand(model, method, stock_inputs)
    expected = generate(model, {"inputs_embeds": embeds, "attention_mask": mask}, **options)
    with hvprune.attach(model, method, processor=processor):
        inputs = ask(processor)
        result = generate(model, inputs, **options)
    assert torch.equal(result[:, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 16}], ids=lambda options: next(iter(options))
)
def test_decoding_that_needs_the_ids(options):
    """Right when the processor counted the kept tokens, an error when the prompt has to be shortened."""
    model, processor = tiny("clip")
    stock_inputs = ask(processor, PROMPTS[1:2])
    with hvprune.attach(model, METHODS["vispruner"], processor=processor) as handle:
        inputs = ask(processor, PROMPTS[1:2])
        if "prompt_lookup_num_tokens" in options or handle._encodes_first:
            assert torch.equal(generate(model, inputs, **options), generate(model, inputs))
        with pytest.raises(ValueError, match="None when the prompt is shortened"):
            generate(model, stock_inputs, **options)


def test_second_turn_continues_the_cache_of_the_first():
    model, processor = tiny("clip")
    first, second = "user: <image> this?\nassistant:", "\nuser: and <image>?\nassistant:"
    with hvprune.attach(model, METHODS["vispruner"], processor=processor):
        inputs = processor(images=photo(0), text=first, return_tensors="pt")
        answer = generate(model, inputs, return_dict_in_generate=True)
        more = processor(images=photo(1), text=second, return_tensors="pt")
        ids = torch.cat([answer.sequences, more["input_ids"]], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        both = torch.cat([inputs["pixel_values"], more["pixel_values"]])
        expected = generate(model, {**turn, "pixel_values": both}, **LOGITS)
        turn["pixel_values"] = more["pixel_values"]
        result = generate(model, turn, past_key_values=answer.past_key_values, **LOGITS)
    assert torch.equal(result.sequences, expected.sequences)
    torch.testing.assert_close(result.logits, expected.logits)


def test_max_length_counts_the_prompt_as_given():
    model, processor = tiny("clip")
    inputs = ask(processor)
    length = inputs["input_ids"].shape[1]
    with hvprune.attach(model, METHODS["hivtp-natural"]):
        assert model.generate(**inputs, max_length=length + 5, min_length=length + 5).shape[1] == length + 5


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(
    "method",
    [VisPruner(num_tokens=NUM_PATCHES), HIVTP(layers=LAYERS, num_tokens=NUM_PATCHES), HIVTP(LAYERS, keep_ratio=1.0)],
    ids=["vispruner", "hivtp-fixed", "hivtp-natural"],
)
def test_keeping_everything_is_the_stock_model(tower, method):
    model, processor = tiny(tower)
    inputs = ask(processor)
    expected = generate(model, inputs, **LOGITS)
    with hvprune.attach(model, method, processor=processor):
        result = generate(model, ask(processor), **LOGITS)
    assert torch.equal(result.sequences, expected.sequences)
    for got, want in zip(result.logits, expected.logits, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("num_tokens", [7, 20, 40])
@pytest.mark.parametrize("with_processor", [True, False], ids=["processor", "stock-processor"])
def test_budget_of_one_call(num_tokens, with_processor):
    """Below, at and above the attached budget."""
    model, processor = tiny("clip")
    method = METHODS["vispruner"]
    stock_inputs = ask(processor)
    with torch.no_grad():
        embeds, mask = prune_by_hand(model, method, stock_inputs, num_tokens)
    expected = generate(model, {"inputs_embeds": embeds, "attention_mask": mask}, **LOGITS)
    with hvprune.attach(model, method, processor=processor if with_processor else None):
        inputs = ask(processor)
        assert_same_answer(generate(model, inputs, num_tokens=num_tokens, **LOGITS), expected, inputs)
        with pytest.raises(ValueError, match=r"num_tokens must be in \[1, N\] with N=64, got 65"):
            generate(model, inputs, num_tokens=65)


def labelled(model, inputs):
    labels = inputs["input_ids"].clone()
    labels[(labels == model.config.image_token_id) | (inputs["attention_mask"] == 0)] = -100
    return labels


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_forward_with_labels(method):
    """Loss, logits and gradients, tower included; the processor's count first, then handle.prepare."""
    model, processor = tiny("clip")
    stock_inputs = ask(processor, PROMPTS[1:])
    embeds, mask = prune_by_hand(model, method, stock_inputs)
    labels = labelled(model, stock_inputs)
    rows = [row[keep.bool()] for row, keep in zip(labels, stock_inputs["attention_mask"], strict=True)]
    text = [[label for label in row.tolist() if label != -100] for row in rows]
    embedded = model(inputs_embeds=embeds, attention_mask=mask)
    with hvprune.attach(model, method, processor=processor) as handle:
        prepared = model(**handle.prepare(**stock_inputs, labels=labels))
        prepared_labels = handle.prepare(**stock_inputs, labels=labels)["labels"]
        assert torch.equal(prepared.logits, embedded.logits)
        assert [[label for label in row.tolist() if label != -100] for row in prepared_labels] == text
        assert torch.equal(prepared.loss, model(inputs_embeds=embeds, attention_mask=mask, labels=prepared_labels).loss)
        prepared.loss.backward()
        got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        if method.num_tokens:
            inputs = ask(processor, PROMPTS[1:])
            result = model(**inputs, labels=labelled(model, inputs))
            assert torch.equal(result.logits, embedded.logits)
            assert torch.equal(result.loss, prepared.loss)
        else:
            with pytest.raises(RuntimeError, match="natural mode"):
                model(**stock_inputs)
    model(inputs_embeds=embeds, attention_mask=mask, labels=prepared_labels).loss.backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("vision_tower" in name for name in want)
    for name in want:
        if "embed_tokens" not in name:  # there the padding rows are the same values by another path
            torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


def test_forward_with_too_many_placeholders_is_an_error():
    model, processor = tiny("clip")
    inputs = ask(processor)
    with hvprune.attach(model, METHODS["vispruner"], processor=processor), pytest.raises(ValueError, match="192"):
        model(**inputs)


def test_prompt_whose_images_do_not_match_is_an_error():
    model, processor = tiny("clip")
    inputs = ask(processor)
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with (
        hvprune.attach(model, METHODS["vispruner"], processor=processor),
        pytest.raises(ValueError, match="placeholders"),
    ):
        generate(model, inputs)


def test_placeholders_in_the_wrong_prompt_are_an_error():
    """The total is right, which is all that the stock model looks at."""
    model, processor = tiny("clip")
    with hvprune.attach(model, METHODS["vispruner"], processor=processor):
        inputs = ask(processor, PROMPTS[1:])
        first, second = inputs["input_ids"]
        text = int(first[-1])
        first[-1] = model.config.image_token_id
        second[(second == model.config.image_token_id).nonzero()[0]] = text
        with pytest.raises(ValueError, match=r"image placeholders of the prompts must be .*, got \[21, 39\]"):
            generate(model, inputs)


@pytest.mark.parametrize("name, value", [("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")])
def test_other_features_than_attached_are_an_error(name, value):
    model, processor = tiny("clip")
    inputs = ask(processor)
    with (
        hvprune.attach(model, METHODS["vispruner"]),
        pytest.raises(ValueError, match=f"{name} must be .* while attached"),
    ):
        generate(model, inputs, **{name: value})


def test_layers_after_the_features_are_skipped():
    model, processor = tiny("clip")
    pixels = ask(processor)["pixel_values"]
    calls = []
    last = model.model.vision_tower.encoder.layers[-1]
    hook = last.mlp.register_forward_hook(lambda *_: calls.append("last"))
    tower_output = model.model.vision_tower(pixels)
    expected = model.model.get_image_features(pixels, return_dict=True).pooler_output
    assert calls == ["last", "last"]
    with hvprune.attach(model, VisPruner(num_tokens=NUM_PATCHES)):
        result = model.model.get_image_features(pixels, return_dict=True).pooler_output
        assert calls == ["last", "last"]
        # The tower called by itself is whole.
        assert torch.equal(model.model.vision_tower(pixels).pooler_output, tower_output.pooler_output)
    hook.remove()
    for got, want in zip(result, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_compiled_tower_has_no_graph_break(method):
    model, processor = tiny("clip")
    with hvprune.attach(model, method, processor=processor):
        inputs = ask(processor)
        expected = generate(model, inputs, **LOGITS)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.model.vision_tower.compile(backend="eager", fullgraph=True)
        for _ in range(3):
            result = generate(model, inputs, **LOGITS)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(result.sequences, expected.sequences)
    for got, want in zip(result.logits, expected.logits, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("feature_layer", [-2, -1], ids=["recompiles", "keeps-its-graph"])
def test_tower_compiled_before_attach(feature_layer):
    """A skipped layer makes it compile anew; with nothing to skip the old graph lacks the hooks, which is said."""
    model, processor = tiny("clip")
    model.config.vision_feature_layer = feature_layer
    inputs = ask(processor)
    generate(model, inputs)  # transformers installs its own hooks at the first call, under a lock
    with hvprune.attach(model, METHODS["vispruner"]):
        expected = generate(model, inputs)
    torch._dynamo.reset()
    model.model.vision_tower.compile(backend="eager", fullgraph=True)
    stock = generate(model, inputs)
    with hvprune.attach(model, METHODS["vispruner"]):
        if feature_layer == -1:
            with pytest.raises(RuntimeError, match=r"torch\._dynamo\.reset"):
                generate(model, inputs)
            torch._dynamo.reset()
        assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, inputs), stock)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_threads_share_a_model(compiled):
    model, processor = tiny("clip")
    method = METHODS["hivtp-natural"]
    batches = [ask(processor, seed=10 * i) for i in range(4)]
    with hvprune.attach(model, method):
        expected = [generate(model, batch) for batch in batches]
        if compiled:
            torch._dynamo.reset()
            model.model.vision_tower.compile(backend="eager", fullgraph=True)
            generate(model, batches[0])
        results = [[] for _ in batches]

        def work(index):
            for _ in range(8):
                results[index].append(generate(model, batches[index]))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for got, want in zip(results, expected, strict=True):
        assert len(got) == 8 and all(torch.equal(result, want) for result in got)


def test_two_attached_models_do_not_disturb_each_other():
    (first, processor), (second, other) = tiny("clip"), tiny("siglip", seed=1)
    prompts = PROMPTS[1:]
    with hvprune.attach(first, METHODS["vispruner"], processor=processor):
        alone = generate(first, ask(processor, prompts))
        with hvprune.attach(second, METHODS["hivtp-natural"], processor=other):
            both = generate(second, ask(other, prompts))
            assert torch.equal(generate(first, ask(processor, prompts)), alone)
            assert torch.equal(generate(second, ask(other, prompts)), both)
        assert torch.equal(generate(first, ask(processor, prompts)), alone)


def snapshot(model, processor):
    """Everything attach could change: instance attributes and hooks of each module, and the processor."""
    modules = {
        name: (
            {key: value for key, value in vars(module).items() if not key.startswith("_")},
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }
    return modules, dict(vars(processor))


def test_detach_restores_everything():
    model, processor = tiny("clip")
    inputs = ask(processor)
    generate(model, inputs)  # transformers installs its own hooks at the first call
    before, expected = snapshot(model, processor), generate(model, inputs, **LOGITS)
    handle = hvprune.attach(model, METHODS["vispruner"], processor=processor)
    assert snapshot(model, processor) != before
    handle.detach()
    handle.detach()
    assert snapshot(model, processor) == before
    with pytest.raises(KeyError, match="from the body"), hvprune.attach(model, METHODS["hivtp-natural"]):
        raise KeyError("from the body")
    assert snapshot(model, processor) == before
    assert torch.equal(ask(processor)["input_ids"], inputs["input_ids"])
    for got, want in zip(generate(model, inputs, **LOGITS).logits, expected.logits, strict=True):
        assert torch.equal(got, want)


def test_attached_twice_is_an_error():
    (model, processor), (other, _) = tiny("clip"), tiny("clip", seed=1)
    with hvprune.attach(model, METHODS["vispruner"], processor=processor):
        with pytest.raises(ValueError, match="attach: model must be detached"):
            hvprune.attach(model, METHODS["hivtp-fixed"])
        with pytest.raises(ValueError, match="attach: processor must be detached"):
            hvprune.attach(other, METHODS["vispruner"], processor=processor)
    with hvprune.attach(model, METHODS["hivtp-fixed"], processor=processor):
        pass


def test_saved_processor_keeps_the_budget(tmp_path):
    model, processor = tiny("clip")
    with hvprune.attach(model, METHODS["vispruner"], processor=processor):
        inputs = ask(processor)
        processor.save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        again = ask(loaded)
        assert torch.equal(again["input_ids"], inputs["input_ids"])
        assert torch.equal(generate(model, again), generate(model, inputs))


@pytest.mark.parametrize("name, value", [("patch_size", 28), ("vision_feature_select_strategy", "full")])
def test_processor_of_another_model_is_refused(name, value):
    model, processor = tiny("clip")
    generate(model, ask(processor))  # transformers installs its own hooks at the first call
    before = snapshot(model, processor)[0]
    setattr(processor, name, value)
    with pytest.raises(ValueError, match="placeholders"):
        hvprune.attach(model, METHODS["vispruner"], processor=processor)
    assert snapshot(model, processor)[0] == before
    with hvprune.attach(model, METHODS["vispruner"]):  # it was let go
        pass


def test_processor_that_ignores_the_budget_is_refused():
    model, processor = tiny("clip")
    processor.replace_image_token = lambda *args, **kwargs: "<image>" * NUM_PATCHES
    with pytest.raises(
        ValueError, match="processor must be one that emits 20 placeholders for a 640x480 image, got 64"
    ):
        hvprune.attach(model, METHODS["vispruner"], processor=processor)


def test_filled_cache_with_a_prompt_to_shorten_is_an_error():
    model, processor = tiny("clip")
    inputs = ask(processor, PROMPTS[1:2])
    cache = model(**inputs, use_cache=True).past_key_values
    with hvprune.attach(model, METHODS["vispruner"]):
        with pytest.raises(ValueError, match="past_key_values must be of length 0"):
            generate(model, inputs, past_key_values=cache, num_tokens=12)
        longer = {name: torch.cat([inputs[name]] * 2, 1) for name in ("input_ids", "attention_mask")}
        with pytest.raises(ValueError, match="do not match"):  # the stock model's own check
            generate(model, {**inputs, **longer}, past_key_values=cache)


def test_unsupported_models_and_settings():
    model, _ = tiny("clip")
    other = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))
    with pytest.raises(TypeError, match=r"one of LlavaForConditionalGeneration, .*, got 'LlamaForCausalLM'"):
        hvprune.attach(other, METHODS["vispruner"])
    with pytest.raises(TypeError, match=r"method must be hvprune\.HIVTP"):
        hvprune.attach(model, "vispruner")
    with pytest.raises(ValueError, match=r"layers must be in \[0, 2\] for this model, got \(6, 7, 8\)"):
        hvprune.attach(model, HIVTP())
    with pytest.raises(ValueError, match=r"num_tokens must be .* N=64, got 65"):
        hvprune.attach(model, VisPruner(num_tokens=65))
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(TypeError, match="vision_feature_layer must be an int"):
        hvprune.attach(model, METHODS["vispruner"])


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: VisPruner(num_tokens=0), ValueError),
        (lambda: VisPruner(num_tokens=True), TypeError),
        (lambda: VisPruner(num_tokens=8, important_ratio=1.5), ValueError),
        (lambda: VisPruner(num_tokens=8, removals_per_round=0), ValueError),
        (lambda: VisPruner(num_tokens=8, per="batch"), ValueError),
        (lambda: HIVTP(layers=()), TypeError),
        (lambda: HIVTP(layers=(-1,)), ValueError),
        (lambda: HIVTP(regions=2), TypeError),
        (lambda: HIVTP(window=(0, 2)), ValueError),
        (lambda: HIVTP(keep_ratio=float("nan")), ValueError),
        (lambda: HIVTP(num_tokens=0), ValueError),
    ],
)
def test_method_settings(make, error):
    with pytest.raises(error, match=r"^(VisPruner|HIVTP): \w+ must be .*, got "):
        make()


def test_methods_are_values():
    assert HIVTP(layers=[6, 7, 8], regions=[2, 2]) == HIVTP()
    assert len({VisPruner(64), VisPruner(64), VisPruner(128)}) == 2


def test_import_does_not_need_transformers():
    code = "import sys, hvprune; hvprune.VisPruner(64); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_video_llava_prunes_its_images_and_leaves_its_videos(method):
    model, _ = tiny("video")
    torch.manual_seed(0)
    images, videos = torch.randn(2, 3, 112, 112), torch.randn(1, 2, 3, 112, 112)
    image, video = model.config.image_token_id, model.config.video_token_id
    ids = [9] + [image] * NUM_PATCHES + [10] + [video] * 2 * (NUM_PATCHES + 1) + [11] + [image] * NUM_PATCHES + [12]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    with torch.no_grad():
        features, selection = select_by_hand(model, method, images)
        kept = [image[mask] for image, mask in zip(features, selection.mask, strict=True)]
        projected = model.model.multi_modal_projector(torch.cat(kept)).split([len(image) for image in kept])
        embeds, mask = embed_by_hand(model, inputs, projected, [NUM_PATCHES, NUM_PATCHES])
        frames = model.model.get_video_features(videos, return_dict=True).pooler_output
        at = (embeds == model.get_input_embeddings()(torch.tensor(video))).all(-1, keepdim=True)
        embeds = embeds.masked_scatter(at, frames)
    expected = generate(model, {"inputs_embeds": embeds, "attention_mask": mask}, **LOGITS)
    with hvprune.attach(model, method):
        result = generate(model, {**inputs, "pixel_values_videos": videos, "pixel_values_images": images}, **LOGITS)
    assert_same_answer(result, expected, inputs)


def command(*arguments) -> int:
    parser = argparse.ArgumentParser(prog="hvprune")
    add_parser(parser.add_subparsers())
    quick = ["--max-new-tokens", "3", "--repeats", "1", "--device", "cpu"]
    parsed = parser.parse_args(["generate", *map(str, arguments), *quick])
    return parsed.run(parsed)


def test_generate_command(tmp_path, capsys):
    """Random weights; the overlay shows as many patches undimmed as were kept."""
    picture = tmp_path / "photo.png"
    photo(5, 300, 200).point(lambda value: value // 2 + 100).save(picture)  # no black patch, which dims to itself
    cells = {}
    for kept in (576, 130):
        overlay = tmp_path / f"{kept}.png"
        ask = (picture, "What is this?", "--random-weights", "tiny", "--num-tokens", kept, "--overlay", overlay)
        assert command(*ask) == 0
        table = dict(re.findall(r"^(unpruned|pruned) +(\d+ +\d+) .*ms", capsys.readouterr().out, re.MULTILINE))
        (before, prompt_before), (after, prompt_after) = (map(int, row.split()) for row in table.values())
        assert (before, after) == (576, kept)
        assert prompt_before - prompt_after == 576 - kept
        pixels = torch.frombuffer(bytearray(Image.open(overlay).tobytes()), dtype=torch.uint8).view(24, 14, 24, 14, 3)
        cells[kept] = pixels.transpose(1, 2).flatten(2)
    assert (cells[576] == cells[130]).all(-1).sum() == 130


def test_generate_command_with_a_checkpoint(tmp_path, capsys):
    model, processor = random_model("tiny")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    photo(5).save(tmp_path / "photo.png")
    assert command(tmp_path / "photo.png", "What is this?", "--model", tmp_path, "--method", "hivtp") == 0
    kept = int(re.search(r"^pruned +(\d+) .*ms", capsys.readouterr().out, re.MULTILINE)[1])
    assert 252 <= kept <= 288


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either --model PATH_OR_ID"),
        (["--model", "no/such-checkpoint"], "no checkpoint at 'no/such-checkpoint'"),
        (["--random-weights", "tiny", "--num-tokens", "577"], r"num_tokens must be in \[1, N\] with N=576"),
        (["--random-weights", "tiny", "--num-tokens", "0"], "num_tokens must be at least 1"),
    ],
)
def test_generate_command_errors(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    photo(5).save(tmp_path / "photo.png")
    assert command(tmp_path / "photo.png", "What is this?", *arguments) == 2
    assert re.search(f"^hvprune generate: .*{message}", capsys.readouterr().err, re.MULTILINE)
