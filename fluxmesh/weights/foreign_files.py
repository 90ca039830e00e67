"""Files that people name as a model and that are none of a family's: adapters, other models, parts.

`identify.py` asks these kinds in order: `BESIDE` (what goes with a model) and `MODELS` before any
family's, for they hold parts that look like a family's; `PARTS` of other models after. A row here
is one sentence more that is right. Names are those of public files; LoRA's are told in
`adapters/formats.py`, forms of numbers in `storage/numbers/`. Imports no mlx.
"""

from __future__ import annotations

from fluxmesh.models.files.kinds import OTHER_FAMILY, FileContents, FileKind, side

PLAIN = "name a copy of the model in bfloat16 or float16, and `bits` makes it as small"

_LORA = (
    r"\.lora[_.](A|B|a|b|down|up)(\.|$)|\.lora_(mid|magnitude_vector)\b|^lora_(unet|te\d?|transformer)_"
    r"|\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_(blocks|diag)|dora_scale|diff_b)$|^lycoris_"
)
# Keys of a textual inversion: one is all that its file holds, or the encoder that it is for.
EMBEDDING = r"emb_params|string_to_param(?:\..*)?|clip_[lg]|t5xxl|<[^>]+>"

BESIDE = (
    FileKind(
        "an adapter (LoRA), which changes a model and is none",
        "give it as `adapters` beside the model that it was trained for",
        pattern=_LORA,
    ),
    FileKind(
        "an embedding (textual inversion), which fluxmesh doesn't read",
        "name the model that it was trained for",
        pattern=f"^({EMBEDDING})$",
    ),
    FileKind(
        "a picture's upscaler (ESRGAN)",
        OTHER_FAMILY,
        pattern=r"(^|\.)(body\.\d+\.rdb1\.conv1|RRDB_trunk|model\.1\.sub\.0\.RDB1)",
    ),
    FileKind(
        "a face or motion module, which fluxmesh doesn't read",
        OTHER_FAMILY,
        pattern=r"motion_modules\.|^pulid_|(^|\.)id_encoder\.",
    ),
    FileKind(
        "an optimizer's state of a training, not its weights",
        "name the weights that were saved beside it",
        pattern=r"(^|\.)(exp_avg|exp_avg_sq)(\.|$)",
    ),
)


def _is_video(contents: FileContents, prefix: str) -> bool:
    return len(contents.shapes[f"{prefix}decoder.conv_in.weight"]) == 5


_UNET = "input_blocks.0.0.weight"
_CROSS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"

MODELS = (
    FileKind("SDXL", OTHER_FAMILY, names=(_UNET, "label_emb.0.0.weight")),
    FileKind(
        "Stable Diffusion 1.5, or a model made from it",
        OTHER_FAMILY,
        names=(_UNET, "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
        fits=side("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 1, 768),
    ),
    FileKind(
        "Stable Diffusion 2, or a model made from it",
        OTHER_FAMILY,
        names=(_UNET, "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
        fits=side("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 1, 1024),
    ),
    FileKind("a U-Net of Stable Diffusion", OTHER_FAMILY, names=(_UNET,)),
    FileKind(
        "SDXL's U-Net, of a diffusers folder",
        OTHER_FAMILY,
        names=("conv_in.weight", "add_embedding.linear_1.weight"),
    ),
    FileKind(
        "Stable Diffusion's U-Net, of a diffusers folder",
        OTHER_FAMILY,
        names=("conv_in.weight", "time_embedding.linear_1.weight", _CROSS),
    ),
    FileKind(
        "a U-Net of a diffusers folder",
        OTHER_FAMILY,
        # an autoencoder's halves have all of these but the last
        names=(
            "conv_in.weight",
            "down_blocks.0.resnets.0.conv1.weight",
            "conv_norm_out.weight",
            "time_embedding.linear_1.weight",
        ),
    ),
    FileKind("Stable Diffusion 3", OTHER_FAMILY, pattern=r"(^|\.)joint_blocks\.0\.x_block\."),
    FileKind("Stable Cascade", OTHER_FAMILY, pattern=r"(^|\.)clip_txt_pooled_mapper\."),
    FileKind("AuraFlow", OTHER_FAMILY, pattern=r"(^|\.)double_layers\.0\.attn\.w1q\."),
    FileKind("HunyuanVideo", OTHER_FAMILY, pattern=r"(^|\.)double_blocks\.0\.img_attn_qkv\."),
    FileKind("Hunyuan3D or HunyuanImage", OTHER_FAMILY, pattern=r"(^|\.)byt5_in\.|(^|\.)cond_in\."),
    FileKind(
        "Qwen-Image",
        OTHER_FAMILY,
        names=("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
    ),
    FileKind("Z-Image or Lumina", OTHER_FAMILY, pattern=r"(^|\.)(noise_refiner|cap_embedder)\.\d"),
    FileKind("HiDream", OTHER_FAMILY, pattern=r"(^|\.)double_stream_blocks\.0\.block\."),
    FileKind("PixArt", OTHER_FAMILY, names=("y_embedder.y_embedding",)),
    FileKind("Wan", OTHER_FAMILY, names=("patch_embedding.weight", "blocks.0.self_attn.q.weight")),
    FileKind(
        "LTX-Video", OTHER_FAMILY, names=("patchify_proj.weight", "adaln_single.linear.weight")
    ),
    FileKind(
        "DiffusionKit's FLUX.1, whose names and form fluxmesh doesn't read",
        PLAIN,
        pattern=r"(^|\.)(multimodal|unified)_transformer_blocks\.",
    ),
)

PARTS = (
    FileKind(
        "the autoencoder of a video model",
        OTHER_FAMILY,
        names=("decoder.conv_in.weight",),
        fits=_is_video,
    ),
    FileKind(
        "an autoencoder of Stable Diffusion",
        OTHER_FAMILY,
        names=("decoder.conv_in.weight", "quant_conv.weight"),
    ),
    FileKind(
        "the autoencoder of a diffusers folder, without its config",
        "name the folder above its own, which holds model_index.json",
        names=("decoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    ),
    FileKind(
        "a small autoencoder for previews (TAESD)",
        OTHER_FAMILY,
        names=("1.weight", "3.conv.0.weight", "3.conv.2.weight"),
    ),
    FileKind(
        "a small autoencoder for previews (TAESD)",
        OTHER_FAMILY,
        names=("decoder.layers.0.weight", "decoder.layers.2.conv.0.weight"),
    ),
    FileKind(
        "a text encoder of OpenCLIP (SDXL's second)",
        OTHER_FAMILY,
        names=("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"),
    ),
    FileKind(
        "a picture encoder (CLIP vision or SigLIP)",
        OTHER_FAMILY,
        pattern=r"(^|\.)vision_model\.(encoder|embeddings)\.|^v\.blk\.0\.",
    ),
    FileKind(
        "a language model",
        OTHER_FAMILY,
        pattern=r"(^|\.)layers\.0\.(self_attn\.q_proj|attention\.wq)\.|^blk\.0\.(attn|ssm)_",
    ),
)
