"""hierarchical_select: HIVTP's two stages, against loops over regions and windows."""

from hvprune import reference

from . import baselines
from ._floor import Work, selection_bytes
from ._harness import TOPK, Rival, equal_to, hvprune_rivals
from .shapes import Case, cases, make_scores

CASES = cases("hierarchical_select", baselines=("released", "plain PyTorch", TOPK), any_grid=False)


def most_kept(grid: tuple[int, int]) -> int:
    """A quarter of each of 2 x 2 regions and a token of each 2 x 2 window."""
    kept = 0
    for height in (grid[0] // 2, grid[0] - grid[0] // 2):
        for width in (grid[1] // 2, grid[1] - grid[1] // 2):
            kept += height * width // 4 + ((height + 1) // 2) * ((width + 1) // 2)
    return kept


def work(case: Case) -> Work:
    """(B, N) scores and a Selection; each score is compared at least once."""
    total = case.shape.num_tokens
    moved = case.batch * total * case.dtype.itemsize + selection_bytes(case.batch, most_kept(case.shape.grid), total)
    return Work(moved, flops=case.batch * total)


def rivals(case: Case) -> dict[str, Rival]:
    scores, grid = make_scores(case), case.shape.grid
    expected = reference.hierarchical_select(scores, grid)
    kept = [row[:count] for row, count in zip(expected.indices, expected.counts, strict=True)]
    best = scores.argsort(dim=-1, descending=True)[:, : most_kept(grid)]
    found = hvprune_rivals(case, scores, grid, verify=equal_to(expected))
    if case.baselines:
        released = Rival(baselines.released_for_each_image, (scores, grid), equal_to(kept), compiles=case.batch == 1)
        plain = Rival(baselines.plain_hierarchical_select, (scores, grid), equal_to(expected), compiles=True)
        topk = Rival(baselines.topk, (scores, most_kept(grid)), equal_to(best))
        found |= {"released": released, "plain PyTorch": plain, TOPK: topk}
    return found


def test_hierarchical_select(measure):
    measure()
