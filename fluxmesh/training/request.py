"""What a user asks of a training run, checked once, before any weight is touched. Imports no mlx.

The numbers are those of one host, whatever the mesh: `iterations` counts micro-batches, and
`grad_accumulate` of them make an update. A mesh deals the micro-batches out; it changes none.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fluxmesh.errors import UsageError
from fluxmesh.request import DTYPES, MAX_SEED, MAX_SIDE

TRAIN_BITS = (4, 8)
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("cosine", "linear", "constant")
TIMESTEPS = ("auto", "uniform", "logit-normal", "schnell")
# What makes a training take less memory, beginning with what costs its user least.
LESS_MEMORY = "`grad_checkpoint`, `quantize`, a lower `lora_rank` or a smaller `resolution`"
MULTIPLE = 16  # of pixels that each side of a training picture has
MAX_ITERATIONS = 10_000_000
MAX_RANK = 1024

# What may differ between a run and its resume: none of it reaches the adapter's bytes.
_FREE = (
    *("output_dir", "cache_dir", "resume", "checkpoint_every", "keep_checkpoints"),
    *("progress_prompt", "progress_every", "progress_steps", "grad_checkpoint", "model"),
    *(
        "dataset",
        "prior_folder",
        "split",
        "image_column",
        "caption_column",
    ),  # the data's fingerprint says more
)


@dataclass(frozen=True)
class TrainRequest:
    """One training run: LoRA weights of `model` on the pictures and captions of `dataset`."""

    dataset: str  # a folder, or the name of a data set on the Hub
    seed: int
    model: str = "tiny"
    dtype: str = "bfloat16"  # of the frozen model and its activations; LoRA stays float32
    bits: int | None = None  # 4 or 8: the frozen model is quantized (QLoRA)

    # Data
    split: str = "train"  # of a data set that has several
    image_column: str = ""  # keys of an entry; "" is whichever of the usual is there
    caption_column: str = ""
    resolution: tuple[int, int] | None = None  # (height, width) in pixels; None: buckets
    num_augmentations: int = 5  # crops of each image
    trigger: str = ""  # put before every caption that lacks it
    caption_dropout: float = 0.0  # share of captions that are left empty
    validation: int = 0  # images held out, to measure on
    prior_folder: str = ""  # images of what the model is to keep as it was; "" is none
    prior_weight: float = 1.0  # of their loss, beside that of the data set's images

    # Length
    iterations: int = 600  # micro-batches
    batch_size: int = 1  # images of a micro-batch
    grad_accumulate: int = 4  # micro-batches of an update

    # LoRA
    lora_rank: int = 8
    lora_alpha: float | None = None  # None is the rank, so a scale of 1
    lora_dropout: float = 0.0
    lora_blocks: int = -1  # the last so many blocks; -1 is all
    lora_targets: tuple[str, ...] = ("*",)  # patterns of linears in a block: "*attn.qkv"

    # Step
    guidance: float = 4.0  # read by models with a guidance embedding (dev) only
    timesteps: str = "auto"
    grad_checkpoint: bool = False  # compute blocks twice instead of keeping their activations
    optimizer: str = "adam"
    learning_rate: float | None = None  # None is by the model's width (`defaults.py`)
    lr_schedule: str = "cosine"
    warmup_steps: int | None = None  # updates; None is a tenth of them, 100 at most
    weight_decay: float = 0.01  # of adamw
    clip_norm: float | None = 1.0  # largest norm of an update's gradient; None never clips
    ema: float | None = None  # decay of the average of weights that is saved; None saves the last

    # Output
    output_dir: str = "mlx_output"
    cache_dir: str | None = None  # None is the user's cache
    checkpoint_every: int = 50  # iterations
    keep_checkpoints: int = 3  # the latest so many, and the best
    resume: bool = False
    progress_prompt: str = ""
    progress_every: int = 50  # iterations
    progress_steps: int | None = None  # None is the model's own

    def __post_init__(self) -> None:
        """Raises `UsageError` naming the option and what is allowed."""
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError.about("seed", f"is {self.seed}", "it must be 0 to 2^63 - 1")
        if self.dtype == "float16":
            raise UsageError.about(
                "dtype", "is float16, in which small gradients are lost", "train in bfloat16"
            )
        self._choose("dtype", self.dtype, DTYPES)
        self._choose("optimizer", self.optimizer, OPTIMIZERS)
        self._choose("lr_schedule", self.lr_schedule, SCHEDULES)
        self._choose("timesteps", self.timesteps, TIMESTEPS)
        if self.bits is not None and self.bits not in TRAIN_BITS:
            raise UsageError.about("bits", f"is {self.bits}", "training takes 4 or 8")
        for side in self.resolution or ():
            if not (MULTIPLE <= side <= MAX_SIDE and side % MULTIPLE == 0):
                raise UsageError(
                    f"`resolution` has a side of {side}; each must be a multiple of {MULTIPLE} "
                    f"from {MULTIPLE} to {MAX_SIDE}.",
                    setting="resolution",
                )
        whole = {
            "num_augmentations": (self.num_augmentations, 1, 10_000),
            "validation": (self.validation, 0, 10_000),
            "iterations": (self.iterations, 1, MAX_ITERATIONS),
            "batch_size": (self.batch_size, 1, 1024),
            "grad_accumulate": (self.grad_accumulate, 1, 65_536),
            "lora_rank": (self.lora_rank, 1, MAX_RANK),
            "warmup_steps": (self.warmup_steps or 0, 0, MAX_ITERATIONS),
            "checkpoint_every": (self.checkpoint_every, 1, MAX_ITERATIONS),
            "keep_checkpoints": (self.keep_checkpoints, 1, 10_000),
            "progress_every": (self.progress_every, 1, MAX_ITERATIONS),
        }
        for setting, (number, least, most) in whole.items():
            if not least <= number <= most:
                raise UsageError.about(setting, f"is {number}", f"it must be {least} to {most}")
        if self.progress_steps is not None and not 1 <= self.progress_steps <= 1000:
            raise UsageError.about(
                "progress_steps", f"is {self.progress_steps}", "it must be 1 to 1000"
            )
        if self.lora_blocks != -1 and self.lora_blocks < 1:
            raise UsageError.about(
                "lora_blocks", f"is {self.lora_blocks}", "it must be 1 or more, or -1"
            )
        if self.learning_rate is not None:
            self._within("learning_rate", self.learning_rate, 0, 10)
        self._within("guidance", self.guidance, 0, 100)
        self._within("prior_weight", self.prior_weight, 0, 1000)
        self._within("weight_decay", self.weight_decay, 0, 10)
        for setting, share in (
            ("caption_dropout", self.caption_dropout),
            ("lora_dropout", self.lora_dropout),
            ("ema", self.ema),
        ):
            if share is not None and not 0 <= share < 1:
                raise UsageError.about(setting, f"is {share}", "it must be 0 or more and below 1")
        for setting, value in (("lora_alpha", self.lora_alpha), ("clip_norm", self.clip_norm)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError.about(setting, f"is {value}", "it must be above 0")

    @staticmethod
    def _choose(setting: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise UsageError.about(setting, f"is {value!r}", f"choose {', '.join(allowed)}")

    @staticmethod
    def _within(setting: str, value: float, least: float, most: float) -> None:
        if not (math.isfinite(value) and least <= value <= most):
            raise UsageError.about(setting, f"is {value}", f"it must be {least} to {most}")

    @property
    def scale(self) -> float:
        """What `B @ A` is multiplied with."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    @property
    def updates(self) -> int:
        """How often the weights move; the last update may have fewer micro-batches."""
        return -(-self.iterations // self.grad_accumulate)

    def micro_batches(self, update: int) -> range:
        """The numbers of the micro-batches of `update`, both counted from 0."""
        first = update * self.grad_accumulate
        return range(first, min(first + self.grad_accumulate, self.iterations))

    def identity(self) -> dict[str, Any]:
        """The fields that the adapter's bytes depend on; what a resume must find unchanged."""
        fields = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in _FREE
        }
