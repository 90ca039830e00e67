"""FLUX.2's text encoder: the first layers of a language model, whose states are the features.

klein reads Qwen3 after 9, 18 and 27 of its layers, dev Mistral Small 3 after 10, 20 and 30: these
three states, side by side, are a token's features. No layer after the last of them exists here, nor
does the norm that ends the language model. Names are transformers' (`Qwen3Model`, `MistralModel`).

Shapes: B prompts, L tokens, D hidden size, H heads of hd channels, G groups of heads that share
keys and values. Sources: Qwen3 technical report (https://arxiv.org/abs/2505.09388), Jiang et al.
2023, "Mistral 7B" (https://arxiv.org/abs/2310.06825); shared keys and values, Ainslie et al. 2023
(https://arxiv.org/abs/2305.13245).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.models.flux2.config import TextEncoderConfig
from fluxmesh.models.flux2.embedding import EmbeddingRows
from fluxmesh.models.flux2.tokenizer import PromptTokens


class Reach(NamedTuple):
    """Which tokens a token attends to: itself and real ones before it."""

    mask: mx.array  # bool [L, L]: whether query i reads key j
    attends: mx.array | None  # bool [L, 1]: where a query has a key; None where all have


def reach(real: np.ndarray) -> Reach:
    """`real` is bool [L]: which tokens are not padding.

    Padding after the prompt attends to the prompt. Padding before it has no key at all; its
    attention then gives zeros, as PyTorch's fused kernels do, which the reference runs.
    """
    mask = np.tril(np.ones((len(real), len(real)), dtype=bool)) & real[None]
    attends = mask.any(axis=1)
    # A softmax over nothing would be nan: such rows read themselves, and the result is dropped.
    mask |= np.diag(~attends)
    return Reach(mx.array(mask), None if attends.all() else mx.array(attends[:, None]))


def half_tables(length: int, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines of tokens 0 to length - 1, float32 [length, hd/2] each.

    In float32, in the order of operations of transformers, with which the model was trained.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return mx.array(np.cos(angles)), mx.array(np.sin(angles))


def rotate_halves(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotates channel i of x [B, H, L, hd] with channel i + hd/2; computes in float32."""
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return mx.concatenate(turned, axis=-1).astype(x.dtype)


class CausalAttention(nn.Module):
    """Self-attention to tokens before, with heads in groups that share keys and values."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        D, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, queries, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, keys, bias=False)
        self.o_proj = nn.Linear(queries, D, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, reach: Reach, cos: mx.array, sin: mx.array) -> mx.array:
        """x [B, L, D] in and out."""
        B, L, _ = x.shape
        q, k, v = (
            project(x).reshape(B, L, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate_halves(part.swapaxes(1, 2), cos, sin) for part in (q, k))  # [B, H, L, hd]
        x = mx.fast.scaled_dot_product_attention(
            q, k, v.swapaxes(1, 2), scale=self.head_dim**-0.5, mask=reach.mask
        )
        if reach.attends is not None:
            x = mx.where(reach.attends, x, 0).astype(x.dtype)
        return self.o_proj(x.swapaxes(1, 2).reshape(B, L, -1))


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Norm and attention, norm and feed-forward, each added to what came in."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.self_attn = CausalAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)
        self.mlp = GatedFeedForward(D, config.intermediate_size)

    def __call__(self, x: mx.array, reach: Reach, cos: mx.array, sin: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), reach, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextEncoder(nn.Module):
    """Embedded tokens to features; the embedding itself stays in its file (`embedding.py`)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = [DecoderLayer(config) for _ in range(config.layers)]

    @property
    def dtype(self) -> mx.Dtype:
        """Of weights and activations."""
        return self.layers[0].input_layernorm.weight.dtype

    def __call__(self, x: mx.array, real: np.ndarray) -> mx.array:
        """Embedded tokens [B, L, D] to features [B, L, states * D] in the dtype of the weights.

        `real` is bool [L]: which tokens are not padding, in all prompts alike.
        """
        return self.read([(x, real)])[0]

    def read(self, texts: Sequence[tuple[mx.array, np.ndarray]]) -> list[mx.array]:
        """As calling it with each of the texts, whatever their lengths."""
        config = self.config
        tables = [half_tables(x.shape[1], config.head_dim, config.rope_theta) for x, _ in texts]
        reached = [reach(real) for _, real in texts]
        xs = [x.astype(self.dtype) for x, _ in texts]
        states: list[list[mx.array]] = [[] for _ in texts]
        for count, layer in enumerate(self.each_layer(), start=1):
            for i, (cos, sin) in enumerate(tables):
                xs[i] = layer(xs[i], reached[i], cos, sin)
                if count in config.states:
                    states[i].append(xs[i])
            self.passed(xs)
        return [mx.concatenate(each, axis=-1) for each in states]

    def each_layer(self) -> Iterable[Any]:
        """In the order in which they run."""
        return self.layers

    def passed(self, xs: Sequence[mx.array]) -> None:
        """All texts are through a layer, lazily."""

    def encode(self, prompts: Sequence[PromptTokens], embedding: EmbeddingRows) -> list[mx.array]:
        """Each prompt's features, padding included: [1, L, states * D].

        The rows of padding count: the transformer attends to them. After the prompt each is
        another; before it all are the same, so that one is computed.
        """
        texts: list[tuple[mx.array, np.ndarray]] = []
        for tokens in prompts:
            pads = [tokens.pad_id] * tokens.padding
            if tokens.is_padded_before:
                pads = pads[:1]
                ids, real = [*pads, *tokens.ids], [False] * len(pads) + [True] * len(tokens.ids)
            else:
                ids, real = [*tokens.ids, *pads], [True] * len(tokens.ids) + [False] * len(pads)
            texts.append((embedding(ids, self.dtype), np.array(real, dtype=bool)))
        return [
            _with_all_padding(features, tokens)
            for tokens, features in zip(prompts, self.read(texts), strict=True)
        ]


class LayerwiseTextEncoder(TextEncoder):
    """The same text encoder where its weights don't fit: each layer comes, is run, and leaves.

    The numbers are the same to the bit: what is evaluated when changes none.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        dtype: mx.Dtype,
        layers: Callable[[], Iterator[nn.Module]],
    ) -> None:
        nn.Module.__init__(self)  # there are no layers of its own
        self.config = config
        self._dtype, self._layers = dtype, layers

    @property
    def dtype(self) -> mx.Dtype:
        return self._dtype

    def each_layer(self) -> Iterable[Any]:
        return self._layers()

    def passed(self, xs: Sequence[mx.array]) -> None:
        mx.eval(*xs)  # before the weights leave


def _with_all_padding(features: mx.array, tokens: PromptTokens) -> mx.array:
    """Padding before a prompt was read once, and stands there as often as there is padding."""
    if not (tokens.is_padded_before and tokens.padding):
        return features
    first = mx.broadcast_to(features[:, :1], (1, tokens.padding, features.shape[-1]))
    return mx.concatenate([first, features[:, 1:]], axis=1)
