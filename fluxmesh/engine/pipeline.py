"""`FluxPipeline`: a checkpoint by name, and pictures out of it, one step at a time.

    flux = FluxPipeline("flux-schnell")
    steps = flux.generate_latents("A photo of an astronaut riding a horse", latent_size=(32, 64))
    mx.eval(next(steps))     # noise and text features: t5 and clip may leave now (`del flux.t5`)
    for x in steps:          # each step is lazy until evaluated: report, preview or stop here
        mx.eval(x)
    image = flux.decode(x, latent_size=(32, 64))     # [1, 256, 512, 3] in [0, 1]

The four models are attributes (`t5`, `clip`, `flow`, `ae`) that load when first used and leave with
`del` (`lazy_models.py`), so that at most one of the two large ones (T5, the transformer) need be in
memory. Below stand `denoise.py` (the sampler), `img2img.py` (image-to-image) and `conditioning.py`;
above stand programs that call it, and `worker.py`, which decides what stays in memory and reports.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.engine import device_memory
from fluxmesh.engine.lazy_models import Models
from fluxmesh.errors import UsageError
from fluxmesh.events import Loading
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.step_cache import StepCache
from fluxmesh.request import MAX_SEED, AdapterRef, GenerateRequest, SourceImage
from fluxmesh.sampling import latents
from fluxmesh.sampling.conditioning import Conditioning, PromptMemory
from fluxmesh.sampling.denoise import DenoisePlan, Guide, denoise, plan
from fluxmesh.sampling.img2img import SourceLatents, composite, mask_latents, to_model_range
from fluxmesh.sampling.schedule import timesteps

LatentSize = tuple[int, int]  # (height, width) in latents, 8 pixels each


class FluxPipeline(Models):
    """FLUX by name: text in, latents step by step, pictures out. One image at a time (B = 1)."""

    def __init__(
        self,
        name: str = "flux-schnell",
        t5_padding: bool = True,
        *,
        dtype: str = "bfloat16",
        bits: int | None = None,
        adapters: Iterable[AdapterRef | str] = (),
        fuse_adapters: bool = False,
        low_memory: bool = False,
        download: bool = True,
        on_loading: Callable[[Loading], None] | None = None,
    ) -> None:
        """Finds the checkpoint and checks its files' headers; weights load when they are used.

        `name` is an alias, a Hub repository, a folder or a BFL file (`hub.resolve`). `t5_padding`
        pads prompts to the checkpoint's own length, as FLUX was trained. `dtype` is "bfloat16",
        "float32", or "float16" for the transformer with all else in bfloat16. `bits` (3|4|5|6|8)
        quantizes transformer and text encoders as they load. `adapters` are LoRA files, fused
        into the weights with `fuse_adapters`. `low_memory` drops the modulation weights (27% of
        the transformer) once a request's modulations are computed, and loads the rest only then.
        `on_loading` hears of bytes read.

        Raises `ModelNotFoundError`, `WeightsError`, `AdapterError` or `UsageError`.
        """
        super().__init__(
            name,
            dtype=dtype,
            bits=bits,
            adapters=adapters,
            fuse_adapters=fuse_adapters,
            download=download,
            on_loading=on_loading,
        )
        self.t5_padding = t5_padding
        self.low_memory = low_memory
        self.seed: int | None = None  # of the latest `generate_latents`
        self._memory = PromptMemory()

    # From text to latents

    def tokenize(self, text: str) -> tuple[mx.array, mx.array]:
        """(T5's tokens [1, T], CLIP's tokens [1, 77]) of a prompt."""
        clip, t5 = self.tokenizers
        return mx.array([t5.encode(text, pad=self.t5_padding)]), mx.array([clip.encode(text)])

    def remembers(self, text: str) -> bool:
        """Whether `encode` will answer without running the encoders."""
        return self._memory.get(text, self.t5_padding) is not None

    def encode(self, text: str) -> Conditioning:
        """The prompt's features, evaluated; encoders run only for a prompt not seen lately."""
        known = self._memory.get(text, self.t5_padding)
        if known is None:
            t5_tokens, clip_tokens = self.tokenize(text)
            known = Conditioning(self.t5(t5_tokens), self.clip(clip_tokens).pooled_output)
            mx.eval(known)
            self._memory.put(text, self.t5_padding, known)
        return known

    def encode_source(self, source: SourceImage) -> SourceLatents:
        """A request's picture and mask in the model's space, evaluated (the posterior's mean)."""
        config = self.ae.config
        pixels = mx.array(to_model_range(source.pixels))
        clean = latents.pack(self.ae.encode(pixels).astype(mx.float32))
        painted = None
        if source.mask is not None:
            painted = mask_latents(source.mask, config.downsampling, config.z_channels)
        with self.bounded_pixels(*source.pixels.shape[:2]):
            mx.eval(clean)
        return SourceLatents(clean, painted)

    def noise(self, seed: int, latent_size: LatentSize) -> mx.array:
        """The noise that seed `seed` begins from, packed float32 [1, L, 4C] (`latents.py`)."""
        config = self.checkpoint.autoencoder
        height, width = (side * config.downsampling for side in latent_size)
        return mx.array(
            latents.initial_noise(seed, height, width, config.z_channels, config.downsampling)
        )

    def plan(
        self,
        text: Conditioning,
        *,
        num_steps: int | None = None,
        guidance: float = 4.0,
        latent_size: LatentSize = (64, 64),
        strength: float = 1.0,
        flow: Flux | TensorFlux | SequenceFlux | None = None,
    ) -> DenoisePlan:
        """What all images of a request share; with `low_memory`, drops the modulation weights.

        `flow` makes the modulations: the transformer, also spread over a ring (`parallel.py`), or
        what is loaded of it for that (`planner`, which it is by itself).
        """
        h, w = latent_size
        tokens = (h // latents.PATCH) * (w // latents.PATCH)
        steps = num_steps or self.checkpoint.defaults.steps
        times = timesteps(steps, tokens, self.checkpoint.schedule, strength)
        flow = self.planner() if flow is None else flow
        made = plan(flow, text, times, latent_size, guidance)
        if self.low_memory:
            mx.eval(made.modulations)
            flow.release_modulation()
            del self.modulation
            mx.clear_cache()
        return made

    def planner(self) -> Flux:
        """What makes modulations: the transformer, or with `low_memory` no more than it takes.

        A transformer that is in memory and still has them serves as it is.
        """
        self.drop_incomplete_flow()
        return self.modulation if self.low_memory and not self.is_loaded("flow") else self.flow

    def drop_incomplete_flow(self) -> None:
        """Lets a transformer whose modulation weights were released leave; it then loads again."""
        if self.is_loaded("flow") and self.flow.modulation_released:
            del self.flow

    def generate_latents(
        self,
        text: str,
        n_images: int = 1,
        num_steps: int | None = None,
        guidance: float = 4.0,
        latent_size: LatentSize = (64, 64),
        seed: int | None = None,
        *,
        source: SourceImage | None = None,
        guide: Guide | None = None,
        cache: float = 0.0,
    ) -> Iterator[Any]:  # the first is a tuple, as Apple's is
        """A generator: first the conditioning, then the latents after each step, all lazy.

        The first value is (x_T, x_positions, t5_conditioning, t5_positions, clip_conditioning);
        every other one x_t, float32 [n_images, L, 4C]. `num_steps` None is the checkpoint's own
        number; `guidance` is read by models that embed it (dev). Image k is the one that seed
        `seed + k` gives alone, to the byte; a seed of None is drawn, and kept in `self.seed`.

        `source` begins from a picture and repaints its mask (`fluxmesh.images`), `guide` is a
        custom loss on the expected picture (`denoise.Guide`). `cache` above 0 is the threshold of
        an approximation that skips most of some steps (`step_cache.py`); each step then evaluates
        its beginning by itself.

        Raises `UsageError` for numbers out of range, before anything is computed.
        """
        self.check_size(latent_size, source)
        self.seed = secrets.randbelow(MAX_SEED // 2) if seed is None else seed
        self._check_request(
            text, self.seed, n_images, num_steps, guidance, latent_size, source, cache
        )
        known = self.encode(text)
        noises = [self.noise(self.seed + k, latent_size) for k in range(n_images)]
        rows, columns = (side // latents.PATCH for side in latent_size)
        yield (
            mx.concatenate(noises),
            mx.array(latents.image_positions(rows, columns))[None],
            mx.broadcast_to(known.t5, (n_images, *known.t5.shape[1:])),
            mx.array(latents.text_positions(known.t5.shape[1]))[None],
            mx.broadcast_to(known.clip, (n_images, *known.clip.shape[1:])),
        )
        start = None if source is None else self.encode_source(source)
        made = self.plan(
            known,
            num_steps=num_steps,
            guidance=guidance,
            latent_size=latent_size,
            strength=1.0 if source is None else source.strength,
        )
        images = [
            denoise(
                self.flow,
                made,
                x,
                source=start,
                guide=guide,
                cache=StepCache(cache) if cache else None,
            )
            for x in noises
        ]
        for steps in zip(*images, strict=True):
            yield mx.concatenate([step.x for step in steps])

    # From latents to pictures

    def decode(self, x: mx.array, latent_size: LatentSize = (64, 64)) -> mx.array:
        """Packed latents [B, L, 4C] to pictures [B, H, W, 3] in [0, 1], float32, lazy."""
        z = latents.unpack(x, latent_size)
        image = self.ae.decode_tiled(z).astype(mx.float32)
        return mx.clip(image * 0.5 + 0.5, 0.0, 1.0)

    def generate_images(
        self,
        text: str,
        n_images: int = 1,
        num_steps: int | None = None,
        guidance: float = 4.0,
        latent_size: LatentSize = (64, 64),
        seed: int | None = None,
        reload_text_encoders: bool = True,
        *,
        source: SourceImage | None = None,
        guide: Guide | None = None,
        cache: float = 0.0,
    ) -> mx.array:
        """Pictures [n_images, H, W, 3] in [0, 1], evaluated, at any latent size of even sides.

        Options are those of `generate_latents`. With `reload_text_encoders`, T5 and CLIP leave
        memory before the transformer loads. Where `source` has a mask, everything outside of it
        equals the source.
        """
        steps = self.generate_latents(
            text,
            n_images,
            num_steps,
            guidance,
            latent_size,
            seed,
            source=source,
            guide=guide,
            cache=cache,
        )
        x, *_ = next(steps)
        if reload_text_encoders:
            self.reload_text_encoders()
        for x in steps:
            with self.bounded_steps(latent_size):
                mx.eval(x)
        side = self.checkpoint.autoencoder.downsampling
        images = []
        for k in range(n_images):
            with self.bounded_pixels(latent_size[0] * side, latent_size[1] * side):
                image = self.decode(x[k : k + 1], latent_size)
                mx.eval(image)
            if source is not None and source.mask is not None:
                image = mx.array(composite(to_pixels(image)[0], source)[None]) / 255.0
            images.append(image)
        return mx.concatenate(images)

    def bounded_steps(self, latent_size: LatentSize) -> AbstractContextManager[None]:
        """Inside, MLX runs no further ahead of a step than it has to (`device_memory.bounded`)."""
        rows, columns = (side // latents.PATCH for side in latent_size)
        tokens = rows * columns + self.checkpoint.defaults.t5_max_length
        config, dtype = self.checkpoint.transformer, self.dtype
        return device_memory.bounded(
            device_memory.denoising_room(config, tokens, dtype, self.low_memory)
        )

    def bounded_pixels(
        self, height: int, width: int, images: int = 1
    ) -> AbstractContextManager[None]:
        """The same for encoding or decoding `images` pictures of so many pixels at once."""
        config, dtype = self.checkpoint.autoencoder, self.dtype
        room = device_memory.decoding_room(config, height, width, dtype, self.low_memory)
        return device_memory.bounded(images * room)

    def check_size(self, latent_size: LatentSize, source: SourceImage | None) -> None:
        """Raises `UsageError` where the sides are odd or the source is of another size."""
        if any(side < latents.PATCH or side % latents.PATCH for side in latent_size):
            raise UsageError(f"latent_size is {latent_size}; both sides must be even numbers.")
        downsampling = self.checkpoint.autoencoder.downsampling
        height, width = (side * downsampling for side in latent_size)
        if source is not None and source.pixels.shape[:2] != (height, width):
            raise UsageError(
                f"the source picture is {source.pixels.shape[0]}x{source.pixels.shape[1]} and the "
                f"image {height}x{width}; scale the source to the image's size."
            )

    def _check_request(
        self,
        text: str,
        seed: int,
        n_images: int,
        num_steps: int | None,
        guidance: float,
        latent_size: LatentSize,
        source: SourceImage | None,
        cache: float,
    ) -> None:
        """Raises the `UsageError` that the same numbers raise on the command line."""
        height, width = (side * self.checkpoint.autoencoder.downsampling for side in latent_size)
        GenerateRequest(
            text,
            seed,
            n_images=n_images,
            height=height,
            width=width,
            steps=num_steps,
            guidance=guidance,
            source=source,
            cache=cache,
        )


def to_pixels(images: mx.array) -> np.ndarray:
    """Pictures [B, H, W, 3] in [0, 1] as uint8; evaluates."""
    return np.round(np.array(images.astype(mx.float32)) * 255.0).astype(np.uint8)
