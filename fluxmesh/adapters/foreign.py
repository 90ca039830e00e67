"""Whose adapter a file is that fits no model of ours: by its keys, and by its sizes. No mlx.

Read only for the sentence of an error. The marks are names of modules that the model has and FLUX
has not, in dots or in underscores; where two models share all names, widths tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from fluxmesh.models.registry import FAMILIES
from fluxmesh.storage.safetensors import Entry

_S = r"[._]"  # between a module's names: dots, or kohya's underscores

_OTHERS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"sformer_blocks.*to_qkv_mlp|content_mode_blocks|txt_mode_blocks", "FLUX.3"),
        (r"distilled_guidance_layer", "Chroma"),
        (r"lora_prior_|prior_unet", "Stable Cascade"),
        (rf"joint_blocks{_S}\d", "Stable Diffusion 3"),
        (rf"joint_transformer_blocks{_S}\d", "AuraFlow"),
        (rf"(?:double|single)_stream_blocks{_S}\d", "HiDream"),
        (rf"img_mlp{_S}fc1|individual_token_refiner|txt_in{_S}t_embedder|img_attn_q{_S}",
         "HunyuanVideo"),
        (rf"transformer_blocks{_S}\d+{_S}(?:img|txt)_(?:mlp|mod){_S}", "Qwen-Image"),
        (r"noise_refiner|context_refiner|cap_embedder", "Z-Image or Lumina"),
        (rf"layers{_S}\d+{_S}attention{_S}(?:to_q|qkv|out)", "Z-Image or Lumina"),
        (rf"blocks{_S}\d+{_S}(?:self|cross)_attn{_S}[qkvo](?:{_S}|$)|blocks{_S}\d+{_S}ffn{_S}\d",
         "Wan"),
        (rf"blocks{_S}\d+{_S}(?:self_attn|cross_attn){_S}(?:q_proj|output_proj)", "Cosmos"),
        (rf"(?:down|up)_blocks{_S}\d|mid_block{_S}|(?:input|output)_blocks{_S}\d|middle_block{_S}",
         "Stable Diffusion"),
        (r"caption_projection|adaln_single", "PixArt, Sana or LTX-Video"),
        (rf"transformer_blocks{_S}\d+{_S}attn1{_S}", "CogVideoX or LTX-Video"),
        (rf"model{_S}layers{_S}\d+{_S}(?:self_attn|mlp){_S}", "a language model"),
        (r"whisper|vision_tower|vision_model", "a vision or speech model"),
    )
)  # fmt: skip


def _own(*, shared: bool) -> Iterator[tuple[re.Pattern[str], str]]:
    """The marks of our families, the newest first; `shared`: those that other models have too."""
    for family in reversed(FAMILIES):
        if family.adapter_marks and family.shares_adapter_marks == shared:
            yield re.compile(family.adapter_marks), family.name


# The first that any key matches.
MARKS = (*_own(shared=False), *_OTHERS, *_own(shared=True))

# Width of the text that Stable Diffusion's cross-attention reads.
TEXT_WIDTHS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}


def _own_widths() -> dict[int, str]:
    """Of the families' own models: a family where all of its are so wide, else the first model."""
    named: dict[int, list[str]] = {}
    for family in FAMILIES:
        by_width: dict[int, str] = {}
        for model in family.published.values():
            name = model.repo.rpartition("/")[2].replace("-", " ")
            by_width.setdefault(model.architecture.shape.hidden_size, name)
        for width, name in by_width.items():
            named.setdefault(width, []).append(family.name if len(by_width) == 1 else name)
    return {width: " or ".join(names) for width, names in named.items()}


# Width of a transformer whose blocks are called as FLUX's.
WIDTHS = {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3.5 large"} | _own_widths()
_CROSS = re.compile(rf".*attn2{_S}to_k{_S}.*(?:down|lora_A).*")
_IMAGE_QUERY = re.compile(
    rf".*(?:attn{_S}to_q|img_attn{_S}qkv)(?:{_S}lora)?{_S}.*(?:down|lora_A).*"
)


def model_of(entries: Mapping[str, Entry], own: str = "") -> str | None:
    """The model that an adapter with these keys is for, as people call it.

    None where that isn't known, or is the family `own`.
    """
    name = _marked(entries, own)
    if name == "Stable Diffusion":
        return TEXT_WIDTHS.get(_width(entries, _CROSS), "Stable Diffusion or SDXL")
    return name


def model_of_width(entries: Mapping[str, Entry], own: int) -> str | None:
    """The model by the width of its tokens, where it isn't `own`; None: unknown."""
    width = _width(entries, _IMAGE_QUERY)
    return WIDTHS.get(width) if width != own else None


def _marked(keys: Iterable[str], own: str) -> str | None:
    text = "\n".join(keys)
    for pattern, name in MARKS:
        if name != own and pattern.search(text):
            return name
    return None


def _width(entries: Mapping[str, Entry], pattern: re.Pattern[str]) -> int:
    """How many inputs the first factor of such a module has; 0 where there is none."""
    for key, entry in entries.items():
        if pattern.fullmatch(key) and len(entry.shape) >= 2:
            return entry.shape[1]
    return 0
