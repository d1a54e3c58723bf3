"""Random shapes, settings and values: every backend equals the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvprune import reference
from hvprune.testing import (
    DTYPES,
    Backend,
    assert_no_worse_than_torch,
    assert_same_bits,
    backends,
    by_torch,
    numeric_oracle,
)

COMPILED_ANEW = Backend("triton", "cuda")  # for most shapes, which takes a second
SPECIAL = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, 2.0**-149])


def check(backend: Backend, property_of, examples: int = 200) -> None:
    """Runs ``property_of(data)`` with so many sets of random data."""
    examples = examples // 8 if backend == COMPILED_ANEW else examples
    options = settings(max_examples=examples, deadline=None, derandomize=True, print_blob=True)
    options(given(data=st.data())(property_of))()


@st.composite
def values(draw, *shape: int) -> torch.Tensor:
    """Normal numbers, few distinct ones, or special ones among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["normal", "few", "special"]))
    if kind == "few":
        x = x.round()
    elif kind == "special":
        chosen = torch.rand(shape, generator=generator) < 0.3
        x = torch.where(chosen, SPECIAL[torch.randint(0, len(SPECIAL), shape, generator=generator)], x)
    return x.to(draw(st.sampled_from(DTYPES)))


SIDE = st.integers(1, 12)
RATIO = st.floats(0.0, 1.0)


@pytest.mark.parametrize("backend", backends("hierarchical_select", interpreted=False), ids=str)
def test_hierarchical_select(backend):
    def equals_reference(data):
        grid, regions, window = (data.draw(st.tuples(SIDE, SIDE)) for _ in range(3))
        total = grid[0] * grid[1]
        scores = data.draw(values(data.draw(st.integers(0, 3)), total))
        num_tokens = data.draw(st.none() | st.integers(0, total))
        kwargs = {"regions": regions, "window": window, "keep_ratio": data.draw(RATIO), "num_tokens": num_tokens}
        expected = reference.hierarchical_select(scores, grid, **kwargs)
        assert_same_bits(backend.call("hierarchical_select", (scores.to(backend.device), grid), kwargs), expected)

    check(backend, equals_reference)


@pytest.mark.parametrize("backend", backends("diverse_select", interpreted=False), ids=str)
def test_diverse_select(backend):
    def equals_reference(data):
        batch, total = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))
        similarity, importance = data.draw(values(batch, total, total)), data.draw(values(batch, total))
        kwargs = {"important_ratio": data.draw(RATIO), "removals_per_round": data.draw(st.integers(1, 20))}
        kwargs["return_trace"] = True
        num_tokens = data.draw(st.integers(0, total))
        expected = reference.diverse_select(similarity, importance, num_tokens, **kwargs)
        args = similarity.to(backend.device), importance.to(backend.device), num_tokens
        assert_same_bits(backend.call("diverse_select", args, kwargs), expected)

    check(backend, equals_reference)


@pytest.mark.parametrize("backend", backends("gather_tokens", interpreted=False), ids=str)
def test_gather_tokens(backend):
    def equals_reference(data):
        batch, total, dim, width = (data.draw(st.integers(low, 20)) for low in (0, 1, 0, 0))
        features = data.draw(values(batch, total, dim))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
        indices = torch.randint(-1, total, (batch, width), generator=generator)
        kwargs = {"pad_value": data.draw(st.floats(width=32))}
        expected = reference.gather_tokens(features, indices, **kwargs)
        args = features.to(backend.device), indices.to(backend.device)
        assert_same_bits(backend.call("gather_tokens", args, kwargs), expected)

    check(backend, equals_reference)


@pytest.mark.parametrize("backend", backends("attention_importance", interpreted=False), ids=str)
def test_attention_importance(backend):
    def equals_reference(data):
        batch = 64  # errors of few numbers are luck: one that PyTorch happens to round right would allow none
        heads, length, dim = (data.draw(st.integers(1, most)) for most in (3, 70, 140))
        dtype = data.draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
        queries, keys = (torch.randn(batch, heads, length, dim, generator=generator).to(dtype) for _ in range(2))
        kwargs = {"num_prefix_tokens": data.draw(st.integers(0, length - 1))}
        kwargs["rows"] = "all" if kwargs["num_prefix_tokens"] == 0 else data.draw(st.sampled_from(["all", "cls"]))
        result = backend.call("attention_importance", (queries.to(backend.device), keys.to(backend.device)), kwargs)
        oracle = numeric_oracle("attention_importance", (queries, keys), kwargs)
        assert_no_worse_than_torch(result.cpu(), oracle, by_torch("attention_importance", (queries, keys), kwargs))

    check(backend, equals_reference, examples=60)


@pytest.mark.parametrize("backend", backends("vispruner_select", interpreted=False), ids=str)
def test_vispruner_select_equals_its_ops(backend):
    def equals_reference(data):
        batch, total, dim = (data.draw(st.integers(low, most)) for low, most in ((0, 3), (1, 70), (1, 40)))
        features, importance = data.draw(values(batch, total, dim)), data.draw(values(batch, total))
        features, importance = features.to(backend.device), importance.to(backend.device)
        kwargs = {"important_ratio": data.draw(RATIO), "removals_per_round": data.draw(st.integers(1, 20))}
        num_tokens = data.draw(st.integers(0, total))
        similarity = backend.call("cosine_similarity", (features,), {})
        expected = backend.call("diverse_select", (similarity, importance, num_tokens), kwargs)
        assert_same_bits(backend.call("vispruner_select", (features, importance, num_tokens), kwargs), expected)

    check(backend, equals_reference, examples=100)
