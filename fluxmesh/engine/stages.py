"""What a picture goes through, each stage by itself: read, plan, step, decode.

`PipelineStages` are the models of a checkpoint with what is computed by them: features of prompts
and pictures, the plan that all steps of a request share, pictures out of latents. An engine walks
them as units of work (`units.py`, `painting.py`), a training reads its data set with them, and
`FluxPipeline` (`pipeline.py`) goes the whole way in one call. NaN and infinity end a stage with a
`NotFiniteError`; what a stage takes beside the weights is bounded (`device_memory.py`).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import mlx.core as mx
import numpy as np

from fluxmesh.engine import device_memory
from fluxmesh.engine.lazy_models import Lazy, Models
from fluxmesh.errors import NotFiniteError, UsageError
from fluxmesh.images import to_model_range
from fluxmesh.models.autoencoder.convolutional import in_pieces
from fluxmesh.models.runtime import (
    NO_CONDITIONS,
    Conditions,
    DenoisePlan,
    Flow,
    PromptFeatures,
)
from fluxmesh.request import PromptCut, SourceImage
from fluxmesh.sampling import latents
from fluxmesh.sampling.conditioning import PromptKey, PromptMemory
from fluxmesh.sampling.img2img import SourceLatents, mask_latents
from fluxmesh.sampling.schedule import timesteps

LatentSize = tuple[int, int]  # (height, width) in latents, `Architecture.downsampling` pixels each
# What holds larger numbers, or more of them, than the dtype that gave NaN or infinity.
WIDER = {mx.float16: "bfloat16 or float32", mx.bfloat16: "float32"}


class PipelineStages(Models):
    """The models of a checkpoint, and each stage of a picture. One image at a time (B = 1)."""

    # From text to latents

    @Lazy
    def _memory(self) -> PromptMemory:
        """The features of the latest prompts."""
        return PromptMemory()

    def tokenize(self, text: str) -> tuple[mx.array, ...]:
        """A prompt's tokens [1, T] for each text encoder: T5's and CLIP's, of FLUX.1."""
        return self.runtime.tokenize(self, text, self.t5_padding)

    def cut(self, text: str) -> PromptCut | None:
        """What the model does not read of a prompt that is too long for it; None: nothing."""
        return self.runtime.cut(self, text)

    def remembers(self, text: str, negative: str | None = None) -> bool:
        """Whether `encode` will answer without running the encoders."""
        return self._memory.get(*self._prompt_key(text, negative)) is not None

    @property
    def remembered(self) -> list[PromptKey]:
        """Prompts that `remembers`."""
        return [key for key in self._memory.prompts if key.bits == self.text_bits]

    def _prompt_key(self, text: str, negative: str | None) -> PromptKey:
        return PromptKey(text, self.t5_padding, negative, self.text_bits)

    def encode(self, text: str, negative: str | None = None) -> PromptFeatures:
        """The prompt's features, evaluated; encoders run only for a prompt not seen lately.

        `negative` is what to move away from, None the model's own. Raises `NotFiniteError`, and
        `WeightsError` where the files are no longer those that were opened.
        """
        known = self._memory.get(*self._prompt_key(text, negative))
        if known is None:
            known = self.runtime.encode(self, text, self.t5_padding, negative)
            are_finite = {name: mx.isfinite(array).all() for name, array in known.items()}
            mx.eval(*known.values(), *are_finite.values())
            for name, is_finite in are_finite.items():
                if not is_finite.item():
                    reader = self.runtime.readers[name]
                    raise self.not_finite(f"{reader}, for this prompt,", self.dtype_beside)
            self.checkpoint.check_files()  # rows and layers may have been read where they lie
            self._memory.put(text, self.t5_padding, known, negative, self.text_bits)
        return known

    def encode_pictures(
        self, pictures: Mapping[str, np.ndarray], strengths: Sequence[float] = ()
    ) -> Conditions:
        """What the denoiser reads of `Architecture.pictures`, evaluated one by one; references
        count with their `strengths`, where the model takes such.

        Raises `NotFiniteError`, and `UsageError` for pictures that the model does not read.
        """
        made = dict(self.runtime.encode_pictures(self, pictures, strengths))
        pixels = max(math.prod(picture.shape[:2]) for picture in pictures.values())
        for name, array in made.items():
            is_finite = mx.isfinite(array).all()
            with self.bounded_encode(pixels):
                mx.eval(array, is_finite)
            if not is_finite.item():
                reader = f"the model that read the picture {name}"
                raise self.not_finite(reader, self.dtype_beside)
        return made

    def encode_source(self, source: SourceImage) -> SourceLatents:
        """A request's picture and mask in the model's space, evaluated (the posterior's mean).

        Raises `NotFiniteError`.
        """
        model = self.architecture
        pixels = mx.array(to_model_range(source.pixels))
        clean = latents.pack(self.ae.encode(pixels).astype(mx.float32))
        painted = None
        if source.mask is not None:
            painted = mask_latents(source.mask, model.downsampling, model.latent_channels)
        with self.bounded_encode(math.prod(source.pixels.shape[:2])):
            mx.eval(clean)
        if not mx.isfinite(clean).all().item():
            raise self.not_finite("the autoencoder, which read the picture,", self.dtype_beside)
        return SourceLatents(clean, painted)

    def noise(self, seed: int, latent_size: LatentSize) -> mx.array:
        """The noise that seed `seed` begins from, packed float32 [1, L, 4C] (`latents.py`)."""
        model = self.architecture
        height, width = (side * model.downsampling for side in latent_size)
        return mx.array(
            latents.initial_noise(seed, height, width, model.latent_channels, model.downsampling)
        )

    def plan(
        self,
        text: PromptFeatures,
        *,
        num_steps: int | None = None,
        guidance: float = 4.0,
        latent_size: LatentSize = (64, 64),
        strength: float = 1.0,
        flow: Flow | None = None,
        cfg: float = 1.0,
        conditions: Conditions = NO_CONDITIONS,
    ) -> DenoisePlan:
        """What all images of a request share; with `low_memory`, drops the modulation weights.

        Before the first step, it is to be `prepared` with the whole transformer.

        `flow` makes the modulations: the transformer, also spread over a ring (`parallel.py`), or
        what is loaded of it for that (`planner`, which it is by itself).
        """
        h, w = latent_size
        tokens = (h // latents.PATCH) * (w // latents.PATCH)
        steps = num_steps or self.checkpoint.defaults.steps
        times = timesteps(steps, tokens, self.architecture.shifting, strength)
        flow = self.planner() if flow is None else flow
        made = self.runtime.plan(
            flow, text, times, latent_size, guidance, cfg=cfg, conditions=conditions
        )
        if self.low_memory:
            mx.eval(*made.arrays)
            flow.release_modulation()
            del self.modulation
            mx.clear_cache()
        return made

    def planner(self) -> Flow:
        """What makes modulations: the transformer, or with `low_memory` no more than it takes.

        A transformer that is in memory and still has them serves as it is.
        """
        self.drop_incomplete_flow()
        return self.modulation if self.low_memory and not self.is_loaded("flow") else self.flow

    def drop_incomplete_flow(self) -> None:
        """Lets a transformer whose modulation weights were released leave; it then loads again."""
        if self.is_loaded("flow") and self.flow.modulation_released:
            del self.flow

    # From latents to pictures

    def decode(self, x: mx.array, latent_size: LatentSize = (64, 64)) -> mx.array:
        """Packed latents [B, L, 4C] to pictures [B, H, W, 3] in [0, 1], float32, lazy.

        Raises `NotFiniteError` for latents that are not finite. A number that the autoencoder makes
        infinite is NaN in the picture, which `picture` refuses.
        """
        if not mx.isfinite(x).all().item():
            raise self.not_finite("the latents")
        z = latents.unpack(x, latent_size)
        image = self.ae.decode_tiled(z).astype(mx.float32)
        inside = mx.clip(image * 0.5 + 0.5, 0.0, 1.0)
        return mx.where(mx.isfinite(image), inside, mx.nan)

    def picture(self, x: mx.array, latent_size: LatentSize = (64, 64)) -> mx.array:
        """The same, evaluated. Raises `NotFiniteError` for pictures that are not finite either."""
        image = self.decode(x, latent_size)
        is_finite = mx.isfinite(image).all()
        mx.eval(image, is_finite)
        if not is_finite.item():
            raise self.not_finite("the autoencoder", self.dtype_beside)
        return image

    def pixels(self, x: mx.array, latent_size: LatentSize = (64, 64)) -> np.ndarray:
        """The same as uint8 [B, H, W, 3]. Raises as `picture`."""
        return to_pixels(self.picture(x, latent_size))

    # What a stage is held to: sizes, numbers, memory

    def check_size(self, latent_size: LatentSize, source: SourceImage | None = None) -> None:
        """Raises `UsageError` where the sides are odd or the source is of another size."""
        if any(side < latents.PATCH or side % latents.PATCH for side in latent_size):
            raise UsageError(f"latent_size is {latent_size}; both sides must be even numbers.")
        downsampling = self.architecture.downsampling
        height, width = (side * downsampling for side in latent_size)
        if source is not None and source.pixels.shape[:2] != (height, width):
            raise UsageError(
                f"the source picture is {source.pixels.shape[0]}x{source.pixels.shape[1]} and the "
                f"image {height}x{width}; scale the source to the image's size."
            )

    def not_finite(self, what: str, dtype: mx.Dtype | None = None) -> NotFiniteError:
        """That NaN or infinity came out of `what`, which computes in `dtype`, and what may help.

        None is the transformer's.
        """
        dtype = dtype or self.dtype
        helps = [f"`dtype` {WIDER[dtype]}"] if dtype in WIDER else []
        if self.adapters:
            helps.append("a smaller strength for `adapter`")
        elif dtype != mx.float16:  # which overflows with weights that are sound
            check = f"fluxmesh models check {shlex.quote(self.name)}"
            helps.append(f"`{check}`, which looks for damaged weights")
        kind = str(dtype).rpartition(".")[2]
        return NotFiniteError(
            f"NaN or infinity came out of {what} with {self.name} in {kind}, and would be a black "
            f"picture; try {', or '.join(helps)}."
        )

    def bounded_steps(
        self, latent_size: LatentSize, added: int = 0
    ) -> AbstractContextManager[None]:
        """Inside, MLX runs no further ahead of a step than it has to (`device_memory.bounded`).

        `added` counts the tokens of reference pictures.
        """
        rows, columns = (side // latents.PATCH for side in latent_size)
        tokens = rows * columns + self.architecture.text_length + added
        hidden_size, dtype = self.architecture.shape.hidden_size, self.dtype
        is_quantized = bool(self.checkpoint.bits or self.bits)
        room = device_memory.denoising_room(
            hidden_size, tokens, dtype, self.low_memory, is_quantized=is_quantized
        )
        return device_memory.bounded(room)

    def bounded_pixels(
        self, height: int, width: int, images: int = 1
    ) -> AbstractContextManager[None]:
        """The same for decoding `images` pictures of so many pixels at once."""
        model, dtype = self.architecture, self.dtype
        room = device_memory.decoding_room(model, height, width, dtype, self.low_memory)
        return _bounded_blocks(images * room)

    def bounded_encode(self, pixels: int) -> AbstractContextManager[None]:
        """The same for encoding a picture of so many pixels."""
        room = device_memory.encoding_room(self.architecture, pixels, self.dtype, self.low_memory)
        return _bounded_blocks(room)


@contextmanager
def _bounded_blocks(room: float) -> Iterator[None]:
    """Inside, an autoencoder's results that wait take about `room`, whatever MLX counts."""
    with device_memory.bounded(room):
        if device_memory.counts_operations():
            with in_pieces():
                yield
        else:
            yield


def to_pixels(images: mx.array) -> np.ndarray:
    """Pictures [B, H, W, 3] in [0, 1] as uint8; evaluates."""
    return np.round(np.array(images.astype(mx.float32)) * 255.0).astype(np.uint8)
