"""One denoising loop a library, on random weights: what `step.py` times.

Each class builds FLUX.1's transformer at the sizes of a config and runs denoising steps of one
image as that library's own users do, calling `tick` when a step's result is there; those of FLUX.2
stand in `flux2_peers.py`. Only what a
case needs is imported: a library that is absent raises ImportError, which the case reports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from benchmarks.harness import Skipped
from fluxmesh.models.flux1 import positions
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.sampling import latents

if TYPE_CHECKING:
    from fluxmesh.models.runtime import DenoisePlan

Tick = Callable[[], None]
GUIDANCE = 4.0


class Peer(Protocol):
    """A transformer ready to denoise."""

    references: int  # pictures of the image's size that it edits
    keeps_references: bool  # their keys and values are computed once: klein 9B KV

    def software(self) -> str:
        """Names and versions."""

    def reset_peak(self) -> None:
        """Memory that is held from here on counts towards `peak`."""

    def peak(self) -> int:
        """Most bytes of the device that were held at once since `reset_peak`."""

    def denoise(self, height: int, width: int, steps: int, text_tokens: int, tick: Tick) -> Any:
        """Runs `steps` steps; returns the latents after the first, float32, to compare."""


def inputs(
    config: FluxConfig, height: int, width: int, text_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(noise [1, L, 64], T5's features [1, T, F], CLIP's vector [1, V]), float32."""
    rng = np.random.Generator(np.random.Philox(7))
    text = rng.standard_normal((1, text_tokens, config.context_in_dim), dtype=np.float32)
    vector = rng.standard_normal((1, config.vec_in_dim), dtype=np.float32)
    return latents.initial_noise(7, height, width), text, vector


def reference_grids(count: int, channels: int, height: int, width: int) -> list[np.ndarray]:
    """As many encoded pictures [1, height / 16, width / 16, channels], float32."""
    rng = np.random.Generator(np.random.Philox(8))
    shape = (1, height // 16, width // 16, channels)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(count)]


class OnMlx:
    """What peers on MLX have in common."""

    references, keeps_references = 0, False

    def __init__(self, config: Any, dtype: str, bits: int | None) -> None:
        import mlx.core as mx

        self.config, self.bits = config, bits
        self.dtype: Any = getattr(mx, dtype)

    def software(self) -> str:
        import mlx.core as mx

        return f"MLX {mx.__version__}"

    def reset_peak(self) -> None:
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()

    def peak(self) -> int:
        import mlx.core as mx

        return mx.get_peak_memory()

    def inputs(self, height: int, width: int, text_tokens: int) -> list[Any]:
        """Noise, T5's features and CLIP's vector, float32."""
        import mlx.core as mx

        return [mx.array(values) for values in inputs(self.config, height, width, text_tokens)]


class Fluxmesh(OnMlx):
    """fluxmesh, as an engine drives it: `low_memory` drops the modulation weights first."""

    def __init__(self, config: Any, dtype: str, bits: int | None, low_memory: bool) -> None:
        super().__init__(config, dtype, bits)
        self.ranks: Any = None  # over which `flow` is spread
        self.low_memory = low_memory
        self.flow: Any = self._made()

    def _made(self) -> Any:
        from benchmarks.randomness import fill
        from fluxmesh.kernels.packed_linear import PackedLinear
        from fluxmesh.models.module_tree import replace_module

        flow, group_size = self._transformer()
        if self.bits is not None:  # as the loader does
            for path, module in flow.named_modules():
                weight = module.get("weight")
                if weight is None or not group_size("transformer", f"{path}.weight", weight.shape):
                    continue
                rows, columns = weight.shape
                how = {"group_size": 64, "bits": self.bits}
                replace_module(flow, path, PackedLinear(columns, rows, "bias" in module, **how))
        fill(flow, self.dtype, lambda _path, _module: False, None)
        flow.make_room()
        return flow

    def _transformer(self) -> tuple[Any, Callable[[str, str, tuple[int, ...]], int | None]]:
        """The transformer, and its family's rule of what is quantized."""
        from fluxmesh.models.flux1.quantization import group_size
        from fluxmesh.models.flux1.transformer import Flux

        return Flux(self.config), group_size

    def planned(
        self, height: int, width: int, steps: int, text_tokens: int
    ) -> tuple[Any, DenoisePlan]:
        """Noise [1, L, C], and what every step has in common."""
        import mlx.core as mx

        from fluxmesh.models.flux1.config import ScheduleConfig
        from fluxmesh.models.flux1.runtime import plan
        from fluxmesh.sampling.schedule import timesteps

        noise, text, vector = self.inputs(height, width, text_tokens)
        schedule = ScheduleConfig(use_dynamic_shifting=True)
        times = timesteps(steps, noise.shape[1], schedule)
        known = {"t5": text.astype(self.dtype), "clip": vector.astype(self.dtype)}
        grids = reference_grids(self.references, self.config.out_channels, height, width)
        size, edited = (height // 8, width // 8), mx.array(grids[0]) if grids else None
        return noise, plan(self.flow, known, times, size, GUIDANCE, reference=edited)

    def denoise(self, height: int, width: int, steps: int, text_tokens: int, tick: Tick) -> Any:
        import mlx.core as mx

        from fluxmesh.engine.device_memory import bounded, denoising_room
        from fluxmesh.engine.lookahead import walked
        from fluxmesh.sampling.denoise import denoise

        if self.flow.modulation_released:
            self.flow = self._made()
        noise, made = self.planned(height, width, steps, text_tokens)
        made = made.prepared(self.flow)
        mx.eval(*made.arrays)
        if self.low_memory:
            self.flow.release_modulation()
            self.reset_peak()
        first = None
        tokens = text_tokens + noise.shape[1]
        walk = denoise(self.flow, made, noise)
        how = {"scarce": self.low_memory, "is_quantized": self.bits is not None}
        with bounded(denoising_room(self.config.hidden_size, tokens, self.dtype, **how)):
            for step, _ in walked(walk, steps, self.ranks, stopping=lambda: False):
                tick()
                first = np.array(step.x) if first is None else first
        return first


class Apple(OnMlx):
    """The `flux` example of ml-explore/mlx-examples, from a folder."""

    def __init__(self, config: FluxConfig, dtype: str, bits: int | None, folder: Path) -> None:
        super().__init__(config, dtype, bits)
        sys.path.insert(0, str(apple_folder(folder)))
        from flux.flux import FluxPipeline  # type: ignore[import-not-found]
        from flux.model import Flux, FluxParams  # type: ignore[import-not-found]
        from flux.sampler import FluxSampler  # type: ignore[import-not-found]

        from benchmarks.randomness import fill

        params = FluxParams(
            in_channels=config.in_channels,
            vec_in_dim=config.vec_in_dim,
            context_in_dim=config.context_in_dim,
            hidden_size=config.hidden_size,
            mlp_ratio=config.mlp_ratio,
            num_heads=config.num_heads,
            depth=config.depth,
            depth_single_blocks=config.depth_single_blocks,
            axes_dim=list(config.axes_dim),
            theta=config.theta,
            qkv_bias=True,
            guidance_embed=config.guidance_embed,
        )
        # Its constructor downloads weights; the loop needs no more than these.
        self.pipeline = FluxPipeline.__new__(FluxPipeline)
        self.pipeline.dtype = self.dtype
        self.pipeline.sampler = FluxSampler("flux-dev")
        self.pipeline.flow = Flux(params)
        fill(self.pipeline.flow, self.dtype, self._is_quantized, bits)

    @staticmethod
    def _is_quantized(path: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[1] % 512 == 0  # txt2image.py

    def denoise(self, height: int, width: int, steps: int, text_tokens: int, tick: Tick) -> Any:
        import mlx.core as mx

        noise, text, vector = (
            x.astype(self.dtype) for x in self.inputs(height, width, text_tokens)
        )
        ids = mx.array(positions.image_positions(height // 16, width // 16))[None]
        text_ids = mx.zeros((1, text_tokens, 3), dtype=mx.int32)
        mx.eval(noise, text, vector, ids, text_ids)
        first = None
        for x in self.pipeline._denoising_loop(
            noise, ids, text, text_ids, vector, num_steps=steps, guidance=GUIDANCE
        ):
            mx.eval(x)
            tick()
            first = np.array(x.astype(mx.float32)) if first is None else first
        return first


def apple_folder(folder: Path) -> Path:
    """The folder to import the example from. Raises `Skipped` where it is not there."""
    for candidate in (folder, folder / "flux"):
        if (candidate / "flux" / "model.py").is_file():
            return candidate.resolve()
    raise Skipped(f"{folder} holds no mlx-examples/flux (no flux/model.py below it)")


class Mflux(OnMlx):
    """mflux; the number of blocks is all that can be chosen of its sizes."""

    def __init__(self, config: FluxConfig, dtype: str, bits: int | None) -> None:
        super().__init__(config, dtype, bits)
        if dtype != "bfloat16":
            raise Skipped("mflux's weights are bfloat16 only")
        from mflux.models.common.config import ModelConfig  # type: ignore[import-not-found]
        from mflux.models.flux.model.flux_transformer.transformer import (  # type: ignore[import-not-found]
            Transformer,
        )

        from benchmarks.randomness import fill

        self.model = ModelConfig.dev()
        self.config = FluxConfig(guidance_embed=True)  # its widths are constants
        self.transformer = Transformer(self.model, config.depth, config.depth_single_blocks)
        fill(self.transformer, self.dtype, self._is_quantized, bits)

    def software(self) -> str:
        from importlib.metadata import version

        return f"mflux {version('mflux')}, {super().software()}"

    @staticmethod
    def _is_quantized(path: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[1] % 64 == 0

    def denoise(self, height: int, width: int, steps: int, text_tokens: int, tick: Tick) -> Any:
        import mlx.core as mx
        from mflux.models.common.config import Config

        config = Config(
            self.model, num_inference_steps=steps, height=height, width=width, guidance=GUIDANCE
        )
        x, text, vector = self.inputs(height, width, text_tokens)  # float32, as its own
        mx.eval(x, text, vector)
        for t in range(steps):
            velocity = self.transformer(
                t=t,
                config=config,
                hidden_states=x,
                prompt_embeds=text,
                pooled_prompt_embeds=vector,
            )
            x = config.scheduler.step(noise=velocity, timestep=t, latents=x)
            mx.eval(x)
            tick()
        return None  # its tensors have other names, so other numbers


class Diffusers:
    """diffusers' `FluxPipeline`, or Kontext's where it edits.

    `compiled` is "", "model" (all of it) or "blocks" (regional).
    """

    references, keeps_references = 0, False

    def __init__(self, config: Any, dtype: str, bits: int | None, compiled: str) -> None:
        if bits is not None:
            raise Skipped("diffusers is compared without quantization only")
        import torch

        self.torch, self.config = torch, config
        self.dtype = getattr(torch, dtype)
        self.device = "cpu"
        if torch.cuda.is_available():
            self.device = "cuda"
        elif torch.backends.mps.is_available():
            self.device = "mps"
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                transformer = self._transformer().eval()
        finally:
            torch.set_default_dtype(before)
        if compiled == "model":
            transformer.compile(fullgraph=True, dynamic=False)
        elif compiled == "blocks":
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.transformer = transformer

    def _transformer(self) -> Any:
        from diffusers import FluxTransformer2DModel

        config = self.config
        return FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
            pooled_projection_dim=config.vec_in_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        )

    def _pipeline(self, transformer: Any) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline

        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipeline = FluxKontextPipeline if self.references else FluxPipeline
        return pipeline(scheduler, None, None, None, None, None, transformer)

    def _arguments(self, height: int, width: int, text_tokens: int) -> dict[str, Any]:
        """What the pipeline takes in place of a prompt and a seed."""
        noise, text, vector = map(self.placed, inputs(self.config, height, width, text_tokens))
        arguments = {
            "prompt_embeds": text,
            "pooled_prompt_embeds": vector,
            "guidance_scale": GUIDANCE,
            "latents": noise,
        }
        if self.references:
            shape = (1, self.config.out_channels // 4, height // 8, width // 8)
            drawn = np.random.Generator(np.random.Philox(8)).standard_normal(shape, np.float32)
            # `max_area`: a picture of this size stays as it is.
            arguments |= {"image": self.placed(drawn), "max_area": height * width}
        return arguments

    def placed(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(array).to(self.device, self.dtype)

    def software(self) -> str:
        import diffusers

        return f"diffusers {diffusers.__version__}, PyTorch {self.torch.__version__}"

    def reset_peak(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """On Metal what is held now: PyTorch keeps no peak there. On a CPU 0: not known."""
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated()
        return self.torch.mps.current_allocated_memory() if self.device == "mps" else 0

    def denoise(self, height: int, width: int, steps: int, text_tokens: int, tick: Tick) -> Any:
        def wait(_pipeline: Any, _step: int, _time: Any, kept: Any) -> Any:
            if self.device != "cpu":
                getattr(self.torch, self.device).synchronize()
            tick()
            return kept

        pipeline = self._pipeline(self.transformer)
        pipeline.set_progress_bar_config(disable=True)
        pipeline(
            **self._arguments(height, width, text_tokens),
            height=height,
            width=width,
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=wait,
        )
        return None  # PyTorch drew its own weights
