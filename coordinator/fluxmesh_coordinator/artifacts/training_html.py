"""`report.html`: a training on one page, to look at while it runs and to send to a friend later.

What it was taught, how the loss went, what its progress pictures show, which checkpoint is the best
as far as that was measured, and the command that uses it. One file that loads nothing from
elsewhere, in light and dark. Losses and pictures come from what lies in the output folder
(`metrics.jsonl`, `*_progress.png`), so that they are the same after a resume. While the run goes
on, the page asks to be read again every few seconds; no script is in it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluxmesh.storage.atomic import write_file
from fluxmesh_coordinator.artifacts.loss_curve import Point, curve

REPORT = "report.html"
METRICS = "metrics.jsonl"
PICTURE = re.compile(r"(\d{7,})_progress\.png")
REFRESH = 10  # seconds, while the training runs
THUMBNAIL = 192  # pixels of a training picture's longer side, for screens that show two in one
LARGEST = 768  # of a progress picture's
SHOWN = 24  # training pictures

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">{refresh}<title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
:root {{ color-scheme: light dark; --text: #1d2430; --back: #fff; --quiet: #5b6675;
  --panel: #f3f6fa; --grid: #e6eaf0; --faint: #a9b9d0; --mean: #2463b5; --held: #c2571a }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e4e8ee; --back: #14181f; --quiet: #97a3b4;
  --panel: #1e242e; --grid: #2b3340; --faint: #4f6285; --mean: #6aa5f8; --held: #f0975a }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em;
  color: var(--text); background: var(--back) }}
h1 {{ font-size: 1.5em; margin-bottom: .2em }} h2 {{ font-size: 1.1em; margin-top: 2em }}
.state {{ color: var(--quiet); margin: 0 }} .state b {{ color: var(--text) }}
progress {{ width: 100%; height: 8px; accent-color: var(--mean) }}
pre {{ background: var(--panel); padding: .8em 1em; border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }}
table {{ border-collapse: collapse }} td {{ padding: .1em 1.5em .1em 0; vertical-align: top;
  overflow-wrap: anywhere }}
td:first-child {{ color: var(--quiet); white-space: nowrap }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 14px }}
figure {{ margin: 0; width: 200px }} .small figure {{ width: 96px }}
figure img {{ display: block; width: 100%; border-radius: 4px }}
figcaption {{ color: var(--quiet); font-size: 13px; overflow-wrap: anywhere }}
.small figcaption {{ font-size: 11px; line-height: 1.3 }}
svg {{ width: 100%; height: auto }} svg text {{ font-size: 12px; fill: var(--quiet) }}
footer {{ color: var(--quiet); font-size: 12px; margin-top: 3em }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


@dataclass(frozen=True)
class TaughtPicture:
    """A picture that is taught, small."""

    jpeg: bytes = field(repr=False)
    caption: str

    @classmethod
    def of(cls, pixels: np.ndarray, caption: str) -> TaughtPicture:
        """Of uint8 [height, width, 3] at any size."""
        picture = Image.fromarray(pixels)
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        return cls(_jpeg(picture), caption)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What the page tells beside what lies in the folder."""

    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # told in a table as they stand
    state: str = ""  # "running", "done", ...; and what is to be said of it
    iteration: int = 0  # done
    iterations: int = 0  # of the whole run
    running: bool = False  # then the page asks to be read again
    command: str = ""  # that paints with what was learned
    best: str = ""  # which checkpoint that is, and how it is known
    taught: Sequence[TaughtPicture] = ()
    untaught: int = 0  # more of these, which are not shown
    written: str = ""  # when, and by what

    def write(self, folder: Path) -> Path:
        """Writes the page over an older one; returns its file. Raises `OutputError`."""
        title = html.escape(self.title)
        refresh = f'<meta http-equiv="refresh" content="{REFRESH}">' if self.running else ""
        body = "\n".join(self._parts(folder))
        page = _PAGE.format(title=title, refresh=refresh, body=body)
        write_file(folder / REPORT, page.encode(), replace=True)
        return folder / REPORT

    def _parts(self, folder: Path) -> Iterable[str]:
        if self.state:
            yield f'<p class="state">{self.state}</p>'
        if self.running and self.iterations:
            yield f'<progress value="{self.iteration}" max="{self.iterations}"></progress>'
        pictures = sorted(path for path in folder.iterdir() if PICTURE.fullmatch(path.name))
        if self.command:
            yield f"<h2>Use it</h2><p>{html.escape(self.best)}</p>"
            yield f"<pre>{html.escape(self.command)}</pre>"
        if pictures:
            yield _gallery("What it paints", [_progress(path) for path in pictures])
        losses, held_out = read_losses(folder / METRICS)
        if losses:
            yield f"<h2>Loss</h2>{curve(losses, held_out)}"
        if self.taught:
            more = f" (and {self.untaught} more)" if self.untaught else ""
            shown = [_figure("jpeg", each.jpeg, each.caption) for each in self.taught]
            yield _gallery(f"What it was taught{more}", shown, "pictures small")
        if self.facts:
            yield f"<h2>How</h2>{_table(self.facts)}"
        if self.written:
            yield f"<footer>{html.escape(self.written)}</footer>"


def read_losses(metrics: Path) -> tuple[list[Point], list[Point]]:
    """(iteration, loss) of every update, and of every look at what was held out."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    entries = [json.loads(line) for line in lines]
    losses = [(e["iteration"], e["loss"]) for e in entries if e["event"] == "updated"]
    held_out = [(e["iteration"], e["loss"]) for e in entries if e["event"] == "validated"]
    return losses, held_out


def _table(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _gallery(heading: str, figures: Sequence[str], kind: str = "pictures") -> str:
    return f'<h2>{html.escape(heading)}</h2><div class="{kind}">{"".join(figures)}</div>'


def _progress(path: Path) -> str:
    """A progress picture, as it is where it is small: FLUX's own would be too large to mail."""
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as picture:
        if max(picture.size) > THUMBNAIL:
            picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            data, kind = _jpeg(picture), "jpeg"
    return _figure(kind, data, f"iteration {int(path.name.partition('_')[0])}")


def _figure(kind: str, data: bytes, caption: str) -> str:
    text = html.escape(caption)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
