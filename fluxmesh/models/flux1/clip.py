"""CLIP's text encoder: a prompt's tokens to one vector that steers every block of FLUX.

Beside `t5.py`; `stages.py` runs it once a prompt and keeps the pooled vector only. Names are
those of transformers 5 (`CLIPTextModel`; older files put `text_model.` before them, which the
weight loader removes). Source: Radford et al. 2021 (https://arxiv.org/abs/2103.00020), section 2.4.

Shapes: B prompts, L tokens, D = hidden_size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.models.flux1.config import ClipConfig, SiglipConfig

Activation = Callable[[mx.array], mx.array]
ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": nn.gelu_fast_approx,  # x * sigmoid(1.702 x), what OpenAI trained with
    "gelu": nn.gelu,
}

# Configs written before transformers 4.31 say 2 whatever the vocabulary's end token is. Then the
# end is found as OpenAI found it: it has the highest id of all.
LEGACY_EOS = 2


class ClipOutput(NamedTuple):
    """What the encoder returns, in the dtype of the weights."""

    last_hidden_state: mx.array  # [B, L, D], after the last norm
    pooled_output: mx.array  # [B, D], that of each prompt's first end token


class ClipAttention(nn.Module):
    """Self-attention; `mask` as of `mx.fast.scaled_dot_product_attention`."""

    def __init__(self, config: ClipConfig | SiglipConfig, mask: str | None) -> None:
        super().__init__()
        D = config.hidden_size
        self.mask = mask
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def __call__(self, x: mx.array) -> mx.array:
        B, L, _ = x.shape
        q, k, v = (
            project(x).reshape(B, L, self.num_heads, -1).transpose(0, 2, 1, 3)  # [B, H, L, D/H]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = q.shape[-1] ** -0.5
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=self.mask)
        return self.out_proj(x.transpose(0, 2, 1, 3).reshape(B, L, -1))


class ClipMLP(nn.Module):
    """Two linears with an activation between them."""

    def __init__(self, config: ClipConfig | SiglipConfig, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nn.Module):
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(
        self, config: ClipConfig | SiglipConfig, activation: Activation, mask: str | None
    ) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ClipAttention(config, mask)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMLP(config, activation)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Module):
    """Tokens and their places."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, tokens: mx.array) -> mx.array:
        positions = mx.arange(tokens.shape[1])
        return self.token_embedding(tokens) + self.position_embedding(positions)


class ClipEncoder(nn.Module):
    """The layers, one after another: CLIP's, whose mask is "causal", and SigLIP's, without one."""

    def __init__(
        self, config: ClipConfig | SiglipConfig, activation: Activation, mask: str | None
    ) -> None:
        super().__init__()
        self.layers = [ClipLayer(config, activation, mask) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipTextModel(nn.Module):
    """Tokens to features and the pooled vector."""

    def __init__(self, config: ClipConfig) -> None:
        """Raises `WeightsError` for an activation that no CLIP was trained with."""
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise WeightsError(
                f"The CLIP text encoder's config has hidden_act {config.hidden_act!r}; "
                f"fluxmesh knows {' and '.join(ACTIVATIONS)}."
            )
        self.config = config
        self.embeddings = ClipEmbeddings(config)
        self.encoder = ClipEncoder(config, ACTIVATIONS[config.hidden_act], "causal")
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, tokens: mx.array) -> ClipOutput:
        """Token ids, whole numbers [B, L], to features [B, L, D] and pooled vectors [B, D].

        Raises `UsageError` where there are more tokens than the model has positions.
        """
        batch, length = tokens.shape
        if length > self.config.max_position_embeddings:
            raise UsageError(
                f"The prompt has {length} CLIP tokens, and the model has positions for "
                f"{self.config.max_position_embeddings}; truncate it with the tokenizer."
            )
        x = self.final_layer_norm(self.encoder(self.embeddings(tokens)))
        return ClipOutput(
            last_hidden_state=x, pooled_output=x[mx.arange(batch), self._ends(tokens)]
        )

    def _ends(self, tokens: mx.array) -> mx.array:
        """Where each prompt ends, [B]: at its first end token."""
        if self.config.eos_token_id == LEGACY_EOS:
            return mx.argmax(tokens, axis=-1)
        return mx.argmax(tokens == self.config.eos_token_id, axis=-1)
