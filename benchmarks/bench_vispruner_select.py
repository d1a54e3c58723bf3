"""vispruner_select: from features and importance to the kept tokens, against matrix products in every round."""

from hvprune import ops, reference

from . import baselines
from ._floor import Work, selection_bytes
from ._harness import Rival, as_float64, equal_to, hvprune_rivals
from .bench_diverse_select import BUDGETS, rounds
from .shapes import Case, cases, make_features, make_scores

# The released code fails on the odd number of residual tokens that SigLIP's 729 leave.
CASES = cases("vispruner_select", tuple(BUDGETS), ("released", "plain PyTorch"), any_grid=False)


def work(case: Case) -> Work:
    """(B, N, C) features, importance and a Selection; C-term products of all pairs of residual tokens, once."""
    num_tokens, ratio = BUDGETS[case.setting]
    total, size = case.shape.num_tokens, case.dtype.itemsize
    left = rounds(total, num_tokens, ratio)[0]
    moved = case.batch * total * (case.shape.num_features + 1) * size + selection_bytes(case.batch, num_tokens, total)
    similarity = case.batch * total**2
    return Work(moved, flops=case.batch * left * (left - 1) * case.shape.num_features, held=16 * similarity)


def plain(features, importance, num_tokens, ratio):
    similarity = baselines.plain_cosine_similarity(features)
    return baselines.plain_diverse_select(similarity, importance, num_tokens, ratio)


def rivals(case: Case) -> dict[str, Rival]:
    num_tokens, ratio = BUDGETS[case.setting]
    features, importance = make_features(case), make_scores(case)

    def verify(backend):
        # A pipeline is the same bits as its ops, whose accuracy bench_cosine_similarity verifies.
        similarity = ops.cosine_similarity(features, backend=backend)
        return equal_to(reference.diverse_select(similarity, importance, num_tokens, important_ratio=ratio))

    inputs = (features, importance, num_tokens)
    found = hvprune_rivals(case, *inputs, important_ratio=ratio, verify=verify, per_backend=True)
    if case.baselines:
        inputs = (*inputs, ratio)
        exact = reference.vispruner_select(*as_float64(inputs[:3]), important_ratio=ratio).mask
        released = baselines.released_vispruner_select
        # Unrolled, the rounds of more than one image are too much for torch.compile.
        compiles = case.batch == 1 and case.shape.num_tokens < 1000
        found["released"] = Rival(released, inputs, equal_to(exact), in_float64=True, compiles=compiles)
        found["plain PyTorch"] = Rival(plain, inputs, equal_to(exact), in_float64=True, compiles=compiles)
    return found


def test_vispruner_select(measure):
    measure()
