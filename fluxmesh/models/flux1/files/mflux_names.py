"""FLUX.1 as mflux saves it: its names for the tensors, and the sizes by their shapes.

`mflux-save`, and the models on the Hub that it made, hold folders like diffusers', without configs:
the modules' own names in `0.safetensors`, `1.safetensors` and so on, most matrices in MLX's
quantized form, convolutions with their channels last. Imports no mlx.
Source: filipstrand/mflux `models/common/weights/saving/model_saver.py`, `models/flux/weights/`.
"""

from __future__ import annotations

from fluxmesh.models.files.shapes import FileShapes
from fluxmesh.models.flux1.config import AutoencoderConfig, FluxConfig, T5Config
from fluxmesh.models.tensor_map import ModelTensor, Rows, Tensors

# (part of a name in diffusers' or transformers' file, the same in mflux's), for each component
_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": ((".net.0.proj.", ".linear1."), (".net.2.", ".linear2.")),
    "text_encoder": (),
    "text_encoder_2": (
        ("encoder.final_layer_norm.", "final_layer_norm."),
        ("encoder.block.", "t5_blocks."),
        (".layer.0.", ".attention."),
        (".layer.1.", ".ff."),
    ),
    "vae": (
        ("coder.conv_in.", "coder.conv_in.conv2d."),
        ("coder.conv_out.", "coder.conv_out.conv2d."),
        ("coder.conv_norm_out.", "coder.conv_norm_out.norm."),
    ),
}
# mflux's last modulation has no bias, so that the one of the model is lost.
LEFT_OUT = frozenset({"norm_out.linear.bias"})


def in_mflux_folder(component: str, tensors: Tensors) -> Tensors:
    """The same targets, by mflux's names of the pieces that make them."""

    def renamed(key: str) -> str:
        for theirs, mine in _NAMES[component]:
            key = key.replace(theirs, mine)
        return key

    return {
        name: ModelTensor(
            target.shape,
            tuple(Rows(renamed(piece.key), piece.start, piece.stop) for piece in target.pieces),
        )
        for name, target in tensors.items()
    }


def flux_config_of(shapes: FileShapes) -> FluxConfig:
    """Sizes of the transformer."""
    hidden, in_channels = shapes.pair("x_embedder.weight")
    (head_dim,) = shapes.of("transformer_blocks.0.attn.norm_q.weight", 1)
    return FluxConfig(
        in_channels=in_channels,
        out_channels=shapes.pair("proj_out.weight")[0],
        vec_in_dim=shapes.pair("time_text_embed.text_embedder.linear_1.weight")[1],
        context_in_dim=shapes.pair("context_embedder.weight")[1],
        hidden_size=hidden,
        mlp_ratio=shapes.pair("transformer_blocks.0.ff.linear1.weight")[0] / hidden,
        num_heads=hidden // head_dim,
        depth=shapes.count("transformer_blocks.{}.attn.to_q.weight"),
        depth_single_blocks=shapes.count("single_transformer_blocks.{}.attn.to_q.weight"),
        axes_dim=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
        guidance_embed="time_text_embed.guidance_embedder.linear_1.weight" in shapes.entries,
    )


def t5_config_of(shapes: FileShapes) -> T5Config:
    """Sizes of the T5 encoder."""
    attention = "t5_blocks.0.attention.SelfAttention"
    buckets, heads = shapes.pair(f"{attention}.relative_attention_bias.weight")
    vocab_size, width = shapes.pair("shared.weight")
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=shapes.pair(f"{attention}.q.weight")[0] // heads,
        d_ff=shapes.pair("t5_blocks.0.ff.DenseReluDense.wi_0.weight")[0],
        num_layers=shapes.count("t5_blocks.{}.attention.SelfAttention.q.weight"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def autoencoder_config_of(shapes: FileShapes) -> AutoencoderConfig:
    """Sizes of the autoencoder; a convolution's shape is [out, height, width, in]."""
    levels = shapes.count("encoder.down_blocks.{}.resnets.0.conv1.weight")
    return AutoencoderConfig(
        in_channels=shapes.of("encoder.conv_in.conv2d.weight", 4)[3],
        out_ch=shapes.of("decoder.conv_out.conv2d.weight", 4)[0],
        widths=tuple(
            shapes.of(f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0]
            for level in range(levels)
        ),
        num_res_blocks=shapes.count("encoder.down_blocks.0.resnets.{}.conv1.weight"),
        z_channels=shapes.of("decoder.conv_in.conv2d.weight", 4)[3],
        mid_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes.entries,
    )
