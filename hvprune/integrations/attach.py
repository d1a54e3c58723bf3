"""``hvprune.attach``: one line that prunes a model."""

from __future__ import annotations

import weakref

from .._checks import type_error, value_error
from .llava import PrunedLlava
from .llava_next import PrunedLlavaNext
from .methods import HIVTP, VisPruner

_ATTACHED = weakref.WeakSet()  # models and processors that a handle holds


def attach(model, method: HIVTP | VisPruner, *, processor=None) -> PrunedLlava:
    """Prune the visual tokens of a transformers LLaVA model, in ``generate`` and ``forward``, until detached.

    The vision tower keeps its attention implementation: Q and K are read from forward hooks on the projections of
    the layers needed. The encoder layers after the one that makes the features are skipped, and the projector sees
    the kept tokens only. Nothing outside of this model and this processor changes; copies made of an attached model
    are not supported.

    Args:
        model: LlavaForConditionalGeneration (CLIP or SigLIP tower), LlavaNextForConditionalGeneration, or
            VideoLlavaForConditionalGeneration (its images; videos stay whole).
        method: HIVTP(...) or VisPruner(...).
        processor: the processor of the prompts. With a fixed num_tokens it then emits that many placeholders, so
            ``generate`` and ``forward`` run untouched. Without it, and for methods or models whose count is not
            known beforehand (HIVTP's natural mode, Video-LLaVA), ``generate`` itself shortens the prompt and returns
            it as it came in; ``forward`` then needs ``handle.prepare(**inputs)``.

    Returns:
        A handle, also a context manager: ``handle.last_selection`` (the Selection of the latest image batch; one
        row per image, or per tile for LLaVA-NeXT), ``handle.prepare(...)``, ``handle.detach()``.
        ``model.generate(..., num_tokens=64)`` overrides the budget for one call.

    Raises:
        TypeError: a model or method that is not supported; the message names what is.
        ValueError: attached already, a setting that does not fit the model, or a processor whose placeholder
            count differs from the model's on a dummy image.
    """
    import transformers

    handles = {
        transformers.LlavaForConditionalGeneration: PrunedLlava,
        transformers.LlavaNextForConditionalGeneration: PrunedLlavaNext,
        transformers.VideoLlavaForConditionalGeneration: PrunedLlava,
    }
    handle_type = next((handle for base, handle in handles.items() if isinstance(model, base)), None)
    if handle_type is None:
        names = ", ".join(base.__name__ for base in handles)
        raise type_error("attach", "model", f"one of {names}", type(model).__name__)
    if not isinstance(method, (HIVTP, VisPruner)):
        raise type_error("attach", "method", "hvprune.HIVTP(...) or hvprune.VisPruner(...)", method)
    owned = [owner for owner in (model, processor) if owner is not None]
    for name, owner in zip(("model", "processor"), owned, strict=False):
        if owner in _ATTACHED:
            raise value_error("attach", name, "detached from its current handle first", type(owner).__name__)

    handle = handle_type(model, method, processor)
    for owner in owned:
        _ATTACHED.add(owner)
        handle.on_detach(_ATTACHED.discard, owner)
    try:
        handle.install()
    except BaseException:
        handle.detach()
        raise
    return handle
