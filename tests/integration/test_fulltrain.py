"""tools/fulltrain.py at its small sizes: what it measures on a large machine works at all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import environment

ROOT = Path(__file__).parents[2]
VARIANTS = ["bf16", "4-bit-checkpointed"]


def test_the_program_prints_a_row_for_each_variant(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.fulltrain", "--small", "--steps", "1"]
    done = subprocess.run(
        [*command, "--side", "16", "--folder", str(tmp_path), "--variants", *VARIANTS],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (\S+) \| [\d.]+ \| [\d.]+ \|", done.stdout, re.MULTILINE)
    assert rows == VARIANTS
    assert list(tmp_path.iterdir()) == []
