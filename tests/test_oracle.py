"""End to end: the pipelines' results are legal for float64 scores within the stated bounds, and the oracle that says so
rejects corrupted ones."""

from __future__ import annotations

import math

import pytest
import torch

import hvprune
from hvprune import reference
from hvprune.testing import backends

from oracle import diverse_slack, hivtp_slack, slack_of_order, slack_of_top  # isort: skip

SIMILARITY_BOUND = {torch.float32: 2.0**-19, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-10}
NUM_TOKENS = 128


def clip_like_features(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """24 x 24 patches of 256 dimensions that vary smoothly over the image, as an encoder's do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 256, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (24, 24), mode="bilinear").flatten(2).mT
    return (smooth + 0.5 * torch.randn(1, 576, 256, generator=generator) + 0.3).to(dtype)


def lists_of(selection: hvprune.Selection, trace: torch.Tensor) -> tuple[list[int], list[list[int]]]:
    lists = [[token for token in row if token >= 0] for row in trace[0].tolist()]
    important = [token for token in range(selection.mask.shape[1]) if token not in lists[0]]
    return important, lists


def traced(backend, features: torch.Tensor, importance: torch.Tensor):
    similarity = backend.call("cosine_similarity", (features.to(backend.device),), {})
    args = similarity, importance.to(backend.device), NUM_TOKENS
    selection, trace = backend.call("diverse_select", args, {"return_trace": True})
    assert torch.equal(
        selection.mask, backend.call("vispruner_select", (features.to(backend.device), *args[1:]), {}).mask
    )
    return lists_of(selection, trace)


@pytest.mark.parametrize("dtype", SIMILARITY_BOUND, ids=str)
@pytest.mark.parametrize("backend", backends("vispruner_select", interpreted=False), ids=str)
def test_vispruner_is_legal(backend, dtype):
    for seed in range(3):
        features = clip_like_features(seed, dtype)
        importance = torch.rand(1, 576, generator=torch.Generator().manual_seed(seed))
        important, lists = traced(backend, features, importance)
        similarity = reference.cosine_similarity(features.double())[0]
        order, rounds = diverse_slack(similarity, importance[0].double(), important, lists, NUM_TOKENS)
        assert order == 0.0 and rounds <= SIMILARITY_BOUND[dtype], (seed, order, rounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends("hivtp_select", interpreted=False), ids=str)
def test_hivtp_is_legal(backend, dtype):
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        queries, keys = (torch.randn(1, 4, 577, 64, generator=generator).to(dtype) for _ in range(2))
        args = queries.to(backend.device), keys.to(backend.device)
        union = backend.call("hivtp_select", args, {}).mask[0].cpu()
        kept = backend.call("hivtp_select", args, {"num_tokens": 144}).mask[0].cpu()  # the four quotas of 36
        scores = reference.attention_importance(queries.double(), keys.double())[0]
        # Scores are means of softmax rows, near 1 / 577: a relative error of 2^-18.
        assert (kept <= union).all() and hivtp_slack(scores, kept, union & ~kept, (24, 24)) <= 2.0**-18 / 577


@pytest.fixture(scope="module")
def sound():
    features = clip_like_features(0, torch.float32)
    importance = torch.rand(1, 576, generator=torch.Generator().manual_seed(0))
    important, lists = traced(backends("vispruner_select", interpreted=False)[-1], features, importance)
    return reference.cosine_similarity(features.double())[0], importance[0].double(), important, lists


def corrupt_swap(important, lists, r):
    i = r.randint(0, len(lists[4]) // 2 - 20)
    lists[4][i], lists[4][i + 8] = lists[4][i + 8], lists[4][i]


def corrupt_keep_removed(important, lists, r):
    removed = [token for token in lists[3] if token not in lists[4]]
    lists[4][r.randint(0, 20)] = removed[0]


def corrupt_take_from_b(important, lists, r):
    lists[4][r.randint(0, 20)] = lists[3][1]


def corrupt_order_of_b(important, lists, r):
    lists[4][-1], lists[4][-2] = lists[4][-2], lists[4][-1]


def corrupt_duplicate(important, lists, r):
    lists[4][0] = lists[4][1]


def corrupt_important(important, lists, r):
    i = r.randint(0, len(important) - 1)
    important[i], lists[0][-1] = lists[0][-1], important[i]


def corrupt_skip_round(important, lists, r):
    del lists[r.randint(1, len(lists) - 2)]


CORRUPTIONS = [value for name, value in sorted(globals().items()) if name.startswith("corrupt_")]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
def test_oracle_rejects(corrupt, sound):
    import random

    similarity, importance, important, lists = sound
    assert max(diverse_slack(similarity, importance, important, lists, NUM_TOKENS)) <= 2.0**-19
    for seed in range(25):
        bad_important, bad_lists = list(important), [list(row) for row in lists]
        corrupt(bad_important, bad_lists, random.Random(seed))
        slack = max(diverse_slack(similarity, importance, bad_important, bad_lists, NUM_TOKENS))
        assert slack > 2e-5, f"seed {seed}: slack {slack}"


def test_hivtp_oracle_rejects():
    scores = torch.rand(576, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = reference.hierarchical_select(scores[None], num_tokens=144).mask[0]
    winners = reference.hierarchical_select(scores[None]).mask[0] & ~kept
    assert hivtp_slack(scores, kept, winners, (24, 24)) == 0.0
    for mask in (kept, winners):
        for token in mask.nonzero().flatten().tolist():
            mask[token] = False
            assert hivtp_slack(scores, kept, winners, (24, 24)) > 1e-5  # dropped
            neighbour = token ^ 1  # of the same window and region
            if not kept[neighbour] and not winners[neighbour]:
                mask[neighbour] = True
                assert hivtp_slack(scores, kept, winners, (24, 24)) > 1e-5  # the wrong one
                mask[neighbour] = False
            mask[token] = True


def test_slack_by_hand():
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert slack_of_order(scores) == 0.5
    assert slack_of_order(scores, unordered_head=3) == 0.0
    assert slack_of_top(scores, torch.tensor([0, 2])) == 0.0
    assert slack_of_top(scores, torch.tensor([0, 1])) == 0.5
    assert math.isinf(diverse_slack(torch.eye(2), scores[:2], [0], [[0]], 2)[0])
