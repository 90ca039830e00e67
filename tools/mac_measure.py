"""What `tools/mac_check.sh` can't ask another program: times, memory, a late host.

    python -m tools.mac_measure times  [--small]   # a product and an attention of a FLUX step
    python -m tools.mac_measure decode [--small]   # the peak of an autoencoder of random weights
    python -m tools.mac_measure late   [--small]   # a ring whose second rank comes 8 s late

`--small` is for a CPU, to try this program. No weights are read from anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from fluxmesh.engine.device_memory import bounded, decoding_room
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux1.architecture import Flux1Architecture
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.config import AutoencoderConfig
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.models.waiting import InGraph, OnHost, Waiting
from tests.ports import free_ports

ROUNDS = 10
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
LATE, LATE_SMALL = 8.0, 1.0  # seconds
RANK, WAY = "MLX_RANK", "FLUXMESH_WAITING"  # in the environment of each rank of `late`
WAYS: dict[str, type[Waiting]] = {"host": OnHost, "graph": InGraph}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {"times": times, "decode": decode, "late": late}
    parser.add_argument("what", choices=measures)
    parser.add_argument("--small", action="store_true", help="little, to try this program")
    options = parser.parse_args()
    if RANK in os.environ:
        rank(LATE_SMALL if options.small else LATE)
    else:
        measures[options.what](options.small)


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
    architecture, side = FLUX1.published["schnell"].architecture, 1024
    assert isinstance(architecture, Flux1Architecture)
    if small:
        ae = AutoencoderConfig(widths=(32, 64))
        architecture, side = dataclasses.replace(architecture, autoencoder=ae), 32
    config = architecture.autoencoder
    model = AutoEncoder(config)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    latents = side // config.downsampling
    z = mx.random.normal((1, latents, latents, config.z_channels))
    mx.eval(z)
    unbounded = peak(lambda: model.decode(z))
    print(f"decode {side}x{side}, as it comes: {unbounded / 1e9:.2f} GB beside the weights")
    for scarce in (False, True):
        with bounded(decoding_room(architecture, side, side, mx.bfloat16, scarce)):
            nbytes = peak(lambda: model.decode(z))
        name = "bounded, little memory" if scarce else "bounded"
        print(f"decode {side}x{side}, {name}: {nbytes / 1e9:.2f} GB beside the weights")


def peak(compute: Callable[[], mx.array]) -> int:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compute())
    return mx.get_peak_memory() - before


def late(small: bool) -> None:
    """Two ranks on this machine: whether the first one's GPU survives to wait for the second.

    macOS is known to end work of a GPU that waits for more than 5 s. Where the host waits for a
    collective (`models/waiting.py`), the GPU never does; where the graph does, this tells whether
    that is so on this Mac.
    """
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            hosts = Path(folder, "hosts.json")
            hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
            command = [sys.executable, "-m", "tools.mac_measure", "late"]
            ranks = [
                subprocess.Popen(
                    [*command, *(["--small"] if small else [])],
                    env={**os.environ, "MLX_HOSTFILE": str(hosts), RANK: str(k), WAY: way},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for k in range(2)
            ]
            try:
                said, _ = ranks[0].communicate(timeout=60)
            except subprocess.TimeoutExpired:
                said = "it hangs"
            for process in ranks:
                process.kill()
                process.communicate()
        print(f"the {way} waits: {(said.strip().splitlines() or ['it said nothing'])[-1]}")


def rank(seconds: float) -> None:
    """One of the two: a collective that the second comes late to, and a product with its result."""
    group = mx.distributed.init(strict=True, backend="ring")
    ranks = Ranks(group, waiting=WAYS[os.environ[WAY]]())
    x = mx.ones((1, 512, 512))
    mx.eval(ranks.gather(x))  # both are there
    begin = time.perf_counter()
    if ranks.rank:
        time.sleep(seconds)
    every = ranks.gather(x @ x)
    try:
        mx.eval(every @ every)
        print(f"all is well after {time.perf_counter() - begin:.1f} s", flush=True)
    except RuntimeError as error:
        print(f"{error} (after {time.perf_counter() - begin:.1f} s)", flush=True)
    time.sleep(1.0)  # the other one reads what was sent
    os._exit(0)


if __name__ == "__main__":
    main()
