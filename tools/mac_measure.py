"""What `tools/mac_check.sh` can't ask another program: times by dtype, memory of a decode.

    python -m tools.mac_measure times  [--small]   # a product and an attention of a FLUX step
    python -m tools.mac_measure decode [--small]   # the peak of an autoencoder of random weights

`--small` is for a CPU, to try this program. No weights are read from anywhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import mlx.core as mx

from fluxmesh.engine.device_memory import bounded, decoding_room
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.config import AutoencoderConfig

ROUNDS = 10
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("times", "decode"))
    parser.add_argument("--small", action="store_true", help="little, to try this program")
    options = parser.parse_args()
    measure = times if options.what == "times" else decode
    measure(options.small)


def times(small: bool) -> None:
    """Milliseconds of the largest product and the attention of a step at 1024x1024, by dtype."""
    tokens, hidden, heads = (256, 256, 4) if small else (4608, 3072, 24)
    for dtype in DTYPES:
        x = mx.random.normal((tokens, hidden)).astype(dtype)
        w = mx.random.normal((hidden, 4 * hidden)).astype(dtype)
        q, k, v = (
            mx.random.normal((1, heads, tokens, hidden // heads)).astype(dtype) for _ in range(3)
        )
        product = milliseconds(lambda x=x, w=w: x @ w)
        attention = milliseconds(
            lambda q=q, k=k, v=v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1)
        )
        print(f"{str(dtype):20} product {product:8.2f} ms   attention {attention:8.2f} ms")


def milliseconds(compute: Callable[[], mx.array]) -> float:
    """Of one call, among several that are under way at once."""
    mx.eval(compute())
    begin = time.perf_counter()
    mx.eval([compute() for _ in range(ROUNDS)])
    return (time.perf_counter() - begin) / ROUNDS * 1000


def decode(small: bool) -> None:
    """Peak bytes beside the weights, as MLX counts them: as it comes, and bounded."""
    config, side = AutoencoderConfig(), 1024
    if small:
        config, side = AutoencoderConfig(widths=(32, 64)), 32
    model = AutoEncoder(config)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    latents = side // config.downsampling
    z = mx.random.normal((1, latents, latents, config.z_channels))
    mx.eval(z)
    unbounded = peak(lambda: model.decode(z))
    print(f"decode {side}x{side}, as it comes: {unbounded / 1e9:.2f} GB beside the weights")
    for scarce in (False, True):
        with bounded(decoding_room(config, side, side, mx.bfloat16, scarce)):
            found = peak(lambda: model.decode(z))
        name = "bounded, little memory" if scarce else "bounded"
        print(f"decode {side}x{side}, {name}: {found / 1e9:.2f} GB beside the weights")


def peak(compute: Callable[[], mx.array]) -> int:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compute())
    return mx.get_peak_memory() - before


if __name__ == "__main__":
    main()
