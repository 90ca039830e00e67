"""Redux: pictures that FLUX.1 reads behind the words of a prompt.

SigLIP sees a picture, and two linears bring its vectors to the width of T5's, behind which they
follow: the transformer reads both as text. Several pictures are added up, each with its strength.
A model that paints from text takes it as it is: nothing of the transformer is changed.

Below `runtime.py`. Source: black-forest-labs/flux `src/flux/modules/image_embedders.py`
(`ReduxImageEncoder`), `src/flux/sampling.py` (`prepare_redux`); diffusers'
`FluxPriorReduxPipeline`, of whose `prompt_embeds_scale` and `pooled_prompt_embeds_scale` a strength
is both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.images import to_model_range
from fluxmesh.models.flux1.config import ReduxConfig

SEEN = "redux"  # what of all pictures follows T5's features, [1, rows, rows, context_in_dim]
WEIGHT = "redux_weight"  # the sum of their strengths, with which the text counts, [1, 1] float32


class ReduxEmbedder(nn.Module):
    """SigLIP's vectors to ones as T5 makes them."""

    def __init__(self, config: ReduxConfig) -> None:
        super().__init__()
        inner = 3 * config.txt_in_features
        self.redux_up = nn.Linear(config.redux_dim, inner)
        self.redux_down = nn.Linear(inner, config.txt_in_features)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, S, redux_dim] to [B, S, txt_in_features]."""
        return self.redux_down(nn.silu(self.redux_up(x)))


def seen(
    models: Mapping[str, Any], pictures: Sequence[np.ndarray], strengths: Sequence[float]
) -> dict[str, mx.array]:
    """What the transformer is told of pictures, uint8 [side, side, 3], lazy: `SEEN` and `WEIGHT`.

    Each counts with its strength; `SEEN` has the dtype of the weights. `models` are a
    `SiglipVision` as "siglip" and a `ReduxEmbedder` as "redux".
    """
    weights = [float(strength) for strength in strengths]
    total: mx.array | None = None
    for picture, weight in zip(pictures, weights, strict=True):
        tokens = models["redux"](models["siglip"](mx.array(to_model_range(picture))))
        part = tokens if weight == 1 else weight * tokens
        total = part if total is None else total + part
    assert total is not None, "there are pictures"
    rows = round(total.shape[1] ** 0.5)
    return {
        SEEN: total.reshape(1, rows, rows, -1),
        WEIGHT: mx.array([[sum(weights)]], dtype=mx.float32),
    }


def with_pictures(
    features: Mapping[str, mx.array], conditions: Mapping[str, mx.array]
) -> Mapping[str, mx.array]:
    """A prompt's "t5" and "clip", and behind the former what was seen; both with their weight.

    As they are where nothing was seen. Raises `UsageError` for vectors of another width than T5's.
    """
    if SEEN not in conditions:
        return features
    t5, clip, tokens = features["t5"], features["clip"], conditions[SEEN]
    weight = conditions.get(WEIGHT)
    is_grid = tokens.ndim == 4 and tokens.shape[0] == 1 and tokens.shape[-1] == t5.shape[-1]
    if not is_grid or weight is None or weight.shape != (1, 1):
        raise UsageError(
            f"What Redux saw came as {list(tokens.shape)}; this model reads [1, rows, rows, "
            f"{t5.shape[-1]}] and a weight; take the Redux that was made for it."
        )
    tokens = tokens.reshape(1, -1, tokens.shape[-1]).astype(t5.dtype)
    return {
        **features,
        "t5": mx.concatenate([t5 * weight.astype(t5.dtype), tokens], axis=1),
        "clip": clip * weight.astype(clip.dtype),
    }
