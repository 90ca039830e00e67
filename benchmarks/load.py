"""How fast do weights reach the device, and what does a warm agent save over a process a request?

    python -m benchmarks.load                    # 34 GB of disk, a GPU, 5 minutes
    python -m benchmarks.load --blocks 5 9       # a transformer of 6 GB instead of 24
    python -m benchmarks.load --model tiny       # the commands alone, with a model that you have
    python -m benchmarks.load --small            # tiny models, to try this program

FLUX.1 at full size with random weights, from files on a disk (`writer.py`). First the disk's own
rate, from files that are not in the page cache and from files that are: reads into one buffer by
several threads. Then an engine's load of the transformer in a process of its own, the first start
with nothing in the page cache, the second with what the first left there; "peak over" is what was
in memory at once beyond the weights themselves. Last, seconds from the command line: a process for
each request, `fluxmesh up`, and requests to the mesh that is then warm.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.folders import temporary, write_models
from benchmarks.harness import ROOT, Result, emit, say
from benchmarks.sizes import FULL, SMALL, Sizes
from fluxmesh.errors import FluxmeshError

PIECE = 8 << 20  # bytes that a thread reads at once
THREADS = 8
PROMPT = "a photo of an astronaut riding a horse on the moon"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a disk's folder, for the time of the run")
    parser.add_argument("--bits", type=int, choices=(3, 4, 5, 6, 8), help="quantize while loading")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--model", help="time the commands alone, with this model")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a request")
    parser.add_argument("--no-requests", action="store_true", help="leave the command line out")
    options = harness.options_of(parser, load)
    if options.model and (options.no_requests or options.blocks):
        parser.error("--model times the commands alone: leave --no-requests and --blocks out.")
    say(f"{harness.machine()}\n")
    folder = temporary("fluxmesh-load-", options.folder)
    results: list[Result] = []

    def tell(result: Result) -> None:
        results.append(result)
        say(line_of(result))
        harness.write_json(options.json, results)

    try:
        if not options.model:
            start = time.perf_counter()
            written = write_models(folder, sizes_of(options))
            say(f"wrote {written / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s")
            measure_files(folder, options.bits, tell)
        if not options.no_requests:
            measure_requests(folder, options, tell)
    finally:
        shutil.rmtree(folder)
    say("\n" + report(results))


def sizes_of(options: argparse.Namespace) -> Sizes:
    """Those of FLUX; where only the transformer is read, with text encoders that take no disk."""
    sizes = SMALL if options.small else FULL
    flow = sizes.transformer
    if options.blocks is not None:
        flow = dataclasses.replace(
            flow, depth=options.blocks[0], depth_single_blocks=options.blocks[1]
        )
    if options.no_requests:
        text = SMALL.transformer
        flow = dataclasses.replace(
            flow, vec_in_dim=text.vec_in_dim, context_in_dim=text.context_in_dim
        )
        sizes = SMALL
    return dataclasses.replace(sizes, transformer=flow)


# Files and an engine's load of them


def measure_files(folder: Path, bits: int | None, tell: Callable[[Result], None]) -> None:
    """The disk's rate and an engine's, cold and from the page cache."""
    files = sorted((folder / "dev" / "transformer").glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    caches = ("cold", "cached") if drop_cache(folder) else ("cached",)
    for cache in caches:
        if cache == "cold":
            drop_cache(folder)
        seconds = read_all(files)
        tell({"what": "disk", "cache": cache, "seconds": seconds, "bytes": total})
    for start, cache in enumerate(caches):
        if cache == "cold":
            drop_cache(folder)
        case = {"what": "engine", "start": start, "cache": cache, "bits": bits}
        for result in harness.results_of(
            "benchmarks.load", {**case, "folder": str(folder / "dev")}
        ):
            tell({"bytes": total, **result})


def read_all(files: list[Path]) -> float:
    """Seconds in which several threads read the files, each into a buffer of its own."""
    own = threading.local()

    def read(piece: tuple[Path, int]) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(PIECE)
        file, offset = piece
        with open(file, "rb", buffering=0) as opened:
            opened.seek(offset)
            opened.readinto(own.buffer)

    pieces = [(file, i) for file in files for i in range(0, file.stat().st_size, PIECE)]
    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(read, pieces))
    return time.perf_counter() - start


def drop_cache(folder: Path) -> bool:
    """Makes the system forget what it keeps of the files; False where that can't be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.rglob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def load(case: Result) -> None:
    """An engine's load of the transformer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from fluxmesh.weights import hub, loading

    mx.eval(mx.zeros(1) + 1)  # the device is awake
    start = time.perf_counter()
    checkpoint = hub.resolve(case["folder"], download=False)
    loading.verify(checkpoint)
    checked = time.perf_counter()
    mx.reset_peak_memory()
    flow = loading.load_transformer(checkpoint, bits=case["bits"])
    arrays = [array for _, array in tree_flatten(flow.parameters())]
    mx.synchronize()
    emit(
        check=checked - start,
        seconds=time.perf_counter() - start,
        held=sum(array.nbytes for array in arrays),
        largest=max(array.nbytes for array in arrays),
        peak=mx.get_peak_memory(),
        software=f"MLX {mx.__version__}",
    )


# Requests


def measure_requests(
    folder: Path, options: argparse.Namespace, tell: Callable[[Result], None]
) -> None:
    """Wall seconds of commands, as a user's script would run them."""
    home = folder / "home"
    home.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("FLUXMESH_")}
    paths = (ROOT, ROOT / "agent", ROOT / "coordinator", *filter(None, [env.get("PYTHONPATH")]))
    env |= {
        "HOME": str(home),
        "HF_HOME": env.get("HF_HOME", str(Path.home() / ".cache" / "huggingface")),
        "FLUXMESH_HOME": str(home / "config"),
        "FLUXMESH_STATE": str(home / "state"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    model = ("--model", options.model or str(folder / "dev"))
    quantize = () if options.bits is None else ("--bits", str(options.bits))
    paint = ("generate", PROMPT, *model, *quantize, "--seed", "7", "--steps", str(options.steps))
    if not options.model:  # which else paints at its own size
        paint += ("--image-size", "64x64" if options.small else "1024x1024")
    paint += ("--force", "--output", str(home / "out.png"))

    def timed(what: str, *command: str, cache: str = "") -> None:
        start = time.perf_counter()
        fluxmesh(env, *command)
        tell({"what": what, "cache": cache, "seconds": time.perf_counter() - start})

    can_drop = not options.model and drop_cache(folder)
    for cache in ("cold" if can_drop else "", "cached"):
        if cache == "cold":
            drop_cache(folder)
        timed("a process for the request", *paint, cache=cache)
    try:
        timed("fluxmesh up", "up", *model, *quantize, cache="cached")
        for number in ("first", "second", "third"):
            timed(f"{number} request to the warm mesh", *paint)
    finally:
        fluxmesh(env, "down")


def fluxmesh(env: dict[str, str], *arguments: str) -> None:
    """Runs the command line. Raises `FluxmeshError` with what it said where it fails."""
    command = [sys.executable, "-m", "fluxmesh_coordinator", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise FluxmeshError(f"fluxmesh {arguments[0]}: {done.returncode}: {done.stderr.strip()}")


# What is printed


def line_of(result: Result) -> str:
    """One result as it comes."""
    for problem in ("skipped", "failed"):
        if problem in result:
            return f"{result['what']}: {problem}: {result[problem]}"
    cache = f", {result['cache']}" if result["cache"] else ""
    rate = f", {result['bytes'] / result['seconds'] / 1e9:.2f} GB/s" if "bytes" in result else ""
    return f"{result['what']}{cache}: {result['seconds']:.2f} s{rate}"


def report(results: list[Result]) -> str:
    files = [result for result in results if "bytes" in result and "seconds" in result]
    disk = {result["cache"]: result["seconds"] for result in files if result["what"] == "disk"}
    header = ["who reads", "page cache", "GB", "s", "GB/s", "× the disk's own rate",
              "of it checks s", "peak over GB", "largest tensor GB"]  # fmt: skip
    tables = []
    if files:
        tables.append(harness.table(header, [file_row(result, disk) for result in files]))
    requests = [
        [result["what"], result["cache"], f"{result['seconds']:.2f}"]
        for result in results
        if "bytes" not in result and "seconds" in result
    ]
    if requests:
        tables.append(harness.table(["command", "page cache", "s"], requests))
    return "\n\n".join(
        [*tables, *(line_of(result) for result in results if "seconds" not in result)]
    )


def file_row(result: Result, disk: dict[str, float]) -> list[str]:
    who = "several threads" if result["what"] == "disk" else "an engine"
    if result.get("bits"):
        who += f", to {result['bits']} bits"
    cells: list[Any] = [who, result["cache"], f"{result['bytes'] / 1e9:.2f}"]
    cells.append(f"{result['seconds']:.2f}")
    cells.append(f"{result['bytes'] / result['seconds'] / 1e9:.2f}")
    if result["what"] == "disk":
        return [*cells, "", "", "", ""]
    over = result["peak"] - result["held"]
    cells.append(f"{disk[result['cache']] / result['seconds']:.2f}")
    return [*cells, f"{result['check']:.3f}", f"{over / 1e9:.3f}", f"{result['largest'] / 1e9:.3f}"]


if __name__ == "__main__":
    main()
