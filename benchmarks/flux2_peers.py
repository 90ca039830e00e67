"""The denoising loops of `peers.py` for FLUX.2 klein: fluxmesh, mflux and diffusers.

One image, four steps' worth of a distilled model (no guidance); time and memory of a step do not
depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.harness import Skipped
from benchmarks.peers import Diffusers, Fluxmesh, OnMlx, Tick, reference_grids
from fluxmesh.models.flux2 import positions
from fluxmesh.models.flux2.config import KLEIN_4B, KLEIN_9B, Flux2Config, Flux2Schedule
from fluxmesh.sampling import latents
from fluxmesh.sampling.schedule import timesteps

if TYPE_CHECKING:
    from fluxmesh.models.runtime import DenoisePlan


def inputs(
    config: Flux2Config, height: int, width: int, text_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(noise [1, L, in_channels], the text encoder's features [1, T, F]), float32."""
    rng = np.random.Generator(np.random.Philox(7))
    text = rng.standard_normal((1, text_tokens, config.context_in_dim), dtype=np.float32)
    return latents.initial_noise(7, height, width, config.in_channels // 4), text


class FluxmeshKlein(Fluxmesh):
    """fluxmesh, as an engine drives it."""

    def _transformer(self) -> tuple[Any, Callable[[str, str, tuple[int, ...]], int | None]]:
        from fluxmesh.models.flux2.quantization import group_size
        from fluxmesh.models.flux2.transformer import Flux2

        return Flux2(self.config), group_size

    def planned(
        self, height: int, width: int, steps: int, text_tokens: int
    ) -> tuple[Any, DenoisePlan]:
        import mlx.core as mx

        from fluxmesh.models.flux2.runtime import TextFeatures, plan, references_of

        noise, text = map(mx.array, inputs(self.config, height, width, text_tokens))
        times = timesteps(steps, noise.shape[1], Flux2Schedule())
        features = TextFeatures(text.astype(self.dtype))
        grids = reference_grids(self.references, self.config.in_channels, height, width)
        made = plan(
            self.flow,
            features,
            times,
            (height // 8, width // 8),
            1.0,
            is_distilled=True,
            references=references_of([mx.array(grid) for grid in grids]),
            remembers_references=self.keeps_references,
        )
        return noise, made


class MfluxKlein(OnMlx):
    """mflux, whose loop is compiled as a whole."""

    def __init__(self, config: Flux2Config, dtype: str, bits: int | None) -> None:
        super().__init__(config, dtype, bits)
        if dtype != "bfloat16":
            raise Skipped("mflux's weights are bfloat16 only")
        if config not in (KLEIN_4B, KLEIN_9B):
            raise Skipped("mflux is compared at the published sizes only")
        from mflux.models.flux2.model.flux2_transformer.transformer import (  # type: ignore[import-not-found]
            Flux2Transformer,
        )

        from benchmarks.randomness import fill

        self.transformer = Flux2Transformer(
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
        )
        fill(self.transformer, self.dtype, self._is_quantized, bits)

    def software(self) -> str:
        from importlib.metadata import version

        return f"mflux {version('mflux')}, {super().software()}"

    @staticmethod
    def _is_quantized(path: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[1] % 64 == 0

    def denoise(self, height: int, width: int, steps: int, text_tokens: int, tick: Tick) -> Any:
        import mlx.core as mx
        from mflux.models.flux2.variants.txt2img.flux2_klein import (  # type: ignore[import-not-found]
            Flux2Klein,
        )

        x, text = (
            mx.array(values).astype(self.dtype)
            for values in inputs(self.config, height, width, text_tokens)
        )
        ids = mx.array(positions.image_positions(height // 16, width // 16))[None]
        text_ids = mx.array(positions.text_positions(text_tokens))[None]
        times = timesteps(steps, x.shape[1], Flux2Schedule())
        mx.eval(x, text, ids, text_ids)
        predict = Flux2Klein._predict(self.transformer)
        for now, after in zip(times, times[1:], strict=False):
            velocity = predict(
                latents=x,
                latent_ids=ids,
                prompt_embeds=text,
                text_ids=text_ids,
                negative_prompt_embeds=None,
                negative_text_ids=None,
                guidance=1.0,
                timestep=mx.array(now * 1000),
            )
            x = (x + (after - now) * velocity).astype(self.dtype)
            mx.eval(x)
            tick()
        return None  # its tensors have other names, so other numbers


class DiffusersKlein(Diffusers):
    """diffusers' `Flux2KleinPipeline`, or that of 9B KV."""

    def _transformer(self) -> Any:
        from diffusers import Flux2Transformer2DModel

        config = self.config
        return Flux2Transformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        )

    def _pipeline(self, transformer: Any) -> Any:
        from diffusers import (
            AutoencoderKLFlux2,
            FlowMatchEulerDiscreteScheduler,
            Flux2KleinKVPipeline,
            Flux2KleinPipeline,
        )

        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        # The pipeline reads its autoencoder's number of levels; it computes nothing here.
        levels = 4
        autoencoder = AutoencoderKLFlux2(
            block_out_channels=(8,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=4,
            latent_channels=self.config.in_channels // 4,
        ).to(self.device, self.dtype)
        pipeline = Flux2KleinKVPipeline if self.keeps_references else Flux2KleinPipeline
        return pipeline(scheduler, autoencoder, None, None, transformer, True)

    def _arguments(self, height: int, width: int, text_tokens: int) -> dict[str, Any]:
        noise, text = inputs(self.config, height, width, text_tokens)
        square = noise.reshape(1, height // 16, width // 16, -1).transpose(0, 3, 1, 2)
        arguments = {
            "prompt_embeds": self.placed(text),
            "latents": self.placed(np.ascontiguousarray(square)),
        }
        if not self.keeps_references:  # where there is no such argument
            arguments["guidance_scale"] = 1.0
        if self.references:
            # Grey: its autoencoder here is a tiny one, and no step waits for it.
            picture = Image.new("RGB", (width, height), "grey")
            arguments["image"] = [picture] * self.references
        return arguments
