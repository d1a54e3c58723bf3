from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which nothing has done so far

from hvprune.testing import Backend


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty hands out NaN, the largest integer and True: an output element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def settled_device(request):
    """An error of a kernel shows in the test that launched it, and not in the tests after it."""
    yield
    if request.node.get_closest_marker("gpu"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)  # the context is lost; pytest-xdist names the test and starts a new process
            raise


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Whatever runs a backend on a GPU is marked gpu."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, Backend) and value.device == "cuda" for value in parameters):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
