"""hivtp_select: from Q and K of three layers to the kept tokens."""

from functools import partial

from hvprune import ops, reference

from . import baselines
from ._harness import Rival, as_float64, equal_in_float64, equal_to, hvprune_rivals
from .shapes import Case, cases, make_queries_and_keys

CASES = cases("hivtp_select", baselines=("released", "plain PyTorch"), any_grid=False)


def released(queries, keys, grid, prefix):
    importance = baselines.released_mean_attention(baselines.attention_maps(queries, keys), prefix)
    return [baselines.released_hierarchical_select(image, grid) for image in importance]


def plain(queries, keys, grid, prefix):
    return baselines.plain_hierarchical_select(baselines.plain_mean_importance(queries, keys, prefix), grid)


def rivals(case: Case) -> dict[str, Rival]:
    grid, prefix = case.shape.grid, case.shape.num_prefix_tokens
    queries, keys = make_queries_and_keys(case)
    # A pipeline is the same bits as its ops, whose accuracy bench_attention_importance verifies.
    importance = ops.attention_importance(queries, keys, num_prefix_tokens=prefix)
    verify = equal_to(reference.hierarchical_select(importance, grid))
    found = hvprune_rivals(case, queries, keys, grid, num_prefix_tokens=prefix, verify=verify)
    if case.baselines:
        inputs = (queries, keys, grid, prefix)
        exact = reference.hivtp_select(*as_float64([queries, keys]), grid, num_prefix_tokens=prefix)
        kept = [row[:count] for row, count in zip(exact.indices, exact.counts, strict=True)]
        found["released"] = Rival(partial(released, *inputs), equal_in_float64(released, kept, *inputs))
        found["plain PyTorch"] = Rival(partial(plain, *inputs), equal_in_float64(plain, exact, *inputs))
    return found


def test_hivtp_select(measure):
    measure()
