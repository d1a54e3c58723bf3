"""diverse_select: VisPruner's rounds on a given similarity; the released code never has one (see vispruner_select)."""

from hvprune import reference

from . import baselines
from ._floor import Work, selection_bytes
from ._harness import TOPK, Rival, equal_to, hvprune_rivals
from .shapes import Case, cases, make_features, make_scores

BUDGETS = {"K=128": (128, 0.5), "K=64": (64, 0.75)}
CASES = cases("diverse_select", tuple(BUDGETS), ("plain PyTorch", TOPK))


def rounds(total: int, num_tokens: int, ratio: float) -> list[int]:
    """The tokens left at the start of every round."""
    num_important = int(num_tokens * ratio)
    left, found = total - num_important, []
    while left > num_tokens - num_important:
        found.append(left)
        left -= min(8, left - (num_tokens - num_important))
    return found


def work(case: Case) -> Work:
    """The similarity of the residual tokens, importance and a Selection; a comparison per pair in every round.

    That the rounds follow each other is what a call waits for, and no part of the floor.
    """
    num_tokens, ratio = BUDGETS[case.setting]
    total, size = case.shape.num_tokens, case.dtype.itemsize
    left = rounds(total, num_tokens, ratio)
    moved = case.batch * (left[0] ** 2 + total) * size + selection_bytes(case.batch, num_tokens, total)
    return Work(moved, flops=case.batch * sum((n + 1) // 2 * (n // 2) for n in left))


def rivals(case: Case) -> dict[str, Rival]:
    num_tokens, ratio = BUDGETS[case.setting]
    similarity = reference.cosine_similarity(make_features(case))
    scores = make_scores(case)
    inputs = (similarity, scores, num_tokens)
    expected = reference.diverse_select(*inputs, important_ratio=ratio)
    best = scores.argsort(dim=-1, descending=True)[:, :num_tokens]
    # Unrolled, the rounds of more than one image are too much for torch.compile.
    compiles = case.batch == 1 and case.shape.num_tokens < 1000
    return {
        **hvprune_rivals(case, *inputs, important_ratio=ratio, verify=equal_to(expected)),
        "plain PyTorch": Rival(
            baselines.plain_diverse_select, (*inputs, ratio), equal_to(expected.mask), compiles=compiles
        ),
        TOPK: Rival(baselines.topk, (scores, num_tokens), equal_to(best)),
    }


def test_diverse_select(measure):
    measure()
