"""Tiny random checkpoints of FLUX.2 in diffusers' layout, every parameter drawn anew.

Norms are not ones, biases and batch-norm statistics not zero: diffusers' own initialization would
hide swapped halves and forgotten terms. The language models have as many layers as the pipelines
read, plus one; their heads times head size is not the hidden size, as in Qwen3-4B.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
)
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

QWEN_TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{ '[SYSTEM_PROMPT]' + m.content[0].text + '[/SYSTEM_PROMPT]' }}"
    "{%- else -%}{{ '[INST]' }}{%- for part in m.content -%}{{ part.text }}{%- endfor -%}"
    "{{ '[/INST]' }}{%- endif -%}{%- endfor -%}"
)
QWEN_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's pattern, which Mistral's published tokenizer.json has
MISTRAL_WORD = QWEN_WORD.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def redraw(module: torch.nn.Module, seed: int) -> Any:
    """Matrices of a size that keeps activations near 1, norms around 1, the rest away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module.eval().requires_grad_(False)


def _byte_level(specials: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """All 256 byte letters, a few merges, then what is special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = [("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("t", "i"), ("n", "y"), ("ti", "ny")]
    merges += [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("1", "2"), ("u", "s"), ("e", "r"), ("us", "er")]
    for first, second in merges:
        vocab[first + second] = len(vocab)
    for token in specials:
        vocab[token] = len(vocab)
    return vocab, merges


def _tokenizer(pattern: str, merges_first: bool, specials: list[str], **options: Any) -> Any:
    vocab, merges = _byte_level(specials)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=merges_first))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    if not merges_first:
        raw.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **options)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen3's kind: NFC, single digits, padding on the right."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _tokenizer(
        QWEN_WORD,
        False,
        [*specials, "<think>", "</think>"],
        pad_token=specials[0],
        additional_special_tokens=specials[1:],
        padding_side="right",
        chat_template=QWEN_TEMPLATE,
    )
    tokenizer.add_tokens(["<think>", "</think>"])  # added, but not "special"
    return tokenizer


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral's kind: no normalization, whole words first, padding on the left."""
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    frame = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    return _tokenizer(
        MISTRAL_WORD,
        True,
        [*specials, *frame],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=frame,
        padding_side="left",
        chat_template=MISTRAL_TEMPLATE,
    )


class Processor:
    """As much of transformers' PixtralProcessor, which needs torchvision, as diffusers uses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, conversations: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(conversations, **options)


def qwen3(vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    return redraw(Qwen3ForCausalLM(config), seed)


def mistral3(vocab_size: int, seed: int) -> Mistral3ForConditionalGeneration:
    text = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=31,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        sliding_window=None,
    )
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        head_dim=8,
    )
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=vocab_size - 1,
        tie_word_embeddings=False,
    )
    return redraw(Mistral3ForConditionalGeneration(config), seed)


def transformer(guidance: bool, seed: int) -> Flux2Transformer2DModel:
    return redraw(
        Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=96,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        ),
        seed,
    )


def autoencoder(seed: int, **sizes: Any) -> AutoencoderKLFlux2:
    options: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return redraw(AutoencoderKLFlux2(**options | sizes), seed)


def parts(kind: str, seed: int) -> dict[str, Any]:
    """What a pipeline of `kind`, "qwen3" or "mistral3", is made of."""
    if kind == "qwen3":
        tokenizer: Any = qwen_tokenizer()
        encoder = qwen3(len(tokenizer), seed + 2)
    else:
        tokenizer = mistral_tokenizer()
        encoder = mistral3(len(tokenizer), seed + 2)
        tokenizer = Processor(tokenizer)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": autoencoder(seed + 1),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": transformer(kind == "mistral3", seed),
    }


def save(made: dict[str, Any], folder: Path) -> Path:
    """Writes the parts as a diffusers folder has them."""
    for name, part in made.items():
        getattr(part, "tokenizer", part).save_pretrained(folder / name)
    return folder


def bfl_transformer(model: Flux2Transformer2DModel) -> dict[str, torch.Tensor]:
    """diffusers' names to BFL's, written apart from fluxmesh's tables."""
    state, out = model.state_dict(), {}
    plain = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "proj_out": "final_layer.linear",
    }
    for theirs, bfl in plain.items():
        if f"{theirs}.weight" in state:
            out[f"{bfl}.weight"] = state[f"{theirs}.weight"]
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    streams = (
        ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
        (
            "txt",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "ff_context",
        ),
    )
    for i in range(model.config.num_layers):
        a, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, qkv, norms, proj, ff in streams:
            weights = [state[f"{a}.attn.{part}.weight"] for part in qkv]
            out[f"{b}.{stream}_attn.qkv.weight"] = torch.cat(weights)
            for norm, which in zip(norms, ("query", "key"), strict=True):
                scale = state[f"{a}.attn.{norm}.weight"]
                out[f"{b}.{stream}_attn.norm.{which}_norm.scale"] = scale
            out[f"{b}.{stream}_attn.proj.weight"] = state[f"{a}.attn.{proj}.weight"]
            out[f"{b}.{stream}_mlp.0.weight"] = state[f"{a}.{ff}.linear_in.weight"]
            out[f"{b}.{stream}_mlp.2.weight"] = state[f"{a}.{ff}.linear_out.weight"]
    for i in range(model.config.num_single_layers):
        a, b = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        out[f"{b}.linear1.weight"] = state[f"{a}.to_qkv_mlp_proj.weight"]
        out[f"{b}.linear2.weight"] = state[f"{a}.to_out.weight"]
        out[f"{b}.norm.query_norm.scale"] = state[f"{a}.norm_q.weight"]
        out[f"{b}.norm.key_norm.scale"] = state[f"{a}.norm_k.weight"]
    return out


def bfl_autoencoder(vae: AutoencoderKLFlux2) -> dict[str, torch.Tensor]:
    """As `bfl_transformer`: quant convolutions inside the halves, attention as convolutions."""
    levels, out = len(vae.config.block_out_channels), {}
    middle = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"))
    for key, value in vae.state_dict().items():
        if key.startswith(("quant_conv", "post_quant_conv")):
            key = f"{'encoder' if key[0] == 'q' else 'decoder'}.{key}"
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for i in (0, 1):
            key = key.replace(f"mid_block.resnets.{i}", f"mid.block_{i + 1}")
        for theirs, bfl in (*middle, ("to_out.0", "proj_out")):
            key = key.replace(f"mid_block.attentions.0.{theirs}", f"mid.attn_1.{bfl}")
        for i in range(levels):
            up = levels - 1 - i
            key = key.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
            key = key.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            key = key.replace(f"up_blocks.{i}.resnets", f"up.{up}.block")
            key = key.replace(f"up_blocks.{i}.upsamplers.0", f"up.{up}.upsample")
        if ".mid.attn_1." in key and value.ndim == 2:
            value = value[:, :, None, None]
        out[key] = value
    return out


def write(tensors: dict[str, torch.Tensor], path: Path, prefix: str = "") -> Path:
    save_file(
        {f"{prefix}{key}": value.contiguous().clone() for key, value in tensors.items()}, path
    )
    return path


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Noise, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
