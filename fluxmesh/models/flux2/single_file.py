"""FLUX.2's single files, which have no config: what they are, and their sizes by tensors' shapes.

What shapes do not tell is BFL's own: a head's channels go in four equal parts to the rotary axes,
whose theta is 2000, and the autoencoder norms in 32 groups. Whether a model was distilled no file
tells: its weights have the same names and shapes as those of its base model. Imports no mlx.
"""

from __future__ import annotations

from pathlib import Path

from fluxmesh.errors import WeightsError
from fluxmesh.models.files.kinds import FileContents, FileKind
from fluxmesh.models.files.shapes import FileShapes
from fluxmesh.models.flux2.config import (
    STATES,
    Flux2AutoencoderConfig,
    Flux2Config,
    TextEncoderConfig,
)
from fluxmesh.models.flux2.tensor_maps import EMBEDDING
from fluxmesh.models.tensor_map import COMFY_PREFIX

NAME = "flux2"
NAME_THE_TRANSFORMER = (
    "name the file of the transformer (flux-2-….safetensors), which finds this one beside it or in "
    "ComfyUI's folders"
)
NAME_THE_FOLDER = "name the folder above its own, which holds model_index.json"
ATTENTION = "layers.0.self_attn"
MISTRAL_HEAD_DIM = 128
# Fields of a config that no shape of a tensor tells.
SHAPES_HIDE = {
    "transformer": ("axes_dim", "theta"),
    "text_encoder": (
        *("rms_norm_eps", "rope_theta"),
        *("head_dim", "num_attention_heads", "num_key_value_heads"),
    ),
    "vae": ("norm_groups", "batch_norm_eps"),
}
MISTRAL_WIDTH = 5120


def _is_mistral(contents: FileContents, prefix: str) -> bool:
    """ComfyUI's file brings its vocabulary along; of other language models the width differs."""
    _, width = contents.shapes[f"{prefix}{ATTENTION}.q_proj.weight"]
    return width == MISTRAL_WIDTH or "tekken_model" in contents.shapes


# Parts come last: a file that holds a transformer too is a model, whatever it holds beside it.
KINDS = (
    FileKind(
        "a FLUX.2 transformer",
        names=("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"),
        family=NAME,
        component="transformer",
    ),
    FileKind(
        "the transformer of a diffusers folder of FLUX.2",
        NAME_THE_FOLDER,
        names=("transformer_blocks.0.attn.to_q.weight", "single_stream_modulation.linear.weight"),
        family=NAME,
    ),
    FileKind(
        "the autoencoder of FLUX.2",
        NAME_THE_TRANSFORMER,
        names=(
            *("decoder.conv_in.weight", "bn.running_mean"),
            "encoder.down.0.block.0.conv1.weight",
        ),
        family=NAME,
        component="vae",
    ),
    FileKind(
        "half of FLUX.2's autoencoder, a decoder alone",
        "take the file that has the encoder too (full_encoder_small_decoder.safetensors)",
        names=("decoder.post_quant_conv.weight", "decoder.up.0.block.0.conv1.weight"),
        family=NAME,
    ),
    FileKind(
        "the autoencoder of a diffusers folder of FLUX.2",
        NAME_THE_FOLDER,
        names=("decoder.conv_in.weight", "bn.running_mean"),
        family=NAME,
    ),
    FileKind(
        "Mistral, the text encoder of FLUX.2 dev",
        NAME_THE_TRANSFORMER,
        names=("language_model.model.layers.0.self_attn.q_proj.weight",),
        family=NAME,
        component="text_encoder",
    ),
    FileKind(
        "Mistral, the text encoder of FLUX.2 dev, in ComfyUI's form",
        NAME_THE_TRANSFORMER,
        names=(f"{ATTENTION}.q_proj.weight",),
        fits=_is_mistral,
        family=NAME,
        component="text_encoder",
    ),
    FileKind(
        "Qwen3, the text encoder of FLUX.2 klein and other models",
        NAME_THE_TRANSFORMER,
        names=(f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.q_norm.weight"),
        family=NAME,
        component="text_encoder",
    ),
)


def flux2_config_of(path: Path, prefix: str = COMFY_PREFIX) -> Flux2Config:
    """Sizes of the transformer in one of BFL's single files.

    Raises `WeightsError` where it is no transformer of FLUX.2.
    """
    shapes = FileShapes(path, "a FLUX.2 transformer in BFL's layout", prefix)
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


def flux2_autoencoder_config_of(path: Path, prefix: str = "") -> Flux2AutoencoderConfig:
    """Sizes of the autoencoder in BFL's `ae.safetensors`, also of one with the small decoder.

    Raises `WeightsError` where it is no autoencoder of FLUX.2.
    """
    shapes = FileShapes(path, "FLUX.2's autoencoder in BFL's layout", prefix)
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


def text_encoder_config_of(path: Path, prefix: str = "") -> TextEncoderConfig:
    """Sizes of the language model in one file of Qwen3, or of Mistral Small 3.

    Raises `WeightsError` where it is neither, or has not all layers that are read.
    """
    shapes = FileShapes(path, "a text encoder of FLUX.2", prefix)
    before = "language_model.model."
    inner = before if f"{before}{ATTENTION}.q_proj.weight" in shapes.entries else ""
    is_qwen = f"{inner}{ATTENTION}.q_norm.weight" in shapes.entries
    kind = "qwen3" if is_qwen else "mistral3"
    layers = shapes.count(f"{inner}layers.{{}}.self_attn.q_proj.weight")
    if layers < max(STATES[kind]):
        raise WeightsError(
            f"{path} has {layers} layers where {max(STATES[kind])} are read, so it is not a text "
            "encoder of FLUX.2."
        )
    vocab_size, width = shapes.pair(f"{inner}{EMBEDDING}")
    queries, _ = shapes.pair(f"{inner}{ATTENTION}.q_proj.weight")
    keys, _ = shapes.pair(f"{inner}{ATTENTION}.k_proj.weight")
    head_dim = MISTRAL_HEAD_DIM
    if is_qwen:
        (head_dim,) = shapes.of(f"{inner}{ATTENTION}.q_norm.weight", 1)
    return TextEncoderConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=shapes.pair(f"{inner}layers.0.mlp.gate_proj.weight")[0],
        num_attention_heads=max(queries // head_dim, 1),
        num_key_value_heads=max(keys // head_dim, 1),
        head_dim=head_dim,
        rms_norm_eps=1e-6 if is_qwen else 1e-5,
        rope_theta=1e6 if is_qwen else 1e9,
        qk_norm=is_qwen,
        states=STATES[kind],
    )
