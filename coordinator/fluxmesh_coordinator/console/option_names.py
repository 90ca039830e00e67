"""Settings as the command line names them: what `n_images` is to the library is --n-images here.

A sentence of the library names a setting by its field, in backticks, for it doesn't know who asks:
the command line, a program, a server's client. Whatever this folder tells of such a sentence goes
through `in_options`; a server has names of its own.
"""

from __future__ import annotations

import re

# Fields whose option is called otherwise, or is one of several fields.
OPTIONS = {
    "adapters": "--adapter",
    "preload": "--preload-models",
    "t5_padding": "--no-t5-padding",
    "recipe": "--from",
    "references": "--reference",
    "reference_strengths": "--reference",
    "negative": "--negative-prompt",
}
# Those whose option is the field with hyphens.
SAME = {
    *("adapter", "allow_partial", "assume", "batch_size", "bits", "cache"),
    *("cache_dir", "caption_column", "image_column", "prior_folder", "progress_prompt", "split"),
    *(
        "trigger",
        "caption_dropout",
        "checkpoint_every",
        "clip_norm",
        "decoding_batch_size",
        "dtype",
    ),
    *("ema", "env", "force", "force_shard", "grad_accumulate", "grad_checkpoint"),
    *(
        "guidance",
        "image",
        "reference",
        "redux",
        "control",
        "control_from",
        "negative_prompt",
        "cfg",
    ),
    *("image_size", "iterations", "keep_checkpoints", "learning_rate", "lora_alpha"),
    *("lora_blocks", "lora_dropout", "lora_rank", "lora_targets", "low_memory"),
    *("lr_schedule", "mask", "model", "n_images", "n_rows", "no_metadata", "num_augmentations"),
    *("fuse_adapter", "prior_folder", "progress_prompt"),
    *("optimizer", "outpaint", "output", "output_dir", "placement", "prior_weight"),
    *("progress_every", "progress_steps", "push", "quantize", "resolution", "resume", "seed"),
    *("steps", "stepwise", "strength", "timesteps", "validation", "warmup_steps"),
    *("text_bits", "weight_decay"),
}


def in_options(sentence: str) -> str:
    """A sentence of the library with options for settings; all other words stay."""
    return re.sub(r"`(\w+)`", lambda match: option_of(match[1]) or match[0], sentence)


def option_of(setting: str) -> str:
    """The option of a setting, by its field; "" where there is none."""
    same = f"--{setting.replace('_', '-')}" if setting in SAME else ""
    return OPTIONS.get(setting, same)
