"""tools/fullsize.py at its small sizes: what it measures on a large machine works at all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fluxmesh.flux import layouts
from tests.integration.conftest import environment
from tools.fullsize import Sizes, file_shapes

ROOT = Path(__file__).parents[2]


def test_the_program_prints_a_row_for_each_variant(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.fullsize", "--small", "--steps", "1"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--variants", "schnell", "dev-low-memory"],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (schnell|dev-low-memory) \|", done.stdout, re.MULTILINE)
    assert rows == ["schnell", "dev-low-memory"]
    assert list(tmp_path.iterdir()) == []


def test_the_full_size_is_that_of_flux() -> None:
    tensors = layouts.transformer_tensors(Sizes().transformer)
    assert layouts.parameter_count(tensors) == 11_901_408_320  # of FLUX.1-dev
    shapes = file_shapes(tensors)
    assert shapes["transformer_blocks.18.attn.to_q.weight"] == (3072, 3072)
    assert shapes["norm_out.linear.weight"] == (6144, 3072)
