"""What `same_pictures.py` asks for: 25 cases over all options of `generate`, and a training.

Every case names its seed. Sizes and steps are small, for what is compared is bytes. The inputs
(pictures, masks, adapters, a data set, and random models for what the embedded one doesn't take)
are drawn from a seed too, so that two trees read the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fluxmesh.storage.safetensors import write_tensors
from tests.checkpoints import TRANSFORMER, make_checkpoint
from tests.flux2_checkpoint import TWELVE_HEADS, make_flux2
from tests.redux_checkpoint import make_redux

MODEL = "tiny"
INPUTS = "inputs"  # the folder of what the cases read
FIRST = "defaults"  # the case whose picture `--from` makes again
PROMPT = "a red apple to the left of a dog on a yellow background"
RANK = 4  # of the adapters drawn here


@dataclass(frozen=True)
class PictureCase:
    """One call of `fluxmesh generate`, in a folder where `INPUTS` and `NAME/` are."""

    name: str
    prompt: str | None
    options: str  # of any road, in one line
    spread: str  # of the road with several hosts alone

    def command(self, *, on_mesh: bool) -> list[str]:
        """The arguments of `fluxmesh`; pictures go into the folder `name`."""
        prompt = [] if self.prompt is None else [self.prompt]
        options = [*self.options.split(), *(self.spread.split() if on_mesh else ())]
        return ["generate", *prompt, *options, "--output", f"{self.name}/", "--json"]


# Each placement is named, so that what a planner measures on a loaded machine decides nothing.
DATA, TENSOR, SEQUENCE = (f"--placement {name}" for name in ("data", "tensor", "sequence"))
PICTURES = (
    PictureCase(FIRST, PROMPT, "--seed 7", DATA),
    PictureCase("wide", PROMPT, f"-m {MODEL} --seed 8 --image-size 64x112 --steps 3", SEQUENCE),
    PictureCase("tall", "two cats", "--seed 9 --image-size 112x48 --steps 2", TENSOR),
    PictureCase("grid", PROMPT, "--seed 10 -n 4 --n-rows 2 --image-size 64 --steps 2", DATA),
    PictureCase("each", "a fox", "--seed 11 -n 2 --save-raw --image-size 64 --steps 2", SEQUENCE),
    PictureCase("guided", "a boat", "--seed 12 --guidance 2.5 --steps 1 --preload-models", TENSOR),
    PictureCase("float32", PROMPT, "--seed 13 --dtype float32 --image-size 64", "--force-shard"),
    PictureCase("quantized", "a dog", "--seed 14 -q --image-size 64 --steps 3", DATA),
    PictureCase(
        "8-bits", "a dog", "--seed 15 --bits 8 --text-bits 4 --image-size 64 --steps 3", SEQUENCE
    ),
    PictureCase(
        "3-bits", "a dog", "--seed 16 --bits 3 --dtype float32 --image-size 64 --steps 2", DATA
    ),
    PictureCase(
        "adapter",
        "a dog",
        f"--seed 17 --adapter {INPUTS}/peft.safetensors:0.8 --image-size 64 --steps 3",
        TENSOR,
    ),
    PictureCase(
        "adapters",
        "a dog",
        f"-m {MODEL} --seed 18 --adapter {INPUTS}/peft.safetensors:-0.5 "
        f"--adapter {INPUTS}/kohya.safetensors --bits 4 --image-size 64 --steps 2",
        DATA,
    ),
    PictureCase(
        "fused",
        "a dog",
        f"--seed 19 --adapter {INPUTS}/kohya.safetensors:0.7 --fuse-adapter --image-size 64",
        SEQUENCE,
    ),
    PictureCase("unpadded", "a green hat", "--seed 20 --no-t5-padding --image-size 64", TENSOR),
    PictureCase(
        "image", "a blue dog", f"--seed 21 --image {INPUTS}/source.png --strength 0.6", SEQUENCE
    ),
    PictureCase(
        "mask",
        "a blue dog",
        f"--seed 22 --image {INPUTS}/source.png --mask {INPUTS}/mask.png --image-size 64x96",
        DATA,
    ),
    PictureCase(
        "outpaint",
        "a blue dog",
        f"--seed 23 --image {INPUTS}/source.png --outpaint 16,0,32,16 --stepwise outpaint/steps "
        "--steps 2 --low-memory",
        TENSOR,
    ),
    PictureCase(
        "cached",
        PROMPT,
        "--seed 24 --cache 0.3 --steps 8 -n 2 --decoding-batch-size 2 --image-size 64 --wait 60",
        DATA,
    ),
    PictureCase(
        "prompts",
        None,
        f"--seed 25 --prompt-file {INPUTS}/prompts.txt --image-size 64 --steps 2 --force",
        SEQUENCE,
    ),
    PictureCase("again", None, f"--from {FIRST}/out.png --seed 26 --verbose", TENSOR),
    PictureCase(
        "edit",
        "a cat",
        f"-m {INPUTS}/klein --seed 27 --reference {INPUTS}/source.png --reference "
        f"{INPUTS}/second.png --image-size 32x48 --dtype float32",
        SEQUENCE,
    ),
    PictureCase(
        "moved-away",
        "a cat",
        f"-m {INPUTS}/base --seed 28 --negative-prompt dogs --cfg 3 --image-size 32x48",
        TENSOR,
    ),
    PictureCase(
        "true-guidance",
        "a cat",
        f"-m {INPUTS}/dev --seed 29 --negative-prompt dogs --cfg 2 --image-size 32x48",
        DATA,
    ),
    PictureCase(
        "control",
        "a cat",
        f"-m {INPUTS}/canny --seed 30 --control {INPUTS}/source.png --image-size 32x48",
        SEQUENCE,
    ),
    PictureCase(
        "seen",
        "a cat",
        f"-m {INPUTS}/dev --seed 31 --redux {INPUTS}/redux --reference {INPUTS}/source.png "
        "--image-size 32x48",
        DATA,
    ),
)
UPDATES = 20
TRAINING = (
    f"train {INPUTS}/data --model {MODEL} --seed 5 --iterations {3 * UPDATES} --grad-accumulate 3 "
    "--resolution 64x64 --num-augmentations 2 --validation 1 --caption-dropout 0.2 --lora-rank 4 "
    "--lora-dropout 0.1 --learning-rate 0.001 --warmup-steps 3 --ema 0.9 --checkpoint-every 30 "
    "--progress-every 30 --progress-steps 2 --cache-dir features --output-dir trained --json"
).split() + ["--progress-prompt", "a red dog"]


def write_inputs(folder: Path) -> None:
    """What the cases read, the same on every machine."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    _picture(rng, 80, 112).save(folder / "source.png")
    mask = np.zeros((80, 112), dtype=np.uint8)
    mask[20:60, 30:90] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "prompts.txt").write_text("a red cat\na yellow boat on a blue background\n")
    _write_adapter(folder / "peft.safetensors", rng, PEFT_KEYS, alpha=False)
    _write_adapter(folder / "kohya.safetensors", rng, KOHYA_KEYS, alpha=True)
    _picture(rng, 96, 64).save(folder / "second.png")
    make_flux2(folder / "klein")
    make_flux2(folder / "base", "base", transformer=TWELVE_HEADS)
    make_checkpoint(folder / "dev", guidance=True)
    wide = replace(TRANSFORMER, in_channels=2 * TRANSFORMER.in_channels)
    make_checkpoint(folder / "canny", guidance=True, transformer=wide)
    make_redux(folder / "redux")
    data = folder / "data"
    data.mkdir()
    rows = []
    for number, (height, width) in enumerate(((64, 64), (96, 80), (64, 112), (80, 80))):
        _picture(rng, height, width).save(data / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": f"a dog, number {number}"})
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A few large spots of colour: smooth, as photographs are."""
    spots = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return spots.resize((width, height), Image.Resampling.BICUBIC)


# The module's key with the ends of its two factors, its outputs and its inputs; sizes of `MODEL`.
PEFT_KEYS = (
    ("transformer.transformer_blocks.0.attn.to_q", 192, 192),
    ("transformer.transformer_blocks.1.ff.net.0.proj", 768, 192),
    ("transformer.single_transformer_blocks.3.proj_out", 192, 960),
)
KOHYA_KEYS = (
    ("lora_unet_double_blocks_0_img_attn_qkv", 576, 192),
    ("lora_unet_single_blocks_4_linear1", 1344, 192),
)


def _write_adapter(
    path: Path, rng: np.random.Generator, modules: tuple[tuple[str, int, int], ...], *, alpha: bool
) -> None:
    """Random low-rank factors, in PEFT's spelling or, with an `alpha`, in kohya's."""
    down, up = ("lora_down", "lora_up") if alpha else ("lora_A", "lora_B")
    arrays: dict[str, tuple[np.ndarray, str]] = {}
    for module, outputs, inputs in modules:
        for end, shape in ((down, (RANK, inputs)), (up, (outputs, RANK))):
            factor = rng.standard_normal(shape, dtype=np.float32) / 8
            arrays[f"{module}.{end}.weight"] = (factor, "F32")
        if alpha:
            arrays[f"{module}.alpha"] = (np.array(2.0, dtype=np.float32), "F32")
    write_tensors(path, arrays, {})
