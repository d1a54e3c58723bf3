"""hvprune.attach on LLaVA-NeXT: tiles, unpadding and newlines, against packing by hand."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoProcessor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

import hvprune
from hvprune import HIVTP, VisPruner, ops
from tiny_llava import GRID, NUM_PATCHES, PINPOINTS, SIDE, embed_by_hand, photo, tiny

LAYERS = (0, 1)
METHODS = {
    "vispruner": VisPruner(num_tokens=10),
    "vispruner-total": VisPruner(num_tokens=37, per="image"),
    "hivtp-fixed": HIVTP(layers=LAYERS, num_tokens=12),
    "hivtp-total": HIVTP(layers=LAYERS, num_tokens=41, per="image"),
    "hivtp-natural": HIVTP(layers=LAYERS),
}
PROMPTS = ["no picture", "<image> what?", "<image><image> or <image>?"]
# Width and height: padded above and below, left and right, three tiles in a row, and a single square.
SIZES = [(150, 101), (70, 200), (300, 60), (90, 90)]
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(processor):
    images = [photo(seed, *size) for seed, size in enumerate(SIZES)]
    return processor(images=images, text=list(PROMPTS), return_tensors="pt", padding=True)


def generate(model, inputs, **options):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    torch.manual_seed(0)
    return model.generate(**inputs, **options)


def kept_by_hand(model, method, pixels, size):
    """For one image its patch features (tiles, N, C), the kept mask (tiles, N) and where each patch of the whole
    map (rows, columns) that unpadding leaves comes from."""
    rows, columns = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    tower, tiles = model.model.vision_tower, 1 + rows * columns
    hidden_states = tower(pixels[:tiles], output_hidden_states=True).hidden_states
    features = hidden_states[-2][:, 1:]
    whole = torch.arange(NUM_PATCHES, tiles * NUM_PATCHES).view(rows, columns, GRID, GRID)
    whole = unpad_image(whole.permute(0, 2, 1, 3).reshape(1, rows * GRID, columns * GRID), size)[0]

    captured = method.layers if isinstance(method, HIVTP) else (2,)
    queries, keys = [], []
    for index in captured:
        layer = tower.encoder.layers[index]
        normed = layer.layer_norm1(hidden_states[index])
        queries.append(layer.self_attn.q_proj(normed).unflatten(-1, (2, -1)).transpose(1, 2))
        keys.append(layer.self_attn.k_proj(normed).unflatten(-1, (2, -1)).transpose(1, 2))
    scores = ops.attention_importance(queries, keys, rows="all" if isinstance(method, HIVTP) else "cls")

    survivors = [list(range(NUM_PATCHES))] + [[] for _ in range(tiles - 1)]
    for number in sorted(whole.flatten().tolist()):
        survivors[number // NUM_PATCHES].append(number % NUM_PATCHES)
    budgets = budgets_by_hand(method, [len(tile) for tile in survivors])
    mask = torch.zeros(tiles, NUM_PATCHES, dtype=torch.bool)
    for tile, (patches, budget) in enumerate(zip(survivors, budgets, strict=True)):
        if not patches or budget == 0:
            continue
        height = len({patch // GRID for patch in patches})
        if isinstance(method, HIVTP):
            grid = (height, len(patches) // height)
            selection = ops.hierarchical_select(scores[tile : tile + 1, patches], grid, num_tokens=budget)
        else:
            selection = ops.vispruner_select(
                features[tile : tile + 1, patches], scores[tile : tile + 1, patches], budget
            )
        mask[tile, torch.tensor(patches)[selection.mask[0]]] = True
    return features, mask, whole


def budgets_by_hand(method, sizes):
    if method.num_tokens is None:
        return [None] * len(sizes)
    if method.per == "tile":
        return [min(method.num_tokens, size) for size in sizes]
    exact = [method.num_tokens * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    while sum(shares) < method.num_tokens:  # the largest remainder next, the earlier tile first
        tile = max(range(len(sizes)), key=lambda i: (exact[i] - shares[i], -i))
        shares[tile] += 1
    return shares


def prune_by_hand(model, method, inputs):
    """inputs_embeds, attention_mask and the kept tokens of each image, newlines included."""
    images, given = [], []
    newline = model.model.image_newline[None]
    for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
        features, mask, whole = kept_by_hand(model, method, pixels, size)
        projected = model.model.multi_modal_projector(features[mask])
        place = {number: row for row, number in enumerate(mask.flatten().nonzero().flatten().tolist())}
        rows = [projected[place[number]][None] for number in range(NUM_PATCHES) if number in place]
        for line in whole.tolist():
            rows += [projected[place[number]][None] for number in line if number in place]
            rows.append(newline)
        images.append(torch.cat(rows))
        given.append(NUM_PATCHES + whole.numel() + len(whole))
    return *embed_by_hand(model, inputs, images, given), [len(image) for image in images]


@pytest.mark.parametrize("with_processor", [True, False], ids=["processor", "stock-processor"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_generate_equals_packing_by_hand(method, with_processor):
    model, processor = tiny("next")
    stock_inputs = ask(processor)
    with torch.no_grad():
        embeds, mask, kept = prune_by_hand(model, method, stock_inputs)
    expected = generate(model, {"inputs_embeds": embeds, "attention_mask": mask}, **LOGITS)
    with hvprune.attach(model, method, processor=processor if with_processor else None):
        inputs = ask(processor)
        result = generate(model, inputs, **LOGITS)
        if with_processor and method.num_tokens:
            placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
            assert placeholders == [0, kept[0], sum(kept[1:])]
            counts = processor._get_num_multimodal_tokens(image_sizes=inputs["image_sizes"].tolist())
            assert counts.num_image_tokens == kept
            with torch.no_grad():
                forward = model(inputs_embeds=embeds, attention_mask=mask).logits
                assert torch.equal(model(**inputs).logits, forward)
    assert torch.equal(result.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(result.sequences[:, inputs["input_ids"].shape[1] :], expected.sequences)
    for step, (got, want) in enumerate(zip(result.logits, expected.logits, strict=True)):
        assert torch.equal(got, want), f"logits of step {step} differ by {(got - want).abs().max()}"
    assert torch.equal(ask(processor)["input_ids"], stock_inputs["input_ids"])


@pytest.mark.parametrize(
    "method",
    [
        VisPruner(num_tokens=NUM_PATCHES),
        VisPruner(num_tokens=10**6, per="image"),
        HIVTP(layers=LAYERS, num_tokens=NUM_PATCHES),
        HIVTP(layers=LAYERS, keep_ratio=1.0),
    ],
    ids=["vispruner", "vispruner-total", "hivtp-fixed", "hivtp-natural"],
)
def test_keeping_everything_is_the_stock_model(method):
    model, processor = tiny("next")
    inputs = ask(processor)
    expected = generate(model, inputs, **LOGITS)
    with hvprune.attach(model, method, processor=processor):
        assert torch.equal(ask(processor)["input_ids"], inputs["input_ids"])
        result = generate(model, inputs, **LOGITS)
    for got, want in zip(result.logits, expected.logits, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("method", [METHODS["vispruner"], METHODS["hivtp-natural"]], ids=["fixed", "natural"])
def test_generate_modes(method, options):
    model, processor = tiny("next")
    stock_inputs = ask(processor)
    with torch.no_grad():
        embeds, mask, _ = prune_by_hand(model, method, stock_inputs)
    expected = generate(model, {"inputs_embeds": embeds, "attention_mask": mask}, **options)
    with hvprune.attach(model, method, processor=processor):
        inputs = ask(processor)
        result = generate(model, inputs, **options)
    assert torch.equal(result[:, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("method", [METHODS["vispruner"], METHODS["hivtp-total"]], ids=["per-tile", "total"])
def test_processor_and_model_agree_on_random_sizes(method):
    model, processor = tiny("next")
    generator = random.Random(0)
    image_token = model.config.image_token_id
    seen = set()
    with hvprune.attach(model, method, processor=processor) as handle, torch.no_grad():
        for _ in range(200):
            size = generator.randint(16, 400), generator.randint(16, 400)
            inputs = processor(images=photo(0, *size), text="<image>", return_tensors="pt")
            ids = inputs.pop("input_ids")
            inputs.pop("attention_mask")
            (features,) = model.model.get_image_features(**inputs, return_dict=True).pooler_output
            assert len(features) == int((ids == image_token).sum()), size
            counts = handle.last_selection.counts.tolist()
            assert sum(counts) <= len(features)
            seen.add((len(counts), len(features)))
    assert len(seen) > 20  # many different layouts, not one


def test_stock_counts_agree_with_the_stock_processor_on_random_sizes():
    """The plan that budgets come from, on the real tile size of 24 x 24 patches."""
    model, processor = tiny("next")
    model.config.vision_config.image_size = side = 24 * 14
    pinpoints = [[height // SIDE * side, width // SIDE * side] for height, width in PINPOINTS]
    model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = pinpoints
    generator = random.Random(1)
    with hvprune.attach(model, VisPruner(num_tokens=32)) as handle:
        for _ in range(200):
            size = generator.randint(50, 2000), generator.randint(50, 2000)
            (count,) = handle._counts({"image_sizes": [size]}, None)
            assert count + 1 == processor._get_number_of_features(*size, side, side), size


def test_reloaded_processor_is_the_stock_one_and_still_answers(tmp_path):
    model, processor = tiny("next")
    stock_inputs = ask(processor)
    with hvprune.attach(model, METHODS["vispruner"], processor=processor):
        inputs = ask(processor)
        processor.save_pretrained(tmp_path)
        again = ask(AutoProcessor.from_pretrained(tmp_path))
        assert torch.equal(again["input_ids"], stock_inputs["input_ids"])
        new = slice(-5, None)
        assert torch.equal(generate(model, again)[:, new], generate(model, inputs)[:, new])


def test_budget_of_one_call_and_prepare():
    model, processor = tiny("next")
    stock_inputs = ask(processor)
    with torch.no_grad():
        embeds, mask, _ = prune_by_hand(model, VisPruner(num_tokens=25), stock_inputs)
        by_hand = {"inputs_embeds": embeds, "attention_mask": mask}
        with hvprune.attach(model, METHODS["vispruner"], processor=processor) as handle:
            result = generate(model, ask(processor), num_tokens=25, **LOGITS)
            prepared = model(**handle.prepare(**stock_inputs, num_tokens=25))
        assert torch.equal(prepared.logits, model(**by_hand).logits)
        assert torch.equal(result.logits[0], generate(model, by_hand, **LOGITS).logits[0])


def test_compiled_tower_has_no_graph_break():
    model, processor = tiny("next")
    with hvprune.attach(model, METHODS["hivtp-natural"], processor=processor):
        inputs = ask(processor)
        expected = generate(model, inputs, **LOGITS)
        torch._dynamo.reset()
        model.model.vision_tower.compile(backend="eager", fullgraph=True)
        result = generate(model, inputs, **LOGITS)
    for got, want in zip(result.logits, expected.logits, strict=True):
        assert torch.equal(got, want)


def test_gradients_reach_the_tower():
    model, processor = tiny("next")
    method = METHODS["vispruner"]
    stock_inputs = ask(processor)
    embeds, mask, _ = prune_by_hand(model, method, stock_inputs)
    model(inputs_embeds=embeds, attention_mask=mask).logits.square().mean().backward()
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    want = model.get_parameter(name).grad.clone()
    model.zero_grad()
    with hvprune.attach(model, method, processor=processor):
        model(**ask(processor)).logits.square().mean().backward()
    assert want.abs().max() > 0
    torch.testing.assert_close(model.get_parameter(name).grad, want)


def test_detach_restores_everything():
    model, processor = tiny("next")
    generate(model, ask(processor))
    before = [set(vars(owner)) for owner in (model, model.model, processor)]
    expected = generate(model, ask(processor), **LOGITS)
    with hvprune.attach(model, METHODS["hivtp-fixed"], processor=processor):
        assert [set(vars(owner)) for owner in (model, model.model, processor)] != before
    assert [set(vars(owner)) for owner in (model, model.model, processor)] == before
    for got, want in zip(generate(model, ask(processor), **LOGITS).logits, expected.logits, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("method", [METHODS["vispruner"], METHODS["hivtp-natural"]], ids=["fixed", "natural"])
def test_processor_with_other_tiles_is_refused(method):
    model, processor = tiny("next")
    model.config.image_grid_pinpoints = PINPOINTS[:2]
    with pytest.raises(ValueError, match="placeholders"):
        hvprune.attach(model, method, processor=processor)
