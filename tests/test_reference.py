"""The reference against plain Python loops over lists, and in float64."""

from __future__ import annotations

import math

import pytest
import torch

from hvprune import reference
from hvprune.testing import CASES

LIMIT = 2000  # elements; more take too long in loops


def better(values: list[float], i: int, j: int) -> bool:
    """Whether token i comes before token j: higher value, NaN last, then the lower index."""
    a, b = values[i], values[j]
    if math.isnan(a) or math.isnan(b):
        return (math.isnan(b) and not math.isnan(a)) or (math.isnan(a) == math.isnan(b) and i < j)
    return a > b or (a == b and i < j)


def ranked(values: list[float], tokens: list[int]) -> list[int]:
    """Tokens, best first, by selection sort."""
    left, order = list(tokens), []
    while left:
        best = left[0]
        for token in left[1:]:
            best = token if better(values, token, best) else best
        left.remove(best)
        order.append(best)
    return order


def hierarchical_in_loops(values, grid, regions=(2, 2), keep_ratio=0.25, window=(2, 2), num_tokens=None) -> set[int]:
    height, width = grid
    kept, winners = [], []
    for region_y in range(regions[0]):
        for region_x in range(regions[1]):
            rows = range(region_y * height // regions[0], (region_y + 1) * height // regions[0])
            columns = range(region_x * width // regions[1], (region_x + 1) * width // regions[1])
            tokens = [y * width + x for y in rows for x in columns]
            kept += ranked(values, tokens)[: math.floor(keep_ratio * len(tokens))]
            for y in range(0, len(rows), window[0]):
                for x in range(0, len(columns), window[1]):
                    free = [
                        row * width + column
                        for row in rows[y : y + window[0]]
                        for column in columns[x : x + window[1]]
                        if row * width + column not in kept
                    ]
                    winners += ranked(values, free)[:1]
    if num_tokens is None:
        return set(kept + winners)
    rest = [token for token in range(height * width) if token not in kept and token not in winners]
    return set((ranked(values, kept) + ranked(values, winners) + ranked(values, rest))[:num_tokens])


def diverse_in_loops(similarity, values, num_tokens, important_ratio=0.5, removals_per_round=8) -> list[list[int]]:
    """Important tokens, then the residual list before the first and after every round."""
    order = ranked(values, list(range(len(values))))
    num_important = int(num_tokens * important_ratio)
    residual, lists = order[num_important:], [order[:num_important], order[num_important:]]
    while len(residual) > num_tokens - num_important:
        a, b = residual[0::2], residual[1::2]
        scores = [max([-math.inf] + [similarity[i][j] for j in b if not math.isnan(similarity[i][j])]) for i in a]
        removals = min(removals_per_round, len(residual) - num_tokens + num_important, len(a))
        residual = [a[i] for i in ranked(scores, list(range(len(a))))[removals:]] + b
        lists.append(residual)
    return lists


@pytest.mark.parametrize("case", CASES["hierarchical_select"], ids=str)
def test_hierarchical_select(case):
    (scores, grid), kwargs = case.inputs()
    if scores.numel() > LIMIT:
        scores = scores[:1]
    selection = reference.hierarchical_select(scores, grid, **kwargs)
    for image, values in enumerate(scores.tolist()):
        expected = sorted(hierarchical_in_loops(values, grid, **kwargs))
        width = selection.indices.shape[1]
        assert selection.indices[image].tolist() == expected + [-1] * (width - len(expected))
        assert selection.counts[image] == len(expected)
        assert selection.mask[image].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("case", [case for case in CASES["diverse_select"] if "CLIP" not in case.name], ids=str)
def test_diverse_select(case):
    (similarity, importance, num_tokens), kwargs = case.inputs()
    kwargs.pop("return_trace")
    if importance.shape[1] > 100:
        similarity, importance, num_tokens = similarity[:1, :100, :100], importance[:1, :100], min(num_tokens, 40)
    selection, trace = reference.diverse_select(similarity, importance, num_tokens, return_trace=True, **kwargs)
    for image in range(len(importance)):
        important, *lists = diverse_in_loops(
            similarity[image].tolist(), importance[image].tolist(), num_tokens, **kwargs
        )
        assert [[token for token in row if token >= 0] for row in trace[image].tolist()] == lists
        assert selection.indices[image].tolist() == sorted(important + lists[-1])
        assert selection.counts[image] == num_tokens


def test_attention_importance_by_hand():
    # One head, D = 1, two patches after the CLS token; scores 0 give each of the three keys a third.
    queries, keys = torch.tensor([0.0, 1.0, 2.0]).reshape(1, 1, 3, 1), torch.tensor([0.0, 0.0, 1.0]).reshape(1, 1, 3, 1)
    rows = [[math.exp(q * k) / sum(math.exp(q * other) for other in (0, 0, 1)) for k in (0, 1)] for q in (0, 1, 2)]
    mean = [sum(row[i] for row in rows) / 3 for i in (0, 1)]
    torch.testing.assert_close(reference.attention_importance(queries, keys), torch.tensor([mean]))
    torch.testing.assert_close(reference.attention_importance(queries, keys, rows="cls"), torch.tensor([rows[0]]))


def test_cosine_similarity_by_hand():
    features = torch.tensor([[[3.0, 4.0], [4.0, 3.0], [0.0, 0.0], [math.inf, 0.0], [-6.0, -8.0]]])
    low = -math.inf
    expected = [[1, 0.96, 0, low, -1], [0.96, 1, 0, low, -0.96], [0, 0, 0, low, 0], [low] * 5, [-1, -0.96, 0, low, 1]]
    torch.testing.assert_close(reference.cosine_similarity(features), torch.tensor([expected]))


@pytest.mark.parametrize("op", ["aggregate_attention", "attention_importance", "cosine_similarity"])
def test_float64_stays_float64(op):
    args, kwargs = CASES[op][1].inputs(torch.float64)
    assert getattr(reference, op)(*args, **kwargs).dtype == torch.float64
