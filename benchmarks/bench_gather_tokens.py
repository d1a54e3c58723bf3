"""gather_tokens: the kept rows, against boolean indexing and torch.gather."""

from functools import partial

from hvprune import reference

from . import baselines
from ._harness import Rival, equal_to, hvprune_rivals
from .shapes import Case, cases, make_features, make_scores

CASES = cases("gather_tokens", ("K=128",), ("released", "plain PyTorch"))


def rivals(case: Case) -> dict[str, Rival]:
    features = make_features(case)
    selection = reference.hierarchical_select(make_scores(case), case.shape.grid, num_tokens=128)
    verify = equal_to(reference.gather_tokens(features, selection))
    return {
        **hvprune_rivals(case, features, selection, verify=verify),
        "released": Rival(partial(baselines.released_gather_tokens, features, selection.mask), verify),
        "plain PyTorch": Rival(partial(baselines.plain_gather_tokens, features, selection.indices), verify),
    }


def test_gather_tokens(measure):
    measure()
