"""What adapters of FLUX.1 call its modules: transformer, CLIP-L and T5. Imports no mlx.

Data for `adapters/targets.py`, on the tables of `tensor_maps.py`, whose names (BFL's and
diffusers') need no line here. docs/adapters.md has an example of a key of each tool.
"""

from __future__ import annotations

from fluxmesh.models.flux1.config import ClipConfig, FluxConfig, T5Config
from fluxmesh.models.flux1.tensor_maps import clip_tensors, t5_tensors, transformer_tensors
from fluxmesh.models.tensor_map import ComponentNames, Rows

# Ours, and what a tool writes instead.
SPELLINGS = (
    ("_mlp.", "_mlp.layers."),  # Apple's nn.Sequential
    ("adaLN_modulation.", "adaLN_modulation.layers."),
    (".net.0.proj", ".linear1"),  # mflux: ff.linear1, ff_context.linear1
    (".net.2", ".linear2"),
    (".to_out.0", ".to_out"),
    (".attn.", ".attn.processor."),  # diffusers' processors of before PEFT
    ("transformer_blocks.", "sformer_blocks."),  # a tool that cut `transformer.` off twice
)
# Before a module, in any order and number.
TRANSFORMER = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "model."),
    *("transformer.", "unet.", "flux."),
    *("lora_unet_", "lora_transformer_", "lycoris_", "lora_flux_"),
)
CLIP = (
    *("text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l.transformer."),
    *("clip_l.", "text_encoder.", "text_model.", "te1.", "te.", "text_encoder_1."),
    *("lora_te1_", "lora_te_", "te1_", "lora_clip_l_", "lora_text_encoder_", "clip_l_"),
    *("text_model_", "lycoris_te1_", "lora_text_encoder_1_"),
)
T5 = (
    *("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "t5xxl.transformer.", "t5xxl."),
    *("text_encoder_2.", "text_encoder_3.", "te2.", "te3.", "t5."),
    *("lora_te2_", "lora_te3_", "te2_", "te3_", "lora_t5xxl_", "lora_t5_", "t5xxl_"),
    *("lora_text_encoder_2_", "lora_text_encoder_3_", "lycoris_te2_", "lycoris_te3_"),
)
CLIP_WRITTEN = {
    "diffusers": "text_encoder.text_model.",
    "kohya": "lora_te1_text_model_",
    "bfl": "text_encoders.clip_l.transformer.text_model.",
}
T5_WRITTEN = {
    "diffusers": "text_encoder_2.",
    "kohya": "lora_te3_",
    "bfl": "text_encoders.t5xxl.transformer.",
}
GUIDANCE = (
    *("guidance_in.in_layer", "guidance_in.out_layer"),
    *(f"time_text_embed.guidance_embedder.linear_{k}" for k in (1, 2)),
)


# What keys of its adapters match; some other models were made from it, or have such keys too.
MARKS = (
    r"(?:img|txt)_mod[._]lin|single_blocks[._]\d+[._]modulation|proj_mlp|vector_in[._]"
    r"|time_text_embed[._]text_embedder"
)


def transformer_extra(config: FluxConfig) -> dict[str, tuple[Rows, ...]]:
    """Names that stand for a linear of another name: x-flux's, and those of old processors."""
    D = config.hidden_size
    extra: dict[str, tuple[Rows, ...]] = {}
    for i in range(config.depth):
        for number, stream in ((1, "img"), (2, "txt")):
            name, theirs = f"double_blocks.{i}.{stream}_attn", f"double_blocks.{i}.processor"
            extra[f"{theirs}.qkv_lora{number}"] = (Rows(f"{name}.qkv", 0, 3 * D),)
            extra[f"{theirs}.proj_lora{number}"] = (Rows(f"{name}.proj", 0, D),)
            attn = f"transformer_blocks.{i}.attn"
            for k, part in enumerate("qkv"):
                key = f"to_{part}" if stream == "img" else f"add_{part}_proj"
                extra[f"{attn}.{key}_lora"] = (Rows(f"{name}.qkv", k * D, (k + 1) * D),)
            out = "to_out" if stream == "img" else "to_add_out"
            extra[f"{attn}.{out}_lora"] = (Rows(f"{name}.proj", 0, D),)
    for i in range(config.depth_single_blocks):
        name, theirs = f"single_blocks.{i}", f"single_blocks.{i}.processor"
        extra[f"{theirs}.qkv_lora"] = (Rows(f"{name}.linear1", 0, 3 * D),)
        extra[f"{theirs}.proj_lora"] = (Rows(f"{name}.linear2", 0, D),)
        attn = f"single_transformer_blocks.{i}.attn"
        for k, part in enumerate("qkv"):
            extra[f"{attn}.to_{part}_lora"] = (Rows(f"{name}.linear1", k * D, (k + 1) * D),)
    return extra


def absent(config: FluxConfig) -> frozenset[str]:
    """Modules that some models of the family have and this one has not: dev's guidance."""
    return frozenset() if config.guidance_embed else frozenset(GUIDANCE)


def wider(config: FluxConfig) -> dict[str, int]:
    """What BFL's LoRAs for Canny and Depth give a control picture's latents to, beside the noisy
    ones: the new columns of the weight are zero before the LoRA is added."""
    return {} if config.channels_beside else {"img_in": 2 * config.in_channels}


def components(
    transformer: FluxConfig, clip: ClipConfig | None = None, t5: T5Config | None = None
) -> tuple[ComponentNames, ...]:
    """What adapters of a FLUX.1 of these sizes may change; None: as the text encoders of FLUX.1.

    Of the text encoders their linears and norms, and no table of tokens or positions.
    """
    tables = ("embeddings.", "shared.", "relative_attention_bias")
    clip_table, t5_table = (
        {name: t for name, t in tensors.items() if not any(part in name for part in tables)}
        for tensors in (clip_tensors(clip or ClipConfig()), t5_tensors(t5 or T5Config()))
    )
    return (
        ComponentNames(
            "transformer",
            transformer_tensors(transformer),
            TRANSFORMER,
            SPELLINGS,
            transformer_extra(transformer),
            absent=absent(transformer),
            wider=wider(transformer),
        ),
        ComponentNames("text_encoder", clip_table, CLIP, written=CLIP_WRITTEN),
        ComponentNames("text_encoder_2", t5_table, T5, written=T5_WRITTEN),
    )
