"""torch.library, torch.compile and torch.export see the ops as any other."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hvprune import ops
from hvprune._registry import OPS
from hvprune.testing import CASES, Backend, assert_same_bits, map_tensors

BACKENDS = [Backend("cpu", "cpu"), Backend("cuda", "cuda"), Backend("triton", "cuda")]


def few(op: str) -> list:
    """Four cases of an op whose outputs hold no NaN, which opcheck would call different from itself."""
    cases = [case for case in CASES[op] if "NaN" not in case.name]
    return [cases[i] for i in (0, len(cases) // 3, 2 * len(cases) // 3, len(cases) - 1)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield


def schema_arguments(op: str, args: tuple, kwargs: dict, backend: Backend) -> tuple:
    """The arguments with which the public function calls its torch op."""
    seen = []
    original = OPS[op].check
    OPS[op].check = lambda *inputs: seen.append(inputs) or original(*inputs)
    try:
        backend.call(op, args, kwargs)
    finally:
        OPS[op].check = original
    return *seen[0], backend.name


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
def test_opcheck(op, backend, grad):
    for case in few(op):
        args, kwargs = case.inputs(torch.float32, backend.device)
        arguments = schema_arguments(op, args, kwargs, backend)
        arguments = map_tensors(arguments, lambda x: x.clone().requires_grad_(grad and x.is_floating_point()))
        torch.library.opcheck(getattr(torch.ops.hvprune, op).default, arguments)  # all four utilities


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(op, backend, dynamic):
    for case in few(op):
        args, kwargs = case.inputs(torch.float32, backend.device)
        kwargs["backend"] = backend.name
        torch.compiler.reset()
        compiled = torch.compile(getattr(ops, op), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_same_bits(compiled(*args, **kwargs), getattr(ops, op)(*args, **kwargs), str(case))


def test_one_graph_for_every_batch():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def prune(features, importance):
        return ops.gather_tokens(features, ops.vispruner_select(features, importance, 5))

    generator = torch.Generator().manual_seed(0)
    compiled = []  # frames compiled after each call
    for batch in (2, 3, 5, 8):
        features, importance = (
            torch.randn(batch, 16, 4, generator=generator),
            torch.rand(batch, 16, generator=generator),
        )
        expected = ops.gather_tokens(features, ops.vispruner_select(features, importance, 5))
        assert_same_bits(prune(features, importance), expected)
        compiled.append(counter.frame_count)
    assert len(set(compiled)) == 1


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_inductor_runs_the_ops(backend):
    def prune(features, importance):
        selection = ops.vispruner_select(features, importance, 5, backend=backend.name)
        return ops.gather_tokens(features, selection, backend=backend.name)

    features, importance = torch.randn(2, 16, 4).to(backend.device), torch.rand(2, 16).to(backend.device)
    compiled = torch.compile(prune, fullgraph=True)
    assert_same_bits(compiled(features, importance), prune(features, importance))


def test_export():
    class Pruner(torch.nn.Module):
        def forward(self, features, importance):
            return ops.gather_tokens(features, ops.vispruner_select(features, importance, 5))

    features, importance = torch.randn(2, 16, 4), torch.rand(2, 16)
    program = torch.export.export(Pruner(), (features, importance))
    assert [node.target for node in program.graph.nodes if "hvprune" in str(node.target)] == [
        torch.ops.hvprune.vispruner_select.default,
        torch.ops.hvprune.gather_tokens.default,
    ]
    assert_same_bits(program.module()(features, importance), Pruner()(features, importance))
