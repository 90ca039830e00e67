"""How an adapter's keys end: which tensor of which kind of adapter each is. Imports no mlx.

A key is a module's name, spelled in some tool's way (`targets.py` knows the modules), and an
ending. Below `reading.py`. docs/adapters.md shows an example of each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fluxmesh.storage.safetensors import Entry
from fluxmesh.weights.foreign_files import EMBEDDING

# An ending of PEFT's may carry the adapter's name: `lora_A.default.weight`.
ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"(.+)\.lora_A(?:\.[\w-]+)?\.weight", "a"),  # PEFT, diffusers, ai-toolkit
        (r"(.+)\.lora_B(?:\.[\w-]+)?\.weight", "b"),
        (r"(.+)\.lora_A(?:\.default)?", "a"),  # mflux
        (r"(.+)\.lora_B(?:\.default)?", "b"),
        (r"(.+)\.lora_down(?:\.[\w-]+)?\.weight", "a"),  # kohya, ComfyUI
        (r"(.+)\.lora_up(?:\.[\w-]+)?\.weight", "b"),
        (r"(.+)\.lora(?:_linear)?(?:_layer)?\.down\.weight", "a"),  # diffusers of before PEFT
        (r"(.+)\.lora(?:_linear)?(?:_layer)?\.up\.weight", "b"),
        (r"(.+_lora\d?)\.down\.weight", "a"),  # x-flux, and diffusers' processors
        (r"(.+_lora\d?)\.up\.weight", "b"),
        (r"(.+)\.lora_a", "a_transposed"),  # Apple's example
        (r"(.+)\.lora_b", "b_transposed"),
        (r"(.+)\.(?:lora_)?alpha", "alpha"),
        (r"(.+)\.lora_(?:B|up)(?:\.[\w-]+)?\.bias", "bias"),
        (r"(.+)\.dora_scale", "magnitude"),  # kohya, LyCORIS, OneTrainer
        (r"(.+)\.lora_magnitude_vector(?:\.[\w-]+)?", "magnitude"),  # PEFT
        (r"(.+)\.(?P<role>lokr_w[12](?:_[ab])?|lokr_t2)(?:\.default|\.weight)*", ""),
        (r"(.+)\.(?P<role>hada_w[12]_[ab]|hada_t[12])(?:\.default|\.weight)*", ""),
        (r"(.+)\.(?:diff|w_norm)", "diff"),
        (r"(.+)\.(?:diff_b|b_norm)", "diff_b"),
    )
)
FLOAT8_SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale)|(.+\.weight)_scale")
MARKS = re.compile(r"scaled_fp8|.*\.(?:scale_input|input_scale)|.*\.comfy_quant")  # say nothing
EMBEDDINGS = re.compile(r"bundle_emb\.([^.]+)\..+")  # kohya's bundled textual inversion

# Kinds that are refused by name.
OTHER_KINDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r".+\.(?:oft_blocks|oft_R|oft_diag|oft_r)(?:\..+)?", "an OFT or BOFT adapter"),
        (r".+\.(?:boft_R|boft_s)(?:\..+)?", "a BOFT adapter"),
        (r".+\.(?:ia3_l|on_input)(?:\..+)?", "an IA3 adapter"),
        (r".+\.(?:a1|a2|b1|b2)\.weight|.+\.(?:glora_|lora_glora).+", "a GLoRA adapter"),
        (r".+\.(?:vera_lambda_[bd])(?:\..+)?", "a VeRA adapter"),
        (r".+\.vblora_.+", "a VB-LoRA adapter"),
        (r".+\.fourierft_.+", "a FourierFT adapter"),
        (r".+\.hra_u(?:\..+)?", "an HRA adapter"),
        (r".+\.(?:bone_|miss_).+|.+\.miss_block", "a MiSS (Bone) adapter"),
        (r".+\.(?:lora_mid|lora\.mid)\.weight", "a LoCon of convolutions in Tucker form"),
        (r".+\.lora_embedding_[AB](?:\..+)?", "a LoRA of embeddings"),
        (r".+\.(?:set_weight|reshape_weight)", "a file of ComfyUI's that replaces whole weights"),
        (r"ip_adapter[._].+|image_proj\..+|.+\.processor\.ip_adapter_.+", "an IP-Adapter"),
        (r"redux_(?:up|down)\..+", "FLUX.1 Redux (`redux` takes it)"),
        (r"controlnet_.+|control_.+|.*input_hint_block\..+", "a ControlNet"),
        (r"pulid_(?:ca|encoder)\..+", "a PuLID model"),
        (EMBEDDING, "a textual inversion's embedding"),
    )
)


@dataclass
class ModuleKeys:
    """What a file holds of one of its own modules, by role."""

    entries: dict[str, Entry] = field(default_factory=dict)
    float8: dict[str, Entry] = field(default_factory=dict)  # the scale of a factor in fp8

    @property
    def kind(self) -> str:
        """What people call this kind of adapter."""
        if any(role.startswith("lokr") for role in self.entries):
            kind = "LoKr"
        elif any(role.startswith("hada") for role in self.entries):
            kind = "LoHa"
        elif self.entries.keys() <= {"diff", "diff_b", "alpha"}:
            return "difference"
        else:
            kind = "LoRA"
        return f"{kind} with DoRA" if "magnitude" in self.entries else kind


@dataclass
class SortedKeys:
    """A file's keys by what they are."""

    modules: dict[str, ModuleKeys] = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)  # names of bundled ones, once each
    others: list[str] = field(default_factory=list)  # keys that end as none of an adapter's


def sort_keys(entries: dict[str, Entry]) -> SortedKeys:
    """Sorts the keys of a file by module and role. Raises nothing."""
    result = SortedKeys()
    scales: dict[str, Entry] = {}
    for key, entry in entries.items():
        scale = FLOAT8_SCALE.fullmatch(key)
        if scale:
            scales[scale[2] or f"{scale[1]}.weight"] = entry
            continue
        embedding = EMBEDDINGS.fullmatch(key)
        if embedding:
            if embedding[1] not in result.embeddings:
                result.embeddings.append(embedding[1])
            continue
        named = role_of(key)
        if named is not None:
            module, role = named
            result.modules.setdefault(module, ModuleKeys()).entries[role] = entry
        elif not MARKS.fullmatch(key):
            result.others.append(key)
    for keys in result.modules.values():
        keys.float8 = {
            role: scales[entry.key] for role, entry in keys.entries.items() if entry.key in scales
        }
    return result


def role_of(key: str) -> tuple[str, str] | None:
    """(the module as the file calls it, the role); None for a key of no adapter."""
    for pattern, role in ENDINGS:
        match = pattern.fullmatch(key)
        if match:
            return match[1], role or match["role"]
    return None


def other_kind(keys: list[str]) -> str | None:
    """The kind of adapter, or of model, whose keys some of these are; None for none known."""
    for pattern, name in OTHER_KINDS:
        if any(pattern.fullmatch(key) for key in keys):
            return name
    return None
