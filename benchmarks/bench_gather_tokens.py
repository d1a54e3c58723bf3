"""gather_tokens: the kept rows, against boolean indexing and torch.gather."""

from hvprune import reference

from . import baselines
from ._floor import Work
from ._harness import Rival, equal_to, hvprune_rivals
from .shapes import Case, cases, make_features, make_scores

CASES = cases("gather_tokens", ("K=128",), ("released", "plain PyTorch"))


def work(case: Case) -> Work:
    """The kept rows, read and written, and their int64 indices."""
    return Work(case.batch * 128 * (2 * case.shape.num_features * case.dtype.itemsize + 8))


def rivals(case: Case) -> dict[str, Rival]:
    features = make_features(case)
    selection = reference.hierarchical_select(make_scores(case), case.shape.grid, num_tokens=128)
    verify = equal_to(reference.gather_tokens(features, selection))
    return {
        **hvprune_rivals(case, features, selection, verify=verify),
        "released": Rival(baselines.released_gather_tokens, (features, selection.mask), verify, compiles=True),
        "plain PyTorch": Rival(baselines.plain_gather_tokens, (features, selection.indices), verify, compiles=True),
    }


def test_gather_tokens(measure):
    measure()
