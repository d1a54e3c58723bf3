"""Nothing but exponentials, to find how many a GPU does in a second; imported where there is Triton and a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS, BLOCK, ROUNDS = 4096, 1024, 512
EXPS = PROGRAMS * BLOCK * ROUNDS


@triton.jit
def _exp_kernel(out_ptr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    # Eight values per thread are independent of each other; each exponential is the argument of the next.
    x = (tl.arange(0, BLOCK) + tl.program_id(0)).to(tl.float32) * 1e-6
    for _ in range(ROUNDS):
        x = tl.exp2(x - 1.0)
    # Never true, which the compiler cannot know.
    tl.store(out_ptr + tl.arange(0, BLOCK) * 0, x, mask=x > 1e30)


def exponentiate(out: torch.Tensor) -> None:
    """EXPS exponentials; ``out`` is one float32 that stays what it is."""
    _exp_kernel[(PROGRAMS,)](out, ROUNDS=ROUNDS, BLOCK=BLOCK, num_warps=4)
