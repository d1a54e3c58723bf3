"""Every rejected argument: the type of the error and its whole message."""

from __future__ import annotations

import pytest
import torch

from hvprune import ops

X = torch.zeros
FLOATS = "a float32, float16 or bfloat16 tensor"
QK = X(2, 3, 10, 4)
ATTENTION = X(2, 3, 10, 10)
SIMILARITY, IMPORTANCE, FEATURES = X(2, 9, 9), X(2, 9), X(2, 9, 4)
INT64 = torch.zeros(2, 3, dtype=torch.int64)
DOUBLE = torch.float64

# op, positional arguments, keyword arguments, error, message less "<op>: "
REJECTED = [
    ("aggregate_attention", (5,), {}, TypeError, "attentions must be a tensor (B, H, L, L) or a non-empty sequence of them, got 5"),
    ("aggregate_attention", ([],), {}, TypeError, "attentions must be a tensor (B, H, L, L) or a non-empty sequence of them, got []"),
    ("aggregate_attention", ([1],), {}, TypeError, f"attentions must be {FLOATS} (B, H, L, L), got 1"),
    ("aggregate_attention", (X(2, 3, 4, 4, dtype=DOUBLE),), {}, TypeError, f"attentions must be {FLOATS} (B, H, L, L), got float64 (2, 3, 4, 4) on cpu"),
    ("aggregate_attention", (X(3, 4, 4),), {}, ValueError, "attentions must be a tensor (B, H, L, L), got float32 (3, 4, 4) on cpu"),
    ("aggregate_attention", (X(2, 3, 4, 5),), {}, ValueError, "attentions must be shaped (B, H, L, L) with H >= 1, got float32 (2, 3, 4, 5) on cpu"),
    ("aggregate_attention", (X(2, 0, 4, 4),), {}, ValueError, "attentions must be shaped (B, H, L, L) with H >= 1, got float32 (2, 0, 4, 4) on cpu"),
    ("aggregate_attention", ([ATTENTION, ATTENTION[:1]],), {}, ValueError, "attentions must be all shaped (2, 3, 10, 10) on cpu, got float32 (1, 3, 10, 10) on cpu"),
    ("aggregate_attention", ([ATTENTION, ATTENTION.half()],), {}, TypeError, "attentions must be of one dtype, torch.float32, got float16 (2, 3, 10, 10) on cpu"),
    ("aggregate_attention", (ATTENTION,), {"num_prefix_tokens": 10}, ValueError, "num_prefix_tokens must be in [0, L) with L=10, got 10"),
    ("aggregate_attention", (ATTENTION,), {"num_prefix_tokens": 1.0}, TypeError, "num_prefix_tokens must be an int, got 1.0"),
    ("aggregate_attention", (ATTENTION,), {"rows": "CLS"}, ValueError, "rows must be 'all' or 'cls', got 'CLS'"),
    ("aggregate_attention", (ATTENTION,), {"rows": "cls", "num_prefix_tokens": 0}, ValueError, "num_prefix_tokens must be at least 1 for rows='cls', got 0"),
    ("aggregate_attention", (ATTENTION,), {"backend": "gpu"}, ValueError, "backend must be 'auto' or one of ('cuda', 'triton', 'cpu', 'reference'), got 'gpu'"),
    ("attention_importance", (5, QK), {}, TypeError, "queries must be a tensor (B, H, L, D) or a non-empty sequence of them, got 5"),
    ("attention_importance", (QK, None), {}, TypeError, "keys must be a tensor (B, H, L, D) or a non-empty sequence of them, got None"),
    ("attention_importance", (QK, QK.half()), {}, TypeError, "keys must be of one dtype, torch.float32, got float16 (2, 3, 10, 4) on cpu"),
    ("attention_importance", (QK, QK[..., :2]), {}, ValueError, "keys must be all shaped (2, 3, 10, 4) on cpu, got float32 (2, 3, 10, 2) on cpu"),
    ("attention_importance", (QK, QK.to("meta")), {}, ValueError, "keys must be all shaped (2, 3, 10, 4) on cpu, got float32 (2, 3, 10, 4) on meta"),
    ("attention_importance", ([QK, QK], [QK]), {}, ValueError, "keys must be as many layers as queries, 2, got 1"),
    ("attention_importance", (QK[..., :0], QK[..., :0]), {}, ValueError, "queries must be shaped (B, H, L, D) with H >= 1 and D >= 1, got float32 (2, 3, 10, 0) on cpu"),
    ("attention_importance", (QK, QK), {"scale": "1"}, TypeError, "scale must be a float or None, got '1'"),
    ("attention_importance", (QK, QK), {"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be in [0, L) with L=10, got -1"),
    ("attention_importance", (QK, QK), {"logsumexp": 3}, TypeError, "logsumexp must be a tensor (B, H, L), a sequence of them or None, got 3"),
    ("attention_importance", (QK, QK), {"logsumexp": [QK[..., 0]] * 2}, ValueError, "logsumexp must be as many layers as queries, 1, got 2"),
    ("attention_importance", (QK, QK), {"logsumexp": QK[..., 0].half()}, TypeError, "logsumexp must be a float32 tensor (B, H, L), got float16 (2, 3, 10) on cpu"),
    ("attention_importance", (QK, QK), {"logsumexp": QK}, ValueError, "logsumexp must be shaped (2, 3, 10) on cpu, got float32 (2, 3, 10, 4) on cpu"),
    ("hierarchical_select", ([1.0],), {}, TypeError, f"scores must be {FLOATS} (B, N), got [1.0]"),
    ("hierarchical_select", (X(2, 9, dtype=torch.int64), (3, 3)), {}, TypeError, f"scores must be {FLOATS} (B, N), got int64 (2, 9) on cpu"),
    ("hierarchical_select", (X(9), (3, 3)), {}, ValueError, "scores must be a tensor (B, N), got float32 (9,) on cpu"),
    ("hierarchical_select", (X(2, 10),), {}, ValueError, "grid must be given when N=10 is not a square, got None"),
    ("hierarchical_select", (IMPORTANCE, (3, 4)), {}, ValueError, "grid must be (gh, gw) with gh * gw = N = 9, got (3, 4)"),
    ("hierarchical_select", (IMPORTANCE, 3), {}, TypeError, "grid must be a pair of ints (rows, columns), got 3"),
    ("hierarchical_select", (IMPORTANCE, (3, 3, 1)), {}, TypeError, "grid must be a pair of ints (rows, columns), got (3, 3, 1)"),
    ("hierarchical_select", (IMPORTANCE, (3.0, 3)), {}, TypeError, "grid must be an int, got 3.0"),
    ("hierarchical_select", (IMPORTANCE,), {"regions": (0, 2)}, ValueError, "regions must be a pair of ints of at least 1, got (0, 2)"),
    ("hierarchical_select", (IMPORTANCE,), {"window": (2, -1)}, ValueError, "window must be a pair of ints of at least 1, got (2, -1)"),
    ("hierarchical_select", (IMPORTANCE,), {"keep_ratio": 1.5}, ValueError, "keep_ratio must be in [0, 1], got 1.5"),
    ("hierarchical_select", (IMPORTANCE,), {"keep_ratio": float("nan")}, ValueError, "keep_ratio must be in [0, 1], got nan"),
    ("hierarchical_select", (IMPORTANCE,), {"keep_ratio": "all"}, TypeError, "keep_ratio must be a float, got 'all'"),
    ("hierarchical_select", (IMPORTANCE,), {"num_tokens": 10}, ValueError, "num_tokens must be in [0, N] with N=9, got 10"),
    ("hierarchical_select", (IMPORTANCE,), {"num_tokens": 2.0}, TypeError, "num_tokens must be an int, got 2.0"),
    ("hierarchical_select", (IMPORTANCE,), {"num_tokens": True}, TypeError, "num_tokens must be an int, got True"),
    ("cosine_similarity", (None,), {}, TypeError, f"features must be {FLOATS} (B, N, C), got None"),
    ("cosine_similarity", (X(2, 3),), {}, ValueError, "features must be a tensor (B, N, C), got float32 (2, 3) on cpu"),
    ("diverse_select", (SIMILARITY.long(), IMPORTANCE, 3), {}, TypeError, f"similarity must be {FLOATS} (B, N, N), got int64 (2, 9, 9) on cpu"),
    ("diverse_select", (SIMILARITY[:, :8], IMPORTANCE, 3), {}, ValueError, "similarity must be shaped (2, 9, 9) like importance, got float32 (2, 8, 9) on cpu"),
    ("diverse_select", (SIMILARITY.to("meta"), IMPORTANCE, 3), {}, ValueError, "similarity must be on cpu like importance, got float32 (2, 9, 9) on meta"),
    ("diverse_select", (SIMILARITY, IMPORTANCE.double(), 3), {}, TypeError, f"importance must be {FLOATS} (B, N), got float64 (2, 9) on cpu"),
    ("diverse_select", (SIMILARITY, IMPORTANCE, -1), {}, ValueError, "num_tokens must be in [0, N] with N=9, got -1"),
    ("diverse_select", (SIMILARITY, IMPORTANCE, None), {}, TypeError, "num_tokens must be an int, got None"),
    ("diverse_select", (SIMILARITY, IMPORTANCE, 3), {"important_ratio": -0.1}, ValueError, "important_ratio must be in [0, 1], got -0.1"),
    ("diverse_select", (SIMILARITY, IMPORTANCE, 3), {"removals_per_round": 0}, ValueError, "removals_per_round must be at least 1, got 0"),
    ("diverse_select", (SIMILARITY, IMPORTANCE, 3), {"return_trace": 1}, TypeError, "return_trace must be a bool, got 1"),
    ("gather_tokens", (FEATURES.long(), INT64), {}, TypeError, f"features must be {FLOATS} (B, N, C), got int64 (2, 9, 4) on cpu"),
    ("gather_tokens", (FEATURES, [0, 1]), {}, TypeError, "selection must be a Selection or int64 indices (B, M), got [0, 1]"),
    ("gather_tokens", (FEATURES, INT64.int()), {}, TypeError, "selection must be a Selection or int64 indices (B, M), got int32 (2, 3) on cpu"),
    ("gather_tokens", (FEATURES, INT64[:1]), {}, ValueError, "selection must be shaped (B, M) with B=2, got int64 (1, 3) on cpu"),
    ("gather_tokens", (FEATURES, INT64.to("meta")), {}, ValueError, "selection must be on cpu like features, got int64 (2, 3) on meta"),
    ("gather_tokens", (FEATURES, INT64), {"pad_value": None}, TypeError, "pad_value must be a float, got None"),
    ("hivtp_select", (QK, [QK, QK]), {}, ValueError, "keys must be as many layers as queries, 1, got 2"),
    ("hivtp_select", (X(2, 3, 9, 4), X(2, 3, 9, 4)), {}, ValueError, "grid must be given when N=8 is not a square, got None"),
    ("hivtp_select", (QK, QK), {"num_tokens": 12}, ValueError, "num_tokens must be in [0, N] with N=9, got 12"),
    ("hivtp_select", (QK, QK), {"grid": (2, 5)}, ValueError, "grid must be (gh, gw) with gh * gw = N = 9, got (2, 5)"),
    ("vispruner_select", (FEATURES[:1], IMPORTANCE, 3), {}, ValueError, "features must be shaped (B, N, C) with B=2, N=9 like importance, got float32 (1, 9, 4) on cpu"),
    ("vispruner_select", (FEATURES.to("meta"), IMPORTANCE, 3), {}, ValueError, "features must be on cpu like importance, got float32 (2, 9, 4) on meta"),
    ("vispruner_select", (FEATURES, IMPORTANCE, 10), {}, ValueError, "num_tokens must be in [0, N] with N=9, got 10"),
]  # fmt: skip


@pytest.mark.parametrize(
    "op, args, kwargs, error, message", REJECTED, ids=[f"{row[0]}-{i}" for i, row in enumerate(REJECTED)]
)
def test_message(op, args, kwargs, error, message):
    with pytest.raises(error) as caught:
        getattr(ops, op)(*args, **kwargs)
    assert type(caught.value) is error
    assert str(caught.value) == f"{op}: {message}"


def test_torch_op_checks_too():
    with pytest.raises(ValueError, match=r"hierarchical_select: num_tokens must be in \[0, N\] with N=9, got 10"):
        torch.ops.hvprune.hierarchical_select(IMPORTANCE, [3, 3], num_tokens=10)
