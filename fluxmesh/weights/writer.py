"""Writing a checkpoint's folder: whole under its name, or not at all. Imports no mlx.

Below `quantize.py` and `fuse.py`, which write the weights; what surrounds them (configs,
tokenizers, `fluxmesh.json`) is written here, as `checkpoint.py` reads it back.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxmesh.errors import OutputError
from fluxmesh.storage.atomic import whole_folder
from fluxmesh.storage.safetensors import cannot_write
from fluxmesh.version import __version__
from fluxmesh.weights.checkpoint import FORMAT, MANIFEST, Checkpoint

SHARD_BYTES = 1 << 30  # a file of the folder; also what is held in memory before it is written
# The library and class of each part, as diffusers' `from_pretrained` looks them up.
_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well.

    Raises `OutputError` where `folder` exists or can't be written. A failure leaves nothing.
    """
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} exists already; name another folder, or remove it.")
    if not folder.absolute().parent.is_dir():
        raise OutputError(f"The folder {folder.absolute().parent} does not exist; make it first.")
    try:
        with whole_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise cannot_write(folder, error) from error


def write_surroundings(source: Checkpoint, folder: Path, manifest: Mapping[str, Any]) -> None:
    """All that a folder holds beside its models: tokenizers, scheduler and `fluxmesh.json`.

    `manifest` is added to what the latter says of every folder.
    """
    for name, tokenizer in (
        ("tokenizer", source.tokenizer),
        ("tokenizer_2", source.tokenizer_2),
    ):
        (folder / name).mkdir()
        for file in _TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, folder / name / file)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", dataclasses.asdict(source.schedule))
    write_json(folder / "model_index.json", _INDEX)
    defaults = dataclasses.asdict(source.defaults)
    del defaults["t5_max_length"]  # the tokenizer says
    entries = {
        "format": FORMAT,
        "defaults": defaults,
        "source": {"name": source.name, "revision": source.revision},
        "fluxmesh": __version__,
    }
    write_json(folder / MANIFEST, entries | dict(manifest))


def config_of(source: Checkpoint, component: str) -> dict[str, Any]:
    """The component's config.json, spelled as `config.py` reads it back."""
    if component == "text_encoder":
        return dataclasses.asdict(source.clip)
    if component == "text_encoder_2":
        return dataclasses.asdict(source.t5)
    if component == "vae":
        ae = source.autoencoder
        return {
            "in_channels": ae.in_channels,
            "out_channels": ae.out_ch,
            "down_block_types": ["DownEncoderBlock2D"] * len(ae.widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(ae.widths),
            "block_out_channels": ae.widths,
            "layers_per_block": ae.num_res_blocks,
            "latent_channels": ae.z_channels,
            "norm_num_groups": ae.norm_groups,
            "mid_block_add_attention": ae.mid_attention,
            "scaling_factor": ae.scale_factor,
            "shift_factor": ae.shift_factor,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
    flux = source.transformer
    return {
        "in_channels": flux.in_channels,
        "out_channels": flux.out_channels,
        "num_layers": flux.depth,
        "num_single_layers": flux.depth_single_blocks,
        "attention_head_dim": flux.head_dim,
        "num_attention_heads": flux.num_heads,
        "joint_attention_dim": flux.context_in_dim,
        "pooled_projection_dim": flux.vec_in_dim,
        "guidance_embeds": flux.guidance_embed,
        "axes_dims_rope": flux.axes_dim,
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A new file."""
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
