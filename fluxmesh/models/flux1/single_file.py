"""FLUX.1's single files, which have no config: what they are, and their sizes by tensors' shapes.

Stands below `weights/single_files.py`. What shapes do not tell is BFL's own: a head's channels go
1/8, 7/16 and 7/16 to the three rotary axes, and the autoencoder norms in 32 groups; and OpenAI's:
CLIP's heads have 64 channels, and the last token of its vocabulary ends a prompt. `SHAPES_HIDE`
says which these are, for a config that is known to be right about them. Imports no mlx.
"""

from __future__ import annotations

from pathlib import Path

from fluxmesh.models.files.kinds import (
    NAME_THE_TRANSFORMER,
    OTHER_FAMILY,
    FileKind,
    lacks,
)
from fluxmesh.models.files.shapes import FileShapes
from fluxmesh.models.flux1.config import AutoencoderConfig, ClipConfig, FluxConfig, T5Config
from fluxmesh.models.flux1.tensor_maps import spellings
from fluxmesh.models.tensor_map import COMFY_PREFIX

NAME = "flux1"
TRANSFORMER = "double_blocks.0.img_attn.qkv.weight"
CLIP_HEAD_DIM = 64
MFLUX_PART = "a part of a model that mflux saved"
# Fields of a config that no shape of a tensor tells.
SHAPES_HIDE = {
    "transformer": ("axes_dim", "theta"),
    "text_encoder_2": ("relative_attention_max_distance", "layer_norm_epsilon"),
    "text_encoder": ("num_attention_heads", "layer_norm_eps", "hidden_act", "eos_token_id"),
    "vae": ("norm_groups", "scale_factor", "shift_factor"),
}


# Parts come last: a file that holds a transformer too is a model, whatever it holds beside it.
KINDS = (
    FileKind(
        "FLUX.1 Redux's image embedder",
        "give it as `redux` beside dev or schnell, whose `reference` it then reads",
        names=("redux_up.weight", "redux_down.weight"),
        family=NAME,
    ),
    FileKind(
        "a ControlNet",
        "fluxmesh has no ControlNet: name a model that paints from text",
        pattern=r"(^|\.)controlnet_(x_embedder|blocks|single_blocks|cond_embedding|down_blocks)\.|"
        r"(^|\.)(input_hint_block|pos_embed_input|zero_convs)\.|^control_model\.",
        family=NAME,
    ),
    FileKind(
        "an IP-Adapter of FLUX.1",
        "fluxmesh has no IP-Adapter: name a model that paints from text",
        pattern=r"ip_adapter|\.to_k_ip\.|_adapter_(k|v)_proj\.|\.ip_adapter_",
        family=NAME,
    ),
    FileKind(
        "Chroma, which was made from FLUX.1 and computes otherwise",
        OTHER_FAMILY,
        names=("distilled_guidance_layer.in_proj.weight", TRANSFORMER),
        family="chroma",
    ),
    FileKind(
        "a FLUX.1 transformer",
        names=(TRANSFORMER, "single_blocks.0.linear1.weight", "vector_in.in_layer.weight"),
        family=NAME,
        component="transformer",
    ),
    FileKind(
        "the transformer of a diffusers folder of FLUX.1, without its config",
        "name the folder above its own, which holds model_index.json",
        names=(
            "transformer_blocks.0.attn.add_q_proj.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
        ),
        family=NAME,
    ),
    FileKind(
        MFLUX_PART,
        "name the folder above its own, which holds transformer, vae and the others",
        pattern=r"(^|\.)(transformer_blocks\.\d+\.ff\.linear1|t5_blocks\.\d+|conv_in\.conv2d)\.",
        family=NAME,
    ),
    FileKind(
        "UMT5, the text encoder of other models",
        "take t5xxl_fp16.safetensors, or FLUX.1's folder text_encoder_2",
        names=("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
    ),
    FileKind(
        "the text encoder T5",
        NAME_THE_TRANSFORMER,
        names=(
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        ),
        family=NAME,
        component="text_encoder_2",
    ),
    FileKind(
        "the text encoder T5",  # as llama.cpp names it, in GGUF files
        NAME_THE_TRANSFORMER,
        names=("enc.blk.0.attn_q.weight", "enc.blk.0.ffn_gate.weight", "token_embd.weight"),
        family=NAME,
        component="text_encoder_2",
    ),
    FileKind(
        "the text encoder CLIP",
        NAME_THE_TRANSFORMER,
        names=(
            "embeddings.token_embedding.weight",
            "encoder.layers.0.self_attn.q_proj.weight",
            "final_layer_norm.weight",
        ),
        family=NAME,
        component="text_encoder",
    ),
    FileKind(
        "the autoencoder",
        NAME_THE_TRANSFORMER,
        names=("decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"),
        fits=lacks("quant_conv.weight", "bn.running_mean"),
        family=NAME,
        component="vae",
    ),
    FileKind(
        "an older T5, whose encoder FLUX.1 doesn't take",
        "take t5xxl_fp16.safetensors, or FLUX.1's folder text_encoder_2",
        names=(
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.1.DenseReluDense.wi.weight",
        ),
        family=NAME,
    ),
)


def flux_config_of(path: Path, prefix: str = COMFY_PREFIX) -> FluxConfig:
    """Sizes of the transformer in one of BFL's single files, from its tensors' shapes."""
    shapes = FileShapes(path, "a FLUX.1 transformer in BFL's layout", prefix)
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


def autoencoder_config_of(path: Path, prefix: str = "") -> AutoencoderConfig:
    """Sizes of the autoencoder in BFL's `ae.safetensors`, from its tensors' shapes."""
    shapes = FileShapes(path, "FLUX.1's autoencoder in BFL's layout", prefix)
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


def t5_config_of(path: Path, prefix: str = "") -> T5Config:
    """Sizes of the T5 encoder in ComfyUI's `t5xxl_….safetensors`, from its tensors' shapes."""
    shapes = FileShapes(path, "a T5 encoder", prefix)

    def spelled(key: str) -> str:
        """As this file spells a name; {} stands for a block's number."""
        first = (name for name in spellings(key) if name.format(0) in shapes.entries)
        return next(first, key)

    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes.pair(spelled(f"{attention}.relative_attention_bias.weight"))
    vocab_size, width = shapes.pair(spelled("shared.weight"))
    gate = spelled("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=shapes.pair(spelled(f"{attention}.q.weight"))[0] // heads,
        d_ff=shapes.pair(gate)[0],
        num_layers=shapes.count(spelled("encoder.block.{}.layer.0.SelfAttention.q.weight")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def clip_config_of(path: Path, prefix: str = "text_model.") -> ClipConfig:
    """Sizes of the CLIP text encoder in ComfyUI's `clip_l.safetensors`, from its tensors' shapes.

    `prefix` ends where transformers 5's names begin, so that it takes `text_model.` in.
    """
    return clip_config_from(FileShapes(path, "a CLIP text encoder", prefix))


def clip_config_from(shapes: FileShapes) -> ClipConfig:
    """The same, from shapes by transformers 5's names."""
    vocab_size, width = shapes.pair("embeddings.token_embedding.weight")
    return ClipConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=shapes.pair("encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=shapes.count("encoder.layers.{}.self_attn.q_proj.weight"),
        num_attention_heads=max(width // CLIP_HEAD_DIM, 1),
        max_position_embeddings=shapes.pair("embeddings.position_embedding.weight")[0],
        eos_token_id=vocab_size - 1,
    )
