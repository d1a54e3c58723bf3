"""Registration of the ops and choice of their backend: the only dispatch code in hvprune.

An op is a check, a function that allocates its outputs, and one implementation per backend. Eager calls go
straight to the implementation; under torch.compile, torch.export or fake tensors the same call goes through
``torch.ops.hvprune.<op>``, whose body is that very implementation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.compiler import is_compiling

from . import _native

BACKENDS = ("cuda", "triton", "cpu", "reference")
OLDEST_TRITON = (3, 6)
AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

OPS: dict[str, Op] = {}
_LIBRARY = torch.library.Library("hvprune", "DEF")


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says why."""


def _read_default_backend() -> str:
    name = os.environ.get("HVPRUNE_BACKEND", "auto")
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"HVPRUNE_BACKEND must be 'auto' or one of {BACKENDS}, got {name!r}")
    return name


# What backend="auto" means; read once, at import.
DEFAULT_BACKEND = _read_default_backend()


def from_triton(op: str) -> Callable:
    """The launcher ``hvprune.triton_kernels.<op>.<op>``; its module is imported at the first call."""

    @cache
    def launcher() -> Callable:
        return getattr(import_module(f"hvprune.triton_kernels.{op}"), op)

    return lambda *inputs: launcher()(*inputs)


def why_unavailable(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all, None if it can."""
    if backend == "cuda":
        return _native.why_no_cuda()
    if backend == "triton":
        return _why_no_triton()
    if backend == "cpu":
        return _native.why_no_cpu()
    return None


def triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_no_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not triton_interprets():
        return "torch sees no GPU (TRITON_INTERPRET=1 interprets the kernels on a CPU, slowly)"
    if triton_interprets() and find_spec("numpy") is None:
        return "Triton's interpreter needs NumPy, which is not installed"  # `import triton` fails without it
    try:
        found = import_module("triton").__version__
    except ImportError as error:
        return f"triton could not be imported: {error}"
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TRITON:
        return f"triton must be {'.'.join(map(str, OLDEST_TRITON))} or newer, got {found}"
    return None


class Op:
    """One op: ``check(*inputs) -> lead tensor``, ``out(*inputs) -> outputs``, ``backends[name](*inputs) -> outputs``.

    The last argument of a call is the backend. ``backends`` holds what is implemented; "cpu" and "cuda" take
    tensors of that device only, the others say by themselves what they take.
    """

    def __init__(self, name: str, schema: str, *, check: Callable, out: Callable, backends: dict[str, Callable]):
        self.name, self.check, self.backends = name, check, backends
        self._chosen: dict[tuple[str, str], Callable] = {}
        _LIBRARY.define(f"{name}{schema}")
        self.torch_op = getattr(torch.ops.hvprune, name).default
        # The dispatcher leaves out trailing arguments that equal their default.
        defaults = tuple(argument.default_value for argument in self.torch_op._schema.arguments)

        def body(*args):
            *inputs, backend = (*args, *defaults[len(args) :])
            return self._implementation(check(*inputs), backend)(*inputs)

        def fake(*args):
            *inputs, _ = (*args, *defaults[len(args) :])
            check(*inputs)
            return out(*inputs)

        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hvprune::{name}", fake, lib=_LIBRARY)
        OPS[name] = self

    def __call__(self, *args):
        if is_compiling():
            return self.torch_op(*args)
        inputs = args[:-1]
        lead = self.check(*inputs)
        if type(lead) not in _PLAIN_TENSORS:
            return self.torch_op(*args)  # a fake or otherwise wrapped tensor has no memory to read
        return self._implementation(lead, args[-1])(*inputs)

    def _implementation(self, lead: torch.Tensor, backend: str) -> Callable:
        device_type = "cpu" if lead.is_cpu else lead.device.type  # the attribute costs a fifth
        implementation = self._chosen.get((backend, device_type))
        if implementation is None:
            implementation = self.backends[self.resolve(backend, device_type)]
            self._chosen[backend, device_type] = implementation
        return implementation

    def resolve(self, backend: str, device_type: str) -> str:
        """The name of the backend that a call with tensors of that device runs on; raises BackendUnavailable."""
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"{self.name}: backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
        backend = DEFAULT_BACKEND if backend == "auto" else backend
        candidates = AUTO_ORDER.get(device_type, ("reference",)) if backend == "auto" else (backend,)
        for name in candidates:
            reason = self.why_unavailable(name, device_type)
            if reason is None:
                return name
        raise BackendUnavailable(f"{self.name}: backend {name!r} is unavailable: {reason} (see 'hvprune info')")

    def why_unavailable(self, backend: str, device_type: str) -> str | None:
        """Why this op cannot run on that backend with tensors of that device, None if it can."""
        if backend not in self.backends:
            return f"this version of hvprune has no {backend} kernels"
        takes = "cuda" if backend == "triton" and not triton_interprets() else backend
        if takes in ("cpu", "cuda") and takes != device_type:
            return f"it takes {takes} tensors, got {device_type} tensors"
        return why_unavailable(backend)
