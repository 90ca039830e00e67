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

import math
import secrets
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.engine import device_memory
from fluxmesh.engine.lazy_models import Models
from fluxmesh.errors import NotFiniteError, UsageError
from fluxmesh.events import Loading
from fluxmesh.images.files import PictureFile, listed, pixels_of
from fluxmesh.models.runtime import (
    NO_CONDITIONS,
    Conditions,
    DenoisePlan,
    Flow,
    PromptFeatures,
)
from fluxmesh.models.step_cache import StepCache
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import (
    MAX_SEED,
    AdapterRef,
    FilledRequest,
    GenerateRequest,
    PromptCut,
    SourceImage,
)
from fluxmesh.sampling import latents
from fluxmesh.sampling.conditioning import PromptKey, PromptMemory
from fluxmesh.sampling.denoise import Guide, denoise
from fluxmesh.sampling.img2img import SourceLatents, composite, mask_latents, to_model_range
from fluxmesh.sampling.schedule import timesteps
from fluxmesh.sampling.takes import check_given, check_takes

# A picture that a prompt speaks of, as a file or pixels, and how much it counts.
Reference = PictureFile | np.ndarray | tuple[PictureFile | np.ndarray, float]
LatentSize = tuple[int, int]  # (height, width) in latents, 8 pixels each
# What holds larger numbers, or more of them, than the dtype that gave NaN or infinity.
WIDER = {mx.float16: "bfloat16 or float32", mx.bfloat16: "float32"}


class FluxPipeline(Models):
    """FLUX by name: text in, latents step by step, pictures out. One image at a time (B = 1)."""

    def __init__(
        self,
        name: str = "flux-schnell",
        t5_padding: bool = True,
        *,
        dtype: str = "bfloat16",
        bits: int | None = None,
        text_bits: int | None = None,
        adapters: Iterable[AdapterRef | str | tuple[str, float]] = (),
        fuse_adapters: bool = False,
        low_memory: bool = False,
        redux: str = "",
        download: bool = True,
        on_loading: Callable[[Loading], None] | None = None,
    ) -> None:
        """Finds the checkpoint and checks its files' headers; weights load when they are used.

        `name` is an alias, a Hub repository, a folder or a BFL file (`hub.resolve`). `t5_padding`
        pads prompts to the checkpoint's own length, as FLUX was trained. `dtype` is "bfloat16",
        "float32", or "float16" for the transformer with all else in bfloat16. `bits` (3|4|5|6|8)
        quantizes transformer and text encoders as they load, `text_bits` the text encoders where
        they are to have others. `adapters` are files or Hub ids, with strengths or without, fused
        into the weights with `fuse_adapters`. `low_memory` drops the modulation weights (27% of the
        transformer) once a request's modulations are computed, and loads the rest only then.
        `redux` names the FLUX.1 Redux that reads references for dev and schnell, a folder or a
        file; by itself it is the Hub's.
        `on_loading` hears of bytes read.

        Raises `ModelNotFoundError`, `WeightsError`, `AdapterError` or `UsageError`.
        """
        super().__init__(
            name,
            dtype=dtype,
            bits=bits,
            text_bits=text_bits,
            adapters=adapters,
            fuse_adapters=fuse_adapters,
            download=download,
            on_loading=on_loading,
        )
        self.t5_padding = t5_padding
        self.low_memory = low_memory
        self.redux = redux
        self.seed: int | None = None  # of the latest `generate_latents`
        self._memory = PromptMemory()

    # From text to latents

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

        `negative` is what to move away from, None the model's own. Raises `NotFiniteError`.
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

    def generate_latents(
        self,
        text: str,
        n_images: int = 1,
        num_steps: int | None = None,
        guidance: float = 4.0,
        latent_size: LatentSize | None = None,
        seed: int | None = None,
        *,
        source: SourceImage | None = None,
        guide: Guide | None = None,
        cache: float = 0.0,
        references: Iterable[Reference] = (),
        control: PictureFile | np.ndarray | None = None,
        negative: str | None = None,
        cfg: float | None = None,
    ) -> Iterator[Any]:  # the first is a tuple, as Apple's is
        """A generator: first the conditioning, then the latents after each step, all lazy.

        The first value is (x_T, x_positions, t5_conditioning, t5_positions, clip_conditioning);
        every other one x_t, float32 [n_images, L, 4C]. `num_steps` None is the checkpoint's own
        number; `guidance` is read by models that embed it (dev). Image k is the one that seed
        `seed + k` gives alone, to the byte; a seed of None is drawn, and kept in `self.seed`.
        `latent_size` None is (64, 64), or `latent_size_of` the references.

        `references` are pictures that the prompt speaks of, and `control` a map that the picture
        follows: files, or uint8 [H, W, 3]; a reference may come with its strength, as (picture,
        0.8), for FLUX.1 dev and schnell, which read it with Redux. `negative` is what to move away
        from with the strength `cfg`. Which of them a model takes, `Architecture.takes` says.

        `source` begins from a picture and repaints its mask (`fluxmesh.images`), `guide` is a
        custom loss on the expected picture (`denoise.Guide`). `cache` above 0 is the threshold of
        an approximation that skips most of some steps (`step_cache.py`); each step then evaluates
        its beginning by itself.

        Warns of a prompt whose end the model does not read (`cut`), and of such a negative one.
        Raises `UsageError` for numbers out of range, before anything is computed, and
        `NotFiniteError` after a step whose latents are not finite. That is known with the latents
        themselves, and is asked for once the step after it is on its way: nobody waits for it.
        """
        self.seed = secrets.randbelow(MAX_SEED // 2) if seed is None else seed
        asked = self._request(
            text,
            self.seed,
            latent_size,
            n_images=n_images,
            steps=num_steps,
            guidance=guidance,
            source=source,
            cache=cache,
            **_given(references),
            control=None if control is None else pixels_of(control, "control"),
            negative=negative,
            cfg=cfg,
        )
        side = self.architecture.downsampling
        latent_size = (asked.height // side, asked.width // side)
        for what, words in (("the prompt", text), ("the negative prompt", asked.negative)):
            if words and (cut := self.cut(words)):
                warnings.warn(cut.sentence(words, what), stacklevel=2)
        known = self.encode(text, asked.negative)
        noises = [self.noise(self.seed + k, latent_size) for k in range(n_images)]
        yield self.runtime.conditioning(mx.concatenate(noises), known, latent_size)
        begins = self.architecture.start(asked)
        start = None if begins is None else self.encode_source(begins)
        pictures = self.architecture.pictures(asked)
        made = self.plan(
            known,
            num_steps=num_steps,
            guidance=asked.guidance,
            latent_size=latent_size,
            strength=1.0 if source is None else source.strength,
            cfg=asked.cfg,
            conditions=(
                self.encode_pictures(pictures, asked.reference_strengths)
                if pictures
                else NO_CONDITIONS
            ),
        ).prepared(self.flow)
        images = [
            denoise(
                self.flow,
                made,
                x,
                source=start,
                guide=guide,
                caches=StepCache.of_calls(made.calls, cache) if cache else (),
            )
            for x in noises
        ]
        latest: mx.array | None = None  # whether the latents that were given last are finite
        for number, steps in enumerate(zip(*images, strict=True), start=1):
            x = mx.concatenate([step.x for step in steps])
            before, latest = latest, mx.isfinite(x).all()
            yield mx.depends(x, latest)
            self._must_be_finite(before, number - 1, made.steps)
        self._must_be_finite(latest, made.steps, made.steps)

    # From latents to pictures

    def decode(self, x: mx.array, latent_size: LatentSize = (64, 64)) -> mx.array:
        """Packed latents [B, L, 4C] to pictures [B, H, W, 3] in [0, 1], float32, lazy.

        Raises `NotFiniteError` for latents that are not finite. A number that the autoencoder makes
        infinite is NaN in the picture, which `pixels` refuses.
        """
        if not mx.isfinite(x).all().item():
            raise self.not_finite("the latents")
        z = latents.unpack(x, latent_size)
        image = self.ae.decode_tiled(z).astype(mx.float32)
        inside = mx.clip(image * 0.5 + 0.5, 0.0, 1.0)
        return mx.where(mx.isfinite(image), inside, mx.nan)

    def pixels(self, x: mx.array, latent_size: LatentSize = (64, 64)) -> np.ndarray:
        """Packed latents [B, L, 4C] to pictures, uint8 [B, H, W, 3]. Raises `NotFiniteError`."""
        return to_pixels(self._finite_picture(self.decode(x, latent_size)))

    def generate_images(
        self,
        text: str,
        n_images: int = 1,
        num_steps: int | None = None,
        guidance: float = 4.0,
        latent_size: LatentSize | None = None,
        seed: int | None = None,
        reload_text_encoders: bool = True,
        *,
        source: SourceImage | None = None,
        guide: Guide | None = None,
        cache: float = 0.0,
        references: Iterable[Reference] = (),
        control: PictureFile | np.ndarray | None = None,
        negative: str | None = None,
        cfg: float | None = None,
    ) -> mx.array:
        """Pictures [n_images, H, W, 3] in [0, 1], evaluated, at any latent size of even sides.

        Options are those of `generate_latents`, and so is what it raises. With
        `reload_text_encoders`, T5 and CLIP leave memory before the transformer loads. Where
        `source` has a mask, everything outside of it equals the source.
        """
        given = _given(references)
        read = given["references"]
        control = None if control is None else pixels_of(control, "control")
        latent_size = latent_size or self.latent_size_of(read, control)
        model = self.architecture
        added = model.added_tokens([model.fitted(picture) for picture in read])
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
            references=list(zip(read, given["reference_strengths"], strict=True)),
            control=control,
            negative=negative,
            cfg=cfg,
        )
        x, *_ = next(steps)
        if reload_text_encoders:
            self.reload_text_encoders()
        for x in steps:
            with self.bounded_steps(latent_size, added):
                mx.eval(x)
        side = model.downsampling
        images = []
        for k in range(n_images):
            with self.bounded_pixels(latent_size[0] * side, latent_size[1] * side):
                image = self._finite_picture(self.decode(x[k : k + 1], latent_size))
            if source is not None and source.mask is not None:
                image = mx.array(composite(to_pixels(image)[0], source)[None]) / 255.0
            images.append(image)
        return mx.concatenate(images)

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

    def _must_be_finite(self, is_finite: mx.array | None, step: int, steps: int) -> None:
        if is_finite is not None and not is_finite.item():
            raise self.not_finite(f"step {step} of {steps}")

    def _finite_picture(self, image: mx.array) -> mx.array:
        """`image`, evaluated. Raises `NotFiniteError`."""
        is_finite = mx.isfinite(image).all()
        mx.eval(image, is_finite)
        if not is_finite.item():
            raise self.not_finite("the autoencoder", self.dtype_beside)
        return image

    def bounded_steps(
        self, latent_size: LatentSize, added: int = 0
    ) -> AbstractContextManager[None]:
        """Inside, MLX runs no further ahead of a step than it has to (`device_memory.bounded`).

        `added` counts the tokens of reference pictures.
        """
        rows, columns = (side // latents.PATCH for side in latent_size)
        tokens = rows * columns + self.architecture.text_length + added
        hidden_size, dtype = self.architecture.shape.hidden_size, self.dtype
        return device_memory.bounded(
            device_memory.denoising_room(hidden_size, tokens, dtype, self.low_memory)
        )

    def bounded_pixels(
        self, height: int, width: int, images: int = 1
    ) -> AbstractContextManager[None]:
        """The same for decoding `images` pictures of so many pixels at once."""
        model, dtype = self.architecture, self.dtype
        room = device_memory.decoding_room(model, height, width, dtype, self.low_memory)
        return device_memory.bounded(images * room)

    def bounded_encode(self, pixels: int) -> AbstractContextManager[None]:
        """The same for encoding a picture of so many pixels."""
        room = device_memory.encoding_room(self.architecture, pixels, self.dtype, self.low_memory)
        return device_memory.bounded(room)

    def check_size(self, latent_size: LatentSize, source: SourceImage | None) -> None:
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

    def latent_size_of(
        self,
        references: Iterable[Reference] = (),
        control: PictureFile | np.ndarray | None = None,
    ) -> LatentSize:
        """The latents of a picture whose size nobody gives: (64, 64), or as these pictures have it.

        Those of references are their own, and of a control map its proportions.
        """
        read = _given(references)["references"]
        if read:
            self.read_references_with(self.redux)
        model = self.architecture
        size = model.size_of([model.fitted(picture) for picture in read])
        if control is not None and "control" in model.takes:
            size = model.size_of_control(pixels_of(control, "control"))
        if size is None:
            return 64, 64
        return size[0] // model.downsampling, size[1] // model.downsampling

    def _request(
        self, text: str, seed: int, latent_size: LatentSize | None, **fields: Any
    ) -> FilledRequest:
        """What is asked, with nothing left open.

        Raises the `UsageError` that the same numbers raise on the command line.
        """
        if fields["references"]:
            self.read_references_with(self.redux)
        model = self.architecture
        self.check_size(latent_size or (64, 64), None if latent_size is None else fields["source"])
        asked = GenerateRequest(text, seed, **fields)
        check_takes(asked.conditions, asked.references, self.name, model)
        check_given(asked, self.name, model)
        if latent_size is None:
            latent_size = self.latent_size_of(asked.references, asked.control)
        height, width = (side * model.downsampling for side in latent_size)
        return ModelSizes(model).fill(replace(asked, height=height, width=width))


def _given(references: Iterable[Reference]) -> dict[str, Any]:
    """The fields of a request for references, each with its strength or without."""
    each_of = listed(references, "references")
    pairs = [each if isinstance(each, tuple) else (each, 1.0) for each in each_of]
    return {
        "references": tuple(pixels_of(picture, "references") for picture, _ in pairs),
        "reference_strengths": tuple(float(strength) for _, strength in pairs),
    }


def to_pixels(images: mx.array) -> np.ndarray:
    """Pictures [B, H, W, 3] in [0, 1] as uint8; evaluates."""
    return np.round(np.array(images.astype(mx.float32)) * 255.0).astype(np.uint8)
