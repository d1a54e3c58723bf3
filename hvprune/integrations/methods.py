"""What to attach to a model: a pruning method and its settings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .._checks import check_int, check_pair, check_ratio, type_error, value_error
from ..selection import Selection


@dataclass(frozen=True)
class HIVTP:
    """HIVTP, arXiv 2509.23663: importance from mid-layer attention, then a global and a local stage.

    Args:
        layers: 0-based vision encoder layers whose attention is averaged.
        regions, keep_ratio, window: as in :func:`hvprune.ops.hierarchical_select`.
        num_tokens: exactly so many tokens per image; None is the paper's natural mode, a count that depends on the
            image (252..288 of 576).
        per: LLaVA-NeXT only: "tile" gives each tile num_tokens, the base tile included; "image" spreads num_tokens
            over the tiles of an image in proportion to their unpadded size. Newline tokens come on top, as in the
            stock model.
    """

    layers: tuple[int, ...] = (6, 7, 8)
    regions: tuple[int, int] = (2, 2)
    keep_ratio: float = 0.25
    window: tuple[int, int] = (2, 2)
    num_tokens: int | None = None
    per: str = "tile"

    def __post_init__(self):
        if not isinstance(self.layers, (tuple, list)) or not self.layers:
            raise type_error("HIVTP", "layers", "a non-empty sequence of ints", self.layers)
        for layer in self.layers:
            check_int("HIVTP", "layers", layer)
            if layer < 0:
                raise value_error("HIVTP", "layers", "0-based layer indices", self.layers)
        check_pair("HIVTP", "regions", self.regions)
        check_ratio("HIVTP", "keep_ratio", self.keep_ratio)
        check_pair("HIVTP", "window", self.window)
        if self.num_tokens is not None:
            check_budget("HIVTP", self.num_tokens)
        _check_per("HIVTP", self.per)
        for name in ("layers", "regions", "window"):  # frozen and hashable, also when given lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def capture_layers(self, feature_layer: int) -> tuple[int, ...]:
        """The encoder layers whose Q and K are needed; ``feature_layer`` is the one whose output is pruned."""
        return self.layers

    def score(self, queries: list[Tensor], keys: list[Tensor], num_prefix_tokens: int, scale: float) -> Tensor:
        """Importance (B, N) from Q and K (B, H, L, D) of each captured layer."""
        return ops.attention_importance(queries, keys, num_prefix_tokens=num_prefix_tokens, scale=scale)

    def pick(self, scores: Tensor, features: Tensor, grid: tuple[int, int], num_tokens: int | None) -> Selection:
        """The kept tokens of scores (B, N) on any grid; the features (B, N, C) do not matter to HIVTP."""
        return ops.hierarchical_select(scores, grid, **self._stages(), num_tokens=num_tokens)

    def select(self, queries, keys, features, grid, num_prefix_tokens, scale, num_tokens) -> Selection:
        """:meth:`score` and :meth:`pick` in one call."""
        return ops.hivtp_select(
            queries,
            keys,
            grid,
            num_prefix_tokens=num_prefix_tokens,
            scale=scale,
            **self._stages(),
            num_tokens=num_tokens,
        )

    def _stages(self) -> dict:
        return {"regions": self.regions, "keep_ratio": self.keep_ratio, "window": self.window}


@dataclass(frozen=True)
class VisPruner:
    """VisPruner, arXiv 2412.01818: important tokens by CLS attention, the rest without near duplicates.

    Encoders without CLS token (SigLIP) take the mean over all query rows instead. Both read the attention of the
    layer whose output is pruned.

    Args:
        num_tokens: exactly so many tokens per image. Published (num_tokens, important_ratio): (128, 0.5),
            (64, 0.75); LLaVA-NeXT 32 per tile.
        important_ratio: share of num_tokens taken by importance.
        removals_per_round: duplicates dropped at most per round.
        per: as in :class:`HIVTP`.
    """

    num_tokens: int
    important_ratio: float = 0.5
    removals_per_round: int = 8
    per: str = "tile"

    def __post_init__(self):
        check_budget("VisPruner", self.num_tokens)
        check_ratio("VisPruner", "important_ratio", self.important_ratio)
        check_int("VisPruner", "removals_per_round", self.removals_per_round)
        if self.removals_per_round < 1:
            raise value_error("VisPruner", "removals_per_round", "at least 1", self.removals_per_round)
        _check_per("VisPruner", self.per)

    def capture_layers(self, feature_layer: int) -> tuple[int, ...]:
        """The encoder layers whose Q and K are needed; ``feature_layer`` is the one whose output is pruned."""
        return (feature_layer,)

    def score(self, queries: list[Tensor], keys: list[Tensor], num_prefix_tokens: int, scale: float) -> Tensor:
        """Importance (B, N) from Q and K (B, H, L, D) of the captured layer."""
        rows = "cls" if num_prefix_tokens else "all"
        return ops.attention_importance(queries, keys, num_prefix_tokens=num_prefix_tokens, rows=rows, scale=scale)

    def pick(self, scores: Tensor, features: Tensor, grid: tuple[int, int], num_tokens: int) -> Selection:
        """The kept tokens of scores (B, N) and features (B, N, C); the grid does not matter to VisPruner."""
        return ops.vispruner_select(
            features,
            scores,
            num_tokens,
            important_ratio=self.important_ratio,
            removals_per_round=self.removals_per_round,
        )

    def select(self, queries, keys, features, grid, num_prefix_tokens, scale, num_tokens) -> Selection:
        """:meth:`score` and :meth:`pick` in one call."""
        return self.pick(self.score(queries, keys, num_prefix_tokens, scale), features, grid, num_tokens)


def check_budget(who: str, num_tokens) -> None:
    """At least one token: a prompt whose image has none is a text prompt."""
    check_int(who, "num_tokens", num_tokens)
    if num_tokens < 1:
        raise value_error(who, "num_tokens", "at least 1", num_tokens)


def _check_per(who: str, per) -> None:
    if per not in ("tile", "image"):
        raise value_error(who, "per", "'tile' or 'image'", per)
