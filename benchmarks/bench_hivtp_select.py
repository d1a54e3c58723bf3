"""hivtp_select: from Q and K of three layers to the kept tokens."""

from hvprune import ops, reference

from . import baselines, bench_attention_importance, bench_hierarchical_select
from ._floor import Work, selection_bytes
from ._harness import Rival, as_float64, equal_to, hvprune_rivals
from .shapes import Case, cases, make_queries_and_keys

CASES = cases("hivtp_select", baselines=("released", "plain PyTorch"), any_grid=False)


def work(case: Case) -> Work:
    """That of attention_importance on all rows, with a Selection in place of its result."""
    shape = case.shape
    importance = bench_attention_importance.work(case)
    width = bench_hierarchical_select.most_kept(shape.grid)
    result = selection_bytes(case.batch, width, shape.num_tokens)
    in_float64 = importance.held_by_baselines * 8 // case.dtype.itemsize
    moved = importance.bytes - 4 * case.batch * shape.num_tokens + result
    return importance._replace(bytes=moved, held=0, held_by_baselines=in_float64)


def released(queries, keys, grid, prefix):
    importance = baselines.released_mean_attention(baselines.attention_maps(queries, keys), prefix)
    return baselines.released_for_each_image(importance, grid)


def plain(queries, keys, grid, prefix):
    return baselines.plain_hierarchical_select(baselines.plain_mean_importance(queries, keys, prefix), grid)


def rivals(case: Case) -> dict[str, Rival]:
    grid, prefix = case.shape.grid, case.shape.num_prefix_tokens
    queries, keys = make_queries_and_keys(case)

    def verify(backend):
        # A pipeline is the same bits as its ops, whose accuracy bench_attention_importance verifies.
        importance = ops.attention_importance(queries, keys, num_prefix_tokens=prefix, backend=backend)
        return equal_to(reference.hierarchical_select(importance, grid))

    found = hvprune_rivals(case, queries, keys, grid, num_prefix_tokens=prefix, verify=verify, per_backend=True)
    if case.baselines:
        inputs = (queries, keys, grid, prefix)
        exact = reference.hivtp_select(*as_float64([queries, keys]), grid, num_prefix_tokens=prefix)
        kept = [row[:count] for row, count in zip(exact.indices, exact.counts, strict=True)]
        found["released"] = Rival(released, inputs, equal_to(kept), in_float64=True, compiles=case.batch == 1)
        found["plain PyTorch"] = Rival(plain, inputs, equal_to(exact), in_float64=True, compiles=True)
    return found


def test_hivtp_select(measure):
    measure()
