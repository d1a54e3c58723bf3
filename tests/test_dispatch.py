from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import hvprune
from hvprune import _native, _registry, ops
from hvprune._registry import BACKENDS, OPS

SCORES = torch.rand(1, 16)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_auto_on_cpu_takes_the_native_kernels():
    assert OPS["hierarchical_select"].resolve("auto", "cpu") == "cpu"


def test_auto_without_the_extension_takes_the_reference(monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    assert OPS["hierarchical_select"].resolve("auto", "cpu") == "reference"


def test_auto_on_another_device_takes_the_reference():
    assert OPS["hierarchical_select"].resolve("auto", "meta") == "reference"


@pytest.mark.parametrize("op", sorted(OPS))
def test_explicit_backend_never_falls_back(op, monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "_IMPORT_ERROR", "no such file")
    with pytest.raises(hvprune.BackendUnavailable) as caught:
        OPS[op].resolve("cpu", "cpu")
    assert str(caught.value) == (
        f"{op}: backend 'cpu' is unavailable: hvprune._C could not be imported: no such file (see 'hvprune info')"
    )
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("backend, device", [("cuda", "cpu"), ("cpu", "cuda")])
def test_backend_of_another_device(backend, device):
    op = OPS["hierarchical_select"]
    reason = op.why_unavailable(backend, device)
    assert reason in (
        f"it takes {backend} tensors, got {device} tensors",
        f"this version of hvprune has no {backend} kernels",
    )


@pytest.mark.parametrize(
    "interpret, missing, version, reason",
    [
        ("1", "triton", "3.7.1", "triton is not installed"),
        ("1", "numpy", "3.7.1", "Triton's interpreter needs NumPy, which is not installed"),
        ("1", None, "3.3.1", "triton must be 3.6 or newer, got 3.3.1"),
        ("1", None, "3.10.0+git1a2b3c", None),
        ("0", None, "3.2.0", "triton must be 3.6 or newer, got 3.2.0"),
        ("0", "numpy", "3.6.0", None),
    ],
)
def test_triton_that_cannot_run_is_named(interpret, missing, version, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_registry, "find_spec", lambda name: None if name == missing else find_spec("torch"))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert _registry.why_unavailable("triton") == reason


def test_environment_changes_what_auto_means():
    code = "from hvprune._registry import OPS; print(OPS['gather_tokens'].resolve('auto', 'cpu'))"
    assert run(code, HVPRUNE_BACKEND="reference").stdout.strip() == "reference"
    assert run(code, HVPRUNE_BACKEND="auto").stdout.strip() == "cpu"


def test_environment_does_not_change_an_explicit_backend():
    code = "from hvprune._registry import OPS; print(OPS['gather_tokens'].resolve('cpu', 'cpu'))"
    assert run(code, HVPRUNE_BACKEND="reference").stdout.strip() == "cpu"


def test_wrong_environment_is_named():
    result = run("import hvprune", HVPRUNE_BACKEND="fast")
    assert f"HVPRUNE_BACKEND must be 'auto' or one of {BACKENDS}, got 'fast'" in result.stderr


def test_fake_tensors_go_through_the_torch_op():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        selection = ops.hierarchical_select(torch.empty(5, 576), num_tokens=7)
    assert type(selection.indices).__name__ == "FakeTensor" and selection.indices.shape == (5, 7)
