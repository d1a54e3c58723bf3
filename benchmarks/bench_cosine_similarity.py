"""cosine_similarity: all pairs of tokens, against a normalisation and a matrix product."""

from functools import partial

from hvprune import reference

from . import baselines
from ._harness import Rival, hvprune_rivals, no_worse_than_torch
from .shapes import Case, cases, make_features

CASES = cases("cosine_similarity", baselines=("plain PyTorch",))


def rivals(case: Case) -> dict[str, Rival]:
    features = make_features(case)
    plain = partial(baselines.plain_cosine_similarity, features)
    verify = no_worse_than_torch(reference.cosine_similarity(features.double()), plain())
    return {
        **hvprune_rivals(case, features, verify=verify),
        "plain PyTorch": Rival(plain, verify),
    }


def test_cosine_similarity(measure):
    measure()
