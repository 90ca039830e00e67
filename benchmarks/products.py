"""MLX's own matrix products and attention at the shapes of one step of FLUX, each timed alone.

Their sum is what a step would take if nothing else did: no norm, no rotation, no gate, no bias. A
product is timed by running it many times between two waits, on several sets of weights in turn,
as a step does, so that no weight is read from a cache that a step would find cold. Modulations are
not among them: they are computed once a request.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux2.config import Flux2Config

SETS = 4  # of weights, taken in turn
CALLS = 12  # between two waits
GROUP = 64  # columns that share a scale when quantized


@dataclass(frozen=True)
class Product:
    """x [rows, columns] times a weight [outputs, columns], `count` times a step."""

    name: str
    rows: int
    columns: int
    outputs: int
    count: int
    is_quantized: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.outputs


def products(
    config: FluxConfig | Flux2Config, size: int, text_tokens: int, references: int = 0
) -> list[Product]:
    """Every linear layer of a step at `size` x `size` pixels, beside references of that size."""
    D, M = config.hidden_size, config.mlp_hidden_dim
    way_in = 2 * M if isinstance(config, Flux2Config) else M  # a gate, and what it gates
    img, txt = (1 + references) * (size // 16) ** 2, text_tokens
    both = img + txt
    return [
        Product("img_in", img, config.in_channels, D, 1, False),
        Product("txt_in", txt, config.context_in_dim, D, 1, False),
        Product("double img qkv", img, D, 3 * D, config.depth),
        Product("double img proj", img, D, D, config.depth),
        Product("double img mlp in", img, D, way_in, config.depth),
        Product("double img mlp out", img, M, D, config.depth),
        Product("double txt qkv", txt, D, 3 * D, config.depth),
        Product("double txt proj", txt, D, D, config.depth),
        Product("double txt mlp in", txt, D, way_in, config.depth),
        Product("double txt mlp out", txt, M, D, config.depth),
        Product("single linear1", both, D, 3 * D + way_in, config.depth_single_blocks),
        Product("single linear2", both, D + M, D, config.depth_single_blocks),
        Product("final linear", img, D, config.out_channels, 1, False),
    ]


def sum_of_products(
    config: FluxConfig | Flux2Config, size: int, text_tokens: int, case: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the result: seconds in all, and of each shape."""
    dtype: mx.Dtype = getattr(mx, case["dtype"])
    shapes = []
    for product in products(config, size, text_tokens, case["references"]):
        bits = case["bits"] if product.is_quantized else None
        shapes.append(
            {
                "name": product.name,
                "shape": f"{product.rows}×{product.columns}→{product.outputs}",
                "count": product.count,
                "flops": product.flops,
                "seconds": seconds_of(_linear(product, dtype, bits), case),
            }
        )
    tokens = (1 + case["references"]) * (size // 16) ** 2 + text_tokens
    heads, width = config.num_heads, config.head_dim
    shapes.append(
        {
            "name": "attention",
            "shape": f"{heads}×{tokens}×{width}",
            "count": config.depth + config.depth_single_blocks,
            "flops": 4 * heads * tokens * tokens * width,
            "seconds": seconds_of(_attention(heads, tokens, width, dtype), case),
        }
    )
    return {
        "seconds": sum(shape["seconds"] * shape["count"] for shape in shapes),
        "shapes": shapes,
        "software": f"MLX {mx.__version__}",
    }


def seconds_of(call: Callable[[int], mx.array], case: dict[str, Any]) -> float:
    """Median seconds of one call; `call(i)` uses the i-th set of weights."""
    rounds = []
    for _ in range(case["warmup"] + case["steps"]):
        start = time.perf_counter()
        mx.eval([call(i % SETS) for i in range(CALLS)])
        rounds.append((time.perf_counter() - start) / CALLS)
    mx.clear_cache()
    return statistics.median(rounds[case["warmup"] :])


def _linear(product: Product, dtype: mx.Dtype, bits: int | None) -> Callable[[int], mx.array]:
    x = mx.random.normal((1, product.rows, product.columns), dtype=dtype)
    scale = product.columns**-0.5
    weights = [
        mx.random.normal((product.outputs, product.columns), dtype=dtype) * scale
        for _ in range(SETS)
    ]
    mx.eval(x, weights)
    if bits is None:
        return lambda i: x @ weights[i].T
    packed = [mx.quantize(weight, group_size=GROUP, bits=bits) for weight in weights]
    mx.eval(packed)
    return lambda i: mx.quantized_matmul(x, *packed[i], group_size=GROUP, bits=bits)


def _attention(heads: int, tokens: int, width: int, dtype: mx.Dtype) -> Callable[[int], mx.array]:
    """Queries, keys and values lie as a projection leaves them: tokens, then heads."""

    def draw() -> mx.array:
        return mx.random.normal((1, tokens, heads, width), dtype=dtype).transpose(0, 2, 1, 3)

    sets = [(draw(), draw(), draw()) for _ in range(SETS)]
    mx.eval(sets)
    return lambda i: mx.fast.scaled_dot_product_attention(*sets[i], scale=width**-0.5)
