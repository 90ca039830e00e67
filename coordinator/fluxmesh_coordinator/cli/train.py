"""`fluxmesh train`: pictures with captions in, a LoRA adapter out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fluxmesh_coordinator.cli.completion import complete_data_sets
from fluxmesh_coordinator.cli.parameters.options import ConfigurableCommand, chosen, model_option
from fluxmesh_coordinator.cli.parameters.types import Resolution, UserPath


def choice(*values: str) -> click.Choice:
    return click.Choice(values)


_OPTIONS = [
    model_option("the best that is here"),
    click.option("--seed", type=int, help="Where all that is random comes from.  [drawn, told]"),
    click.option("--dtype", type=choice("bfloat16", "float32"), help="Of the model.  [bfloat16]"),
    click.option("-q", "--quantize", is_flag=True, help="Quantize the model (QLoRA)."),
    click.option(
        "--bits", type=choice("4", "8"), help="Of a quantized weight.  [4 with --quantize]"
    ),
    # data
    click.option("--split", help="Of a data set that has several.  [train]"),
    click.option("--image-column", help="Key of an entry's picture.  [image or file_name]"),
    click.option("--caption-column", help="Of its caption.  [prompt, text or caption]"),
    click.option("--resolution", type=Resolution(), help="Of every picture.  [by its proportions]"),
    click.option("--num-augmentations", type=int, help="Crops of each picture.  [5]"),
    click.option("--trigger", metavar="WORD", help="Put before captions that lack it."),
    click.option("--caption-dropout", type=float, help="Share of captions left empty.  [0]"),
    click.option("--validation", type=int, help="Pictures held out to measure on.  [0]"),
    click.option(
        "--prior-folder",
        type=UserPath(),
        metavar="DIR",
        help="Pictures with captions of what the model shall keep: other dogs.",
    ),
    click.option("--prior-weight", type=float, help="Of their loss.  [1.0]"),
    # length
    click.option("--iterations", type=int, help="Batches to train on.  [600]"),
    click.option("--batch-size", type=int, help="Pictures of a batch.  [1]"),
    click.option("--grad-accumulate", type=int, help="Batches of an update.  [4]"),
    # LoRA
    click.option("--lora-rank", type=int, help="Of the adapter.  [8]"),
    click.option("--lora-alpha", type=float, help="Its scale is alpha / rank.  [the rank]"),
    click.option("--lora-dropout", type=float, help="Share of inputs dropped.  [0]"),
    click.option("--lora-blocks", type=int, help="Train the last so many blocks.  [all]"),
    click.option(
        "--lora-targets",
        metavar="PATTERNS",
        callback=lambda _c, _p, value: tuple(value.split(",")) if value else None,
        help="Linears by name, commas between: *attn.qkv,*.linear2  [all]",
    ),
    # step
    click.option("--guidance", type=float, help="For models that take it.  [4.0]"),
    click.option(
        "--timesteps",
        type=choice("auto", "uniform", "logit-normal", "schnell"),
        help="How noise levels are drawn.  [as the model was trained]",
    ),
    click.option("--grad-checkpoint", is_flag=True, help="Less memory, a third slower."),
    click.option("--optimizer", type=choice("adam", "adamw"), help="[adam]"),
    click.option("--learning-rate", type=float, help="[by the model's width: 0.0001 for dev]"),
    click.option("--lr-schedule", type=choice("cosine", "linear", "constant"), help="[cosine]"),
    click.option("--warmup-steps", type=int, help="Updates in which the rate rises.  [a tenth]"),
    click.option("--weight-decay", type=float, help="Of adamw.  [0.01]"),
    click.option("--clip-norm", type=float, help="Of an update's gradient at most.  [1.0]"),
    click.option("--ema", type=float, help="Save the average of weights with this decay."),
    # output
    click.option("--output-dir", type=UserPath(), metavar="DIR", help="[mlx_output]"),
    click.option(
        "--cache-dir", type=UserPath(), metavar="DIR", help="Of latents and text features."
    ),
    click.option("--checkpoint-every", type=int, help="Iterations.  [50]"),
    click.option("--keep-checkpoints", type=int, help="The last so many, and the best.  [3]"),
    click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output-dir."),
    click.option("--progress-prompt", help="Paint this on the way."),
    click.option("--progress-every", type=int, help="Iterations.  [50]"),
    click.option("--progress-steps", type=int, help="Of those pictures.  [the model's own]"),
]


def train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for every field of `TrainRequest`; what is not given says nothing."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(
    cls=ConfigurableCommand, short_help="Train a LoRA on a folder or a data set of the Hub."
)
@click.argument("dataset", type=UserPath(), shell_complete=complete_data_sets)
@train_options
@click.option("--json", "as_json", is_flag=True, help="Tell it in JSON, one object a line.")
@click.pass_context
def train(context: click.Context, dataset: str, as_json: bool, **_fields: Any) -> None:
    """Train a LoRA on DATASET: a folder of pictures with captions in train.jsonl, metadata.jsonl or
    .csv, or .txt files beside them, or a data set on the Hugging Face Hub.

    The adapter is final_adapters.safetensors in --output-dir; `generate --adapter` takes it.
    """
    from fluxmesh_coordinator.commands.train import conduct, request_of
    from fluxmesh_coordinator.console.train_report import (
        TrainJsonReporter,
        TrainReporter,
        TrainTerminalReporter,
    )

    request = request_of(dataset, chosen(context))
    reporter: TrainReporter = TrainJsonReporter() if as_json else TrainTerminalReporter()
    with reporter:
        conduct(request, reporter)
