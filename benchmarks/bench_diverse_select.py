"""diverse_select: VisPruner's rounds on a given similarity; the released code never has one (see vispruner_select)."""

from functools import partial

from hvprune import reference

from . import baselines
from ._harness import Rival, equal_to, hvprune_rivals
from .shapes import Case, cases, make_features, make_scores

BUDGETS = {"K=128": (128, 0.5), "K=64": (64, 0.75)}
CASES = cases("diverse_select", tuple(BUDGETS), ("plain PyTorch",))


def rivals(case: Case) -> dict[str, Rival]:
    num_tokens, ratio = BUDGETS[case.setting]
    similarity = reference.cosine_similarity(make_features(case))
    inputs = (similarity, make_scores(case), num_tokens)
    expected = reference.diverse_select(*inputs, important_ratio=ratio)
    return {
        **hvprune_rivals(case, *inputs, important_ratio=ratio, verify=equal_to(expected)),
        "plain PyTorch": Rival(partial(baselines.plain_diverse_select, *inputs, ratio), equal_to(expected.mask)),
    }


def test_diverse_select(measure):
    measure()
