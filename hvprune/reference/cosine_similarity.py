from __future__ import annotations

import torch


@torch.no_grad()
def cosine_similarity(features) -> torch.Tensor:
    """Cosine of every pair of tokens; see :func:`hvprune.ops.cosine_similarity`."""
    compute_dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    finite = features.isfinite().all(-1)
    # The norm in float64 neither overflows nor vanishes for any float32 row.
    rows = features.double().masked_fill(~finite.unsqueeze(-1), 0.0)
    norms = rows.norm(dim=-1, keepdim=True)
    unit = (rows / torch.where(norms > 0, norms, 1.0)).to(compute_dtype)
    similarity = torch.stack([image @ image.T for image in unit]) if len(unit) else unit @ unit.mT
    similarity = similarity.triu() + similarity.triu(1).mT  # symmetric bit for bit
    similarity = similarity.masked_fill(~(finite.unsqueeze(1) & finite.unsqueeze(2)), float("-inf"))
    return similarity.half() if features.dtype in (torch.float16, torch.bfloat16) else similarity
