"""``hvprune info``: versions, what was compiled in, and which backends run here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import hvprune

from . import _native
from ._registry import AUTO_ORDER, BACKENDS, DEFAULT_BACKEND, OPS, triton_interprets, why_unavailable


def report() -> str:
    """All of it as aligned lines, ready to print or to paste in an issue."""
    lines = [
        ("hvprune", hvprune.__version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        *((package, _version(package)) for package in ("torch", "triton", "transformers")),
        ("threads", str(torch.get_num_threads())),
        ("instruction set", _instruction_set()),
        ("CUDA archs", _cuda_archs()),
        ("CUDA devices", ", ".join(_cuda_devices()) or "none"),
    ]
    lines += [(f"backend {name}", _availability(name)) for name in BACKENDS]
    if DEFAULT_BACKEND == "auto":
        auto = (f"{OPS['gather_tokens'].resolve('auto', x)} for {x} tensors" for x in AUTO_ORDER)
        lines.append(("backend auto", ", ".join(auto)))
    else:
        lines.append(("backend auto", f"{DEFAULT_BACKEND} (HVPRUNE_BACKEND)"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _instruction_set() -> str:
    if _native.C is None:
        return "none: hvprune._C is not built"
    return f"{_native.C.cpu_isa()} (this machine runs {', '.join(_native.C.cpu_isas())})"


def _cuda_archs() -> str:
    archs = [] if _native.C is None else _native.C.cuda_archs
    return ", ".join(f"sm_{arch}" for arch in archs) or "none compiled in"


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{device.name} (sm_{device.major}{device.minor})" for device in properties]


def _availability(backend: str) -> str:
    """ "available", or why not; where it depends on the op, the ops it lacks with the reason."""
    reason = why_unavailable(backend)
    if reason is not None:
        return f"unavailable: {reason}"
    device = "cpu" if backend in ("cpu", "reference") else "cuda"
    missing: dict[str, list[str]] = {}
    for name, op in OPS.items():
        reason = op.why_unavailable(backend, device)
        if reason is not None:
            missing.setdefault(reason, []).append(name)
    if not missing and backend == "triton" and triton_interprets():
        return "available, interpreted on a CPU (TRITON_INTERPRET=1)"
    if not missing:
        return "available"
    if [len(names) for names in missing.values()] == [len(OPS)]:
        return f"unavailable: {next(iter(missing))}"
    return "available, except " + "; ".join(f"{', '.join(names)}: {reason}" for reason, names in missing.items())
