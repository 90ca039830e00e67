"""What step caching (`--cache`) gains, and what it costs the picture.

    python -m benchmarks.caching                          # the embedded checkpoint, any machine
    python -m benchmarks.caching --model dev --size 1024x1024 --steps 28
    python -m benchmarks.caching --model FOLDER --only-steps    # random weights: no pictures

Two kinds of tables. The first is of single steps: as they are without a cache, compared and
computed, and compared and reused. The others paint the same images exactly and at each threshold,
and compare pixels; what denoising gains there is reckoned from the steps that were computed and
reused and from the medians of the first table, which a busy machine disturbs less than a sum. The
errors are of 8-bit pictures; the PSNR is that of all images together, and of the worst one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.models.runtime import DenoisePlan
from fluxmesh.models.step_cache import StepCache
from fluxmesh.sampling.denoise import denoise
from fluxmesh.version import __version__

PROMPTS = (
    "a red apple to the left of a dog on a yellow background",
    "a cat on a blue background",
    "a car above a tree on a white background",
    "two dogs on a green background",
    "a banana in the top right corner on a black background",
    "a fish to the right of a flower on a pink background",
)
THRESHOLDS = (0.04, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4)
EVERYTHING = 1e9  # a threshold under which all but the first and last step are reused


@dataclass(frozen=True)
class CachedImage:
    """One image."""

    pixels: np.ndarray  # uint8 [height, width, 3]
    seconds: list[float]  # of each step
    reused: list[bool]  # which steps were


@dataclass(frozen=True)
class Costs:
    """A step with a cache, as parts of one without."""

    computed: float
    reused: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="as `fluxmesh generate --model`")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels  [the model's own]")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 28])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--images", type=int, default=len(PROMPTS), help="how many are painted")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS))
    parser.add_argument("--only-steps", action="store_true", help="the first table alone")
    options = parser.parse_args()

    flux = FluxPipeline(options.model, dtype=options.dtype, download=False)
    defaults = flux.checkpoint.defaults
    height, width = defaults.height, defaults.width
    if options.size:
        height, width = (int(side) for side in options.size.split("x"))
    downsampling = flux.checkpoint.architecture.autoencoder.downsampling
    size = (height // downsampling, width // downsampling)
    info = mx.device_info()
    device = info.get("device_name") or mx.default_device()
    print(f"fluxmesh {__version__}, MLX {mx.__version__} on {device}: ", end="")
    print(f"{options.model}, {options.dtype}, {height}x{width}")

    plans = _plans(flux, options.images, options.steps, size)
    costs = steps_table(flux, plans[options.steps[0]][0], size)
    if not options.only_steps:
        for steps in options.steps:
            pictures_table(flux, plans[steps], size, options.thresholds, costs)


def _plans(
    flux: FluxPipeline, images: int, counts: list[int], size: tuple[int, int]
) -> dict[int, list[DenoisePlan]]:
    """A plan for each image, by the number of steps; then the encoders leave."""
    texts = [flux.encode(PROMPTS[k % len(PROMPTS)]) for k in range(images)]
    flux.reload_text_encoders()
    made = {
        steps: [flux.plan(text, num_steps=steps, latent_size=size) for text in texts]
        for steps in counts
    }
    for plan in (plan for plans in made.values() for plan in plans):
        mx.eval(plan.modulations, plan.pe)
    return made


def paint(
    flux: FluxPipeline, plan: DenoisePlan, seed: int, size: tuple[int, int], threshold: float | None
) -> CachedImage:
    """One image; without a cache where `threshold` is None."""
    caches = [] if threshold is None else StepCache.of_calls(plan.calls, threshold)
    seconds, reused = [], []
    start = time.perf_counter()
    for step in denoise(flux.flow, plan, flux.noise(seed, size), caches=caches):
        mx.eval(step.x)
        seconds.append(time.perf_counter() - start)
        reused.append(step.reused)
        start = time.perf_counter()
    return CachedImage(to_pixels(flux.decode(step.x, size))[0], seconds, reused)


def steps_table(flux: FluxPipeline, plan: DenoisePlan, size: tuple[int, int]) -> Costs:
    """What one step takes; neither the first step nor the last counts."""
    kinds = {"no cache": None, "compared, computed": 0.0, "compared, reused": EVERYTHING}
    took: dict[str, list[float]] = {name: [] for name in kinds}
    for round_ in range(3):
        for name, threshold in kinds.items():
            seconds = paint(flux, plan, 0, size, threshold).seconds[1:-1]
            took[name] += seconds if round_ else []  # the first round compiles
    medians = {name: statistics.median(seconds) for name, seconds in took.items()}
    print("\n| a step | ms | of one without a cache |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds * 1e3:.1f} | {seconds / medians['no cache']:.3f} |")
    plain, computed, reused = medians.values()
    return Costs(computed / plain, reused / plain)


def pictures_table(
    flux: FluxPipeline,
    plans: list[DenoisePlan],
    size: tuple[int, int],
    thresholds: list[float],
    costs: Costs,
) -> None:
    """Pixels of the same images, exact and at each threshold, and what was saved."""
    exact: list[CachedImage] = []
    cached: dict[float, list[CachedImage]] = {threshold: [] for threshold in thresholds}
    for seed, plan in enumerate(plans):
        exact.append(paint(flux, plan, seed, size, None))
        for threshold, images in cached.items():
            images.append(paint(flux, plan, seed, size, threshold))
    steps = plans[0].steps
    print(f"\n{len(plans)} images of {steps} steps\n")
    print("| --cache | steps reused | denoising | mean error /255 | worst pixel /255 ", end="")
    print("| PSNR, dB: all | worst image |\n|---|---|---|---|---|---|---|")
    for threshold, images in cached.items():
        reused = statistics.mean(sum(image.reused) for image in images)
        # The first step has nothing to compare with, and the last need not.
        spent = 2 + (steps - 2 - reused) * costs.computed + reused * costs.reused
        errors = np.stack([np.abs(a - b) for a, b in _pairs(exact, images)])  # [images, h, w, 3]
        squares = (errors**2).mean(axis=(1, 2, 3))  # of each image
        print(f"| {threshold:g} | {reused:.1f} of {steps} | {steps / spent:.2f}x ", end="")
        print(f"| {errors.mean():.2f} | {errors.max():.0f} ", end="")
        print(f"| {psnr(squares.mean())} | {psnr(squares.max())} |")


def _pairs(
    exact: list[CachedImage], cached: list[CachedImage]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for a, b in zip(exact, cached, strict=True):
        yield a.pixels.astype(np.float64), b.pixels.astype(np.float64)


def psnr(square: float) -> str:
    """Peak signal-to-noise ratio in dB of 8-bit pictures whose mean squared error is `square`."""
    return "equal" if square == 0 else f"{10 * np.log10(255.0**2 / square):.1f}"


if __name__ == "__main__":
    main()
