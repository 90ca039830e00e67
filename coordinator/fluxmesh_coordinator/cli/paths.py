"""Paths as users type them: `~` stands for the home folder, also where no shell has seen it.

A shell leaves it alone in quotes, after `=` (`--output=~/dog.png`) and in files.
"""

from __future__ import annotations

import os
from typing import Any

import click


class UserPath(click.Path):
    """`click.Path`, with `~` and `~name` replaced; of a user unknown here, the path as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)
