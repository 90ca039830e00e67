"""`FluxPipeline`: a checkpoint by name, and pictures out of it, one step at a time.

    flux = FluxPipeline("flux-schnell")
    steps = flux.generate_latents("A photo of an astronaut riding a horse", latent_size=(32, 64))
    mx.eval(next(steps))     # noise and text features: t5 and clip may leave now (`del flux.t5`)
    for x in steps:          # each step is lazy until evaluated: report, preview or stop here
        mx.eval(x)
    image = flux.decode(x, latent_size=(32, 64))     # [1, 256, 512, 3] in [0, 1]

The four models are attributes (`t5`, `clip`, `flow`, `ae`) that load when first used and leave with
`del` (`lazy_models.py`), so that at most one of the two large ones (T5, the transformer) need be in
memory. Each stage of a picture by itself stands in `stages.py`, which engines and trainings use as
well; the sampler is `sampling/denoise.py`.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.engine.stages import LatentSize, PipelineStages, to_pixels
from fluxmesh.events import Loading
from fluxmesh.images import composite
from fluxmesh.images.files import PictureFile, listed, pixels_of
from fluxmesh.models.runtime import NO_CONDITIONS
from fluxmesh.models.step_cache import StepCache
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import MAX_SEED, AdapterRef, FilledRequest, GenerateRequest, SourceImage
from fluxmesh.sampling.denoise import Guide, denoise
from fluxmesh.sampling.takes import check_given, check_takes

# A picture that a prompt speaks of, as a file or pixels, and how much it counts.
Reference = PictureFile | np.ndarray | tuple[PictureFile | np.ndarray, float]


class FluxPipeline(PipelineStages):
    """FLUX by name: text in, latents step by step, pictures out."""

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
                image = self.picture(x[k : k + 1], latent_size)
            if source is not None and source.mask is not None:
                image = mx.array(composite(to_pixels(image)[0], source)[None]) / 255.0
            images.append(image)
        return mx.concatenate(images)

    def _must_be_finite(self, is_finite: mx.array | None, step: int, steps: int) -> None:
        if is_finite is not None and not is_finite.item():
            raise self.not_finite(f"step {step} of {steps}")

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
