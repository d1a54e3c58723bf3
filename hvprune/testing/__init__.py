"""Backends, comparisons and the case table of every op, shared by tests and benchmarks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import _native, ops, reference
from .._registry import OPS
from .cases import CASES, Case, map_tensors

__all__ = [
    "CASES",
    "DISCRETE_OPS",
    "DTYPES",
    "NUMERIC_OPS",
    "PIPELINES",
    "Backend",
    "Case",
    "assert_no_worse_than_torch",
    "assert_same_bits",
    "backends",
    "by_torch",
    "combinations",
    "expected",
    "flatten",
    "map_tensors",
    "numeric_oracle",
    "oracle_and_torch",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DISCRETE_OPS = ("diverse_select", "gather_tokens", "hierarchical_select")
NUMERIC_OPS = ("aggregate_attention", "attention_importance", "cosine_similarity")
PIPELINES = ("hivtp_select", "vispruner_select")


@dataclass(frozen=True)
class Backend:
    """A backend on a device, for the CPU with the instruction set its kernels are made to use."""

    name: str
    device: str
    isa: str | None = None

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter, which is right and slow."""
        return self.name == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return f"{self.name}-{'interpreter' if self.interpreted else self.isa or self.device}"

    def call(self, op: str, args: tuple, kwargs: dict):
        with self.active():
            return getattr(ops, op)(*args, **kwargs, backend=self.name)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self.isa is None:
            yield
            return
        widest = _native.C.cpu_isas()[-1]
        _native.C.set_cpu_isa(self.isa)
        try:
            yield
        finally:
            _native.C.set_cpu_isa(widest)


def backends(op: str, *, interpreted: bool = True) -> list[Backend]:
    """Every backend but the reference that can run the op here; Triton's interpreter only if wanted."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in ("cpu", "cuda", "triton"):
            if OPS[op].why_unavailable(name, device) is None:
                isas = _native.C.cpu_isas() if name == "cpu" else [None]
                found += [Backend(name, device, isa) for isa in isas]
    return [backend for backend in found if interpreted or not backend.interpreted]


def combinations(op: str) -> list[tuple[Case, Backend, torch.dtype]]:
    """Every case of the op on every backend in every dtype.

    Interpreted: the first case, which has a real size, in float16; small cases in float32, a few in the others too.
    """
    cases = CASES[op]

    def included(index: int, backend: Backend, dtype: torch.dtype) -> bool:
        if not backend.interpreted:
            return True
        if index == 0:
            return dtype == torch.float16
        return cases[index].is_small() and (dtype == torch.float32 or index % 5 == 0)

    return [
        (case, backend, dtype)
        for index, case in enumerate(cases)
        for backend in backends(op)
        for dtype in DTYPES
        if included(index, backend, dtype)
    ]


# Comparisons


def flatten(result) -> list[Tensor]:
    """The tensors of an op's result in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for item in result for tensor in flatten(item)]


def assert_same_bits(actual, expected, context: str = "") -> None:
    """Equal dtypes, shapes and bits; the message names the first place that differs. NaN equals NaN."""
    for i, (a, b) in enumerate(zip(flatten(actual), flatten(expected), strict=True)):
        a, b = a.cpu(), b.cpu()
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"{context} output {i}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        )
        differs = (a != b) & ~((a != a) & (b != b))
        if differs.any():
            place = tuple(differs.nonzero()[0].tolist())
            raise AssertionError(
                f"{context} output {i}: {int(differs.sum())} of {a.numel()} differ, first at {place}:"
                f" got {a[place].item()!r}, expected {b[place].item()!r}"
            )


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference; where the oracle is not finite the values must agree."""
    actual, oracle = actual.double().cpu(), oracle.double().cpu()
    finite = oracle.isfinite()
    assert_same_bits(actual.masked_fill(finite, 0.0), oracle.masked_fill(finite, 0.0), "non-finite values of")
    return (actual - oracle)[finite].abs().max().item() if finite.any() else 0.0


def assert_no_worse_than_torch(actual: Tensor, oracle: Tensor, by_torch: Tensor, context: str = "") -> None:
    """Error against the float64 oracle at most twice PyTorch's own in the same dtype, plus one last place."""
    finite = oracle[oracle.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    error, error_of_torch = max_error(actual, oracle), max_error(by_torch, oracle)
    bound = 2 * error_of_torch + torch.finfo(actual.dtype).eps * largest
    assert error <= bound, f"{context}: error {error:.3g}, PyTorch's {error_of_torch:.3g}, bound {bound:.3g}"


@cache
def expected(case: Case, dtype: torch.dtype):
    """What the reference makes of a case, on a CPU; kept, because every backend is compared with it."""
    args, kwargs = case.inputs(dtype)
    return getattr(reference, case.op)(*args, **kwargs)


@cache
def oracle_and_torch(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A numeric op of a case in float64, and by PyTorch in the dtype of the inputs."""
    args, kwargs = case.inputs(dtype)
    return numeric_oracle(case.op, args, kwargs), by_torch(case.op, args, kwargs)


def numeric_oracle(op: str, args: tuple, kwargs: dict) -> Tensor:
    """The op in float64 on the given values."""
    widen = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    return getattr(reference, op)(*map_tensors(args, widen), **map_tensors(kwargs, widen))


def by_torch(op: str, args: tuple, kwargs: dict) -> Tensor:
    """What a user of PyTorch writes, in the dtype of the inputs."""
    if op == "cosine_similarity":
        (features,) = args
        unit = torch.nn.functional.normalize(features, dim=-1, eps=0.0).nan_to_num(0.0)
        similarity = unit @ unit.mT
        finite = features.isfinite().all(-1)
        return similarity.masked_fill(~(finite.unsqueeze(1) & finite.unsqueeze(2)), float("-inf"))
    if op == "aggregate_attention":
        maps = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    else:
        kwargs = dict(kwargs)
        scale, logsumexp = kwargs.pop("scale", None), kwargs.pop("logsumexp", None)
        queries, keys = ([x] if isinstance(x, Tensor) else x for x in args)
        maps = []
        for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
            scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
            if logsumexp is None:
                maps.append(scores.softmax(-1))
            else:
                layer = logsumexp if isinstance(logsumexp, Tensor) else logsumexp[i]
                maps.append((scores - layer.to(scores.dtype).unsqueeze(-1)).exp())
    prefix = kwargs.get("num_prefix_tokens", 1)
    stacked = torch.stack(list(maps))
    stacked = stacked[..., :1, :] if kwargs.get("rows", "all") == "cls" else stacked
    return stacked.mean(dim=(0, 2, 3))[:, prefix:]
