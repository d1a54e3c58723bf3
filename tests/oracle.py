"""Validating oracles: is an output legal for scores a little off the float64 ones, and how far off?

Near ties make the exact result of floating-point scores a matter of their last bits. Each function here returns the
slack of an output: the smallest eps such that float64 scores moved by at most eps each would give exactly this
output; infinity if none would. A list x can be non-increasing after such moves if and only if (x_q - x_p) / 2 <= eps
for every p < q (isotonic distance in the maximum norm), which one running minimum finds.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from hvprune.reference.hierarchical_select import region_bounds


def slack_of_order(scores: Tensor, unordered_head: int = 0) -> float:
    """Slack of a list being in descending order; the first ``unordered_head`` entries only as a set."""
    head, tail = scores[:unordered_head], scores[unordered_head:]
    if not len(tail):
        return 0.0
    before = torch.cat([head.min().reshape(1) if len(head) else scores.new_tensor([math.inf]), tail[:-1]])
    lowest = before.cummin(0).values
    return max(0.0, (tail - lowest).max().item() / 2)


def slack_of_top(scores: Tensor, members: Tensor) -> float:
    """Slack of ``members`` being the highest of ``scores``."""
    others = torch.ones(len(scores), dtype=torch.bool).index_fill(0, members, False)
    if not len(members) or not others.any():
        return 0.0
    return max(0.0, (scores[others].max() - scores[members].min()).item() / 2)


def hivtp_slack(scores: Tensor, kept: Tensor, winners: Tensor, grid: tuple[int, int]) -> float:
    """Slack of one image's (N,) masks in the released setting: 2 x 2 regions, ratio 0.25, 2 x 2 windows.

    ``kept`` by the global stage, ``winners`` of the windows, which are judged given ``kept``.
    """
    tokens = torch.arange(len(scores)).reshape(grid)
    worst = 0.0
    for top, bottom in region_bounds(grid[0], 2):
        for left, right in region_bounds(grid[1], 2):
            region = tokens[top:bottom, left:right]
            members = kept[region.flatten()].nonzero().flatten()
            if len(members) != int(0.25 * region.numel()):
                return math.inf
            worst = max(worst, slack_of_top(scores[region.flatten()], members))
            for y in range(0, region.shape[0], 2):
                for x in range(0, region.shape[1], 2):
                    window = region[y : y + 2, x : x + 2].flatten()
                    candidates = window[~kept[window]]
                    picked = winners[candidates].nonzero().flatten()
                    if len(picked) != min(1, len(candidates)) or winners[window[kept[window]]].any():
                        return math.inf
                    worst = max(worst, slack_of_top(scores[candidates], picked))
    return worst


def diverse_slack(
    similarity: Tensor,
    importance: Tensor,
    important: list[int],
    lists: list[list[int]],
    num_tokens: int,
    removals: int = 8,
) -> tuple[float, float]:
    """Slack of one image's trace in importance and in similarity, each round judged from the trace's own state."""
    total, num_important = len(importance), len(important)
    if sorted(important + lists[0]) != list(range(total)) or len(lists[0]) < num_tokens - num_important:
        return math.inf, math.inf
    order_slack = slack_of_order(importance[important + lists[0]], num_important)
    worst = 0.0
    for state, following in itertools.pairwise(lists):
        a, b = state[0::2], state[1::2]
        removed_count = min(removals, len(state) - num_tokens + num_important, len(a))
        kept = len(a) - removed_count
        if following[kept:] != b or len(set(following[:kept])) != kept or not set(following[:kept]) <= set(a):
            return order_slack, math.inf
        removed = [token for token in a if token not in following[:kept]]
        scores = similarity[a][:, b].max(1).values if b else similarity.new_full((len(a),), -math.inf)
        by_token = dict(zip(a, scores.tolist(), strict=True))
        ordered = torch.tensor([by_token[token] for token in removed + following[:kept]], dtype=torch.float64)
        if b:
            worst = max(worst, slack_of_order(ordered, removed_count))
    return order_slack, worst if len(lists[-1]) == num_tokens - num_important else math.inf
