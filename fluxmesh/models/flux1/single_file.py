"""Sizes of BFL's single files, which have no config: read from the shapes of their tensors.

Stands below `checkpoint.py`. What shapes do not tell is BFL's own: a head's channels go 1/8, 7/16
and 7/16 to the three rotary axes, and the autoencoder norms in 32 groups. Imports no mlx.
"""

from __future__ import annotations

from pathlib import Path

from fluxmesh.models.file_shapes import FileShapes
from fluxmesh.models.flux1.config import AutoencoderConfig, FluxConfig


def flux_config_of(path: Path) -> FluxConfig:
    """Sizes of the transformer in one of BFL's single files, from its tensors' shapes."""
    shapes = FileShapes(path, "a FLUX.1 transformer in BFL's layout")
    hidden, in_channels = shapes.pair("img_in.weight")
    (head_dim,) = shapes.of("double_blocks.0.img_attn.norm.query_norm.scale", 1)
    return FluxConfig(
        in_channels=in_channels,
        out_channels=shapes.pair("final_layer.linear.weight")[0],
        vec_in_dim=shapes.pair("vector_in.in_layer.weight")[1],
        context_in_dim=shapes.pair("txt_in.weight")[1],
        hidden_size=hidden,
        mlp_ratio=shapes.pair("double_blocks.0.img_mlp.0.weight")[0] / hidden,
        num_heads=hidden // head_dim,
        depth=shapes.count("double_blocks.{}.img_attn.qkv.weight"),
        depth_single_blocks=shapes.count("single_blocks.{}.linear1.weight"),
        axes_dim=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
        guidance_embed="guidance_in.in_layer.weight" in shapes.entries,
    )


def autoencoder_config_of(path: Path) -> AutoencoderConfig:
    """Sizes of the autoencoder in BFL's `ae.safetensors`, from its tensors' shapes."""
    shapes = FileShapes(path, "FLUX.1's autoencoder in BFL's layout")
    levels = shapes.count("encoder.down.{}.block.0.conv1.weight")
    out, into = shapes.of("encoder.conv_in.weight", 4)[:2]
    return AutoencoderConfig(
        in_channels=into,
        out_ch=shapes.of("decoder.conv_out.weight", 4)[0],
        widths=tuple(
            shapes.of(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)
        ),
        num_res_blocks=shapes.count("encoder.down.0.block.{}.conv1.weight"),
        z_channels=shapes.of("decoder.conv_in.weight", 4)[1],
        mid_attention="encoder.mid.attn_1.q.weight" in shapes.entries,
    )
