"""vispruner_select: from features and importance to the kept tokens, against matrix products in every round."""

from functools import partial

from hvprune import ops, reference

from . import baselines
from ._harness import Rival, as_float64, equal_in_float64, equal_to, hvprune_rivals
from .shapes import Case, cases, make_features, make_scores

BUDGETS = {"K=128": (128, 0.5), "K=64": (64, 0.75)}
# The released code fails on the odd number of residual tokens that SigLIP's 729 leave.
CASES = cases("vispruner_select", tuple(BUDGETS), ("released", "plain PyTorch"), any_grid=False)


def plain(features, importance, num_tokens, ratio):
    similarity = baselines.plain_cosine_similarity(features)
    return baselines.plain_diverse_select(similarity, importance, num_tokens, ratio)


def rivals(case: Case) -> dict[str, Rival]:
    num_tokens, ratio = BUDGETS[case.setting]
    features, importance = make_features(case), make_scores(case)
    # A pipeline is the same bits as its ops, whose accuracy bench_cosine_similarity verifies.
    similarity = ops.cosine_similarity(features)
    verify = equal_to(reference.diverse_select(similarity, importance, num_tokens, important_ratio=ratio))
    found = hvprune_rivals(case, features, importance, num_tokens, important_ratio=ratio, verify=verify)
    if case.baselines:
        inputs = (features, importance, num_tokens, ratio)
        exact = reference.vispruner_select(*as_float64(inputs[:3]), important_ratio=ratio).mask
        released = baselines.released_vispruner_select
        found["released"] = Rival(partial(released, *inputs), equal_in_float64(released, exact, *inputs))
        found["plain PyTorch"] = Rival(partial(plain, *inputs), equal_in_float64(plain, exact, *inputs))
    return found


def test_vispruner_select(measure):
    measure()
