"""cosine_similarity: all pairs of tokens, against a normalisation and a matrix product."""

from hvprune import reference

from . import baselines
from ._floor import Work
from ._harness import Rival, hvprune_rivals, no_worse_than_torch
from .shapes import Case, cases, make_features

CASES = cases("cosine_similarity", baselines=("plain PyTorch",))


def work(case: Case) -> Work:
    """(B, N, C) features and (B, N, N), symmetric: N * (N + 1) / 2 products of C terms."""
    total, size = case.shape.num_tokens, case.dtype.itemsize
    moved = case.batch * total * (case.shape.num_features + total) * size
    return Work(moved, flops=case.batch * total * (total + 1) * case.shape.num_features)


def rivals(case: Case) -> dict[str, Rival]:
    features = make_features(case)
    plain = baselines.plain_cosine_similarity
    verify = no_worse_than_torch(reference.cosine_similarity(features.double()), plain(features))
    return {
        **hvprune_rivals(case, features, verify=verify),
        "plain PyTorch": Rival(plain, (features,), verify, compiles=True),
    }


def test_cosine_similarity(measure):
    measure()
