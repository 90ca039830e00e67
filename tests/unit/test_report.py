"""The report of a training: one file, nothing from elsewhere, the user's words escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fluxmesh_coordinator.artifacts.loss_curve import curve, running_mean, ticks
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.artifacts.training_html import TaughtPicture, TrainingReport
from tests.datasets import SIZES, picture


def filled(folder: Path) -> Path:
    lines = [{"event": "updated", "iteration": 4 * i, "loss": 1 / i} for i in range(1, 6)]
    lines.append({"event": "validated", "iteration": 8, "loss": 0.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for iteration, size in ((0, SIZES[0]), (8, (1024, 1024))):
        pixels = np.array(picture(iteration, size))
        (folder / f"{iteration:07d}_progress.png").write_bytes(encode_png(pixels, "{}"))
    return folder


def test_losses_and_pictures_stand_in_one_file(tmp_path):
    report = TrainingReport(
        title="tiny on <dogs>",
        facts={"prompt": "a <b> & c"},
        state="<b>Done</b>",
        command="fluxmesh generate 'a <dog>'",
        best="The last.",
        taught=[TaughtPicture.of(np.array(picture(1, (900, 600))), "a <sks> dog")],
        untaught=3,
    )
    page = report.write(filled(tmp_path)).read_text()
    assert page.count("<polyline") == 3
    assert page.count("data:image/png;base64,") == 1, "a small picture is as it was painted"
    assert page.count("data:image/jpeg;base64,") == 2
    assert len(page) < 700_000, "1024 pixels of noise are 3 MB as a PNG"
    assert "iteration 8" in page and "(and 3 more)" in page
    assert "tiny on &lt;dogs&gt;" in page and "a &lt;b&gt; &amp; c" in page
    assert "a &lt;sks&gt; dog" in page and "fluxmesh generate &#x27;a &lt;dog&gt;&#x27;" in page
    assert not re.search(r"""(src|href)=["']?(https?:|/)""", page)
    assert "<script" not in page and "prefers-color-scheme: dark" in page


def test_the_page_is_read_again_while_the_run_goes_on_and_not_after_it(tmp_path):
    running = TrainingReport(title="t", running=True, iteration=3, iterations=9)
    page = running.write(tmp_path).read_text()
    assert 'http-equiv="refresh"' in page and '<progress value="3" max="9">' in page
    page = TrainingReport(title="t", state="<b>Done</b>").write(tmp_path).read_text()
    assert "refresh" not in page and "<progress" not in page


def test_a_run_without_metrics_has_a_report_too(tmp_path):
    assert "<svg" not in TrainingReport(title="t").write(tmp_path).read_text()


def test_the_curve_spans_its_frame_and_copes_with_one_point():
    drawn = curve([(0, 0.0), (10, 1.5)], [])
    (points,) = re.findall(r'stroke-width="1" points="([^"]*)"', drawn)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    assert (x0, y0, x1, y1) == (48, 232, 812, 48)
    assert "nan" not in curve([(4, 2.0)], []) and "nan" not in curve([(4, 0.0)], [(4, 0.0)])
    assert "held out" in curve([(4, 2.0)], [(4, 1.0)]) and "held out" not in drawn


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 600, [0, 200, 400, 600]),
        (0, 0.788, [0, 0.2, 0.4, 0.6, 0.8]),
        (0, 1.5, [0, 0.5, 1, 1.5]),
        (0, 24, [0, 5, 10, 15, 20, 25]),
        (0, 0, [0, 1]),
        (-0.3, 1, [-0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_span_what_is_shown(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_the_running_mean_of_a_constant_is_that_constant():
    assert [y for _, y in running_mean([(i, 3.0) for i in range(5)])] == pytest.approx([3.0] * 5)
