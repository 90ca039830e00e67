"""Sizes of BFL's single files of FLUX.2, which have no config: read from their tensors' shapes.

What shapes do not tell is BFL's own: a head's channels go in four equal parts to the rotary axes,
whose theta is 2000, and the autoencoder norms in 32 groups. Whether a model was distilled no file
tells: its weights have the same names and shapes as those of its base model. Imports no mlx.
"""

from __future__ import annotations

from pathlib import Path

from fluxmesh.models.file_shapes import FileShapes
from fluxmesh.models.flux2.config import Flux2AutoencoderConfig, Flux2Config


def flux2_config_of(path: Path) -> Flux2Config:
    """Sizes of the transformer in one of BFL's single files.

    Raises `WeightsError` where it is no transformer of FLUX.2.
    """
    shapes = FileShapes(path, "a FLUX.2 transformer in BFL's layout")
    shapes.pair("single_stream_modulation.lin.weight")
    hidden, in_channels = shapes.pair("img_in.weight")
    (head_dim,) = shapes.of("double_blocks.0.img_attn.norm.query_norm.scale", 1)
    return Flux2Config(
        in_channels=in_channels,
        out_channels=shapes.pair("final_layer.linear.weight")[0],
        context_in_dim=shapes.pair("txt_in.weight")[1],
        hidden_size=hidden,
        mlp_ratio=shapes.pair("double_blocks.0.img_mlp.2.weight")[1] / hidden,
        num_heads=hidden // head_dim,
        depth=shapes.count("double_blocks.{}.img_attn.qkv.weight"),
        depth_single_blocks=shapes.count("single_blocks.{}.linear1.weight"),
        axes_dim=(head_dim // 4,) * 4,
        guidance_embed="guidance_in.in_layer.weight" in shapes.entries,
    )


def flux2_autoencoder_config_of(path: Path) -> Flux2AutoencoderConfig:
    """Sizes of the autoencoder in BFL's `ae.safetensors`, also of one with the small decoder.

    Raises `WeightsError` where it is no autoencoder of FLUX.2.
    """
    shapes = FileShapes(path, "FLUX.2's autoencoder in BFL's layout")
    shapes.of("bn.running_mean", 1)
    levels = shapes.count("encoder.down.{}.block.0.conv1.weight")

    def widths(pattern: str) -> tuple[int, ...]:
        return tuple(shapes.of(pattern.format(level), 4)[0] for level in range(levels))

    return Flux2AutoencoderConfig(
        in_channels=shapes.of("encoder.conv_in.weight", 4)[1],
        out_ch=shapes.of("decoder.conv_out.weight", 4)[0],
        widths=widths("encoder.down.{}.block.0.conv1.weight"),
        decoder_widths=widths("decoder.up.{}.block.0.conv1.weight"),
        num_res_blocks=shapes.count("encoder.down.0.block.{}.conv1.weight"),
        z_channels=shapes.of("decoder.conv_in.weight", 4)[1],
        mid_attention="encoder.mid.attn_1.q.weight" in shapes.entries,
    )
