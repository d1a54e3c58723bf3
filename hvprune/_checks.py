"""Argument checks shared by the ops.

Every message reads ``<op>: <argument> must be <expectation>, got <actual>``: TypeError for a wrong type
or dtype, ValueError for a wrong shape, range or mix of devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float32, *HALF_DTYPES)
_FLOATS = "float32, float16 or bfloat16"


def describe(value) -> str:
    """A tensor as ``float32 (2, 576) on cpu``, anything else as its repr."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"[{', '.join(describe(item) for item in value)}]"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def type_error(op: str, argument: str, expectation: str, actual) -> TypeError:
    return TypeError(f"{op}: {argument} must be {expectation}, got {describe(actual)}")


def value_error(op: str, argument: str, expectation: str, actual) -> ValueError:
    return ValueError(f"{op}: {argument} must be {expectation}, got {describe(actual)}")


def check_floats(op: str, argument: str, value, letters: str, ndim: int) -> None:
    """A float32, float16 or bfloat16 tensor of ``ndim`` dimensions; ``letters`` names them in the message."""
    if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
        raise type_error(op, argument, f"a {_FLOATS} tensor {letters}", value)
    if value.dim() != ndim:
        raise value_error(op, argument, f"a tensor {letters}", value)


def as_layers(value):
    """One tensor or a sequence of them as a list; anything else unchanged, for check_layers to refuse."""
    if isinstance(value, Tensor):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def check_layers(op: str, argument: str, layers, letters: str, like: Tensor | None = None) -> torch.Size:
    """A non-empty list of 4-dimensional float tensors, one per layer, all of one shape, dtype and device.

    Returns that shape.
    """
    if not isinstance(layers, (list, tuple)) or not layers:
        raise type_error(op, argument, f"a tensor {letters} or a non-empty sequence of them", layers)
    if like is None:
        like = layers[0]
        check_floats(op, argument, like, letters, 4)
    shape = like.shape
    for layer in layers:
        if layer is like:
            continue
        if not isinstance(layer, Tensor) or layer.dtype != like.dtype:
            check_floats(op, argument, layer, letters, 4)
            raise type_error(op, argument, f"of one dtype, {like.dtype}", layer)
        if layer.shape != shape or layer.device != like.device:
            check_floats(op, argument, layer, letters, 4)
            raise value_error(op, argument, f"all shaped {tuple(shape)} on {like.device}", layer)
    return shape


def check_prefix(op: str, length: int, num_prefix_tokens, rows: str) -> None:
    """At least one patch token after the prefix, and a CLS row when one is asked for."""
    if type(num_prefix_tokens) is not int:
        check_int(op, "num_prefix_tokens", num_prefix_tokens)
    if not 0 <= num_prefix_tokens < length:
        raise value_error(op, "num_prefix_tokens", f"in [0, L) with L={length}", num_prefix_tokens)
    if rows not in ("all", "cls"):
        raise value_error(op, "rows", "'all' or 'cls'", rows)
    if rows == "cls" and num_prefix_tokens == 0:
        raise value_error(op, "num_prefix_tokens", "at least 1 for rows='cls'", num_prefix_tokens)


def check_int(op: str, argument: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise type_error(op, argument, "an int", value)


def check_num_tokens(op: str, num_tokens, available: int) -> None:
    """A token budget in 0..N."""
    if type(num_tokens) is not int:
        check_int(op, "num_tokens", num_tokens)
    if not 0 <= num_tokens <= available:
        raise value_error(op, "num_tokens", f"in [0, N] with N={available}", num_tokens)


def check_float(op: str, argument: str, value, expectation: str = "a float") -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat))):
        raise type_error(op, argument, expectation, value)


def check_ratio(op: str, argument: str, value) -> None:
    check_float(op, argument, value)
    if not 0.0 <= value <= 1.0:  # NaN fails too
        raise value_error(op, argument, "in [0, 1]", value)


def check_pair(op: str, argument: str, value) -> None:
    """Two ints, each at least 1: (rows, columns)."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise type_error(op, argument, "a pair of ints (rows, columns)", value)
    first, second = value
    if type(first) is not int or type(second) is not int:
        check_int(op, argument, first)
        check_int(op, argument, second)
    if first < 1 or second < 1:
        raise value_error(op, argument, "a pair of ints of at least 1", value)


def check_same_device(op: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    if value.device != like.device:
        raise value_error(op, argument, f"on {like.device} like {other}", value)
