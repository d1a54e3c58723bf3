"""hierarchical_select: HIVTP's two stages, against loops over regions and windows."""

from functools import partial

from hvprune import reference

from . import baselines
from ._harness import Rival, equal_to, hvprune_rivals
from .shapes import Case, cases, make_scores

CASES = cases("hierarchical_select", baselines=("released", "plain PyTorch"), any_grid=False)


def rivals(case: Case) -> dict[str, Rival]:
    scores, grid = make_scores(case), case.shape.grid
    expected = reference.hierarchical_select(scores, grid)
    kept = [row[:count] for row, count in zip(expected.indices, expected.counts, strict=True)]
    return {
        **hvprune_rivals(case, scores, grid, verify=equal_to(expected)),
        "released": Rival(
            lambda: [baselines.released_hierarchical_select(image, grid) for image in scores], equal_to(kept)
        ),
        "plain PyTorch": Rival(partial(baselines.plain_hierarchical_select, scores, grid), equal_to(expected)),
    }


def test_hierarchical_select(measure):
    measure()
