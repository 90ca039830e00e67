"""What all tests have from `tests/conftest.py`, so that they take no longer than they need."""

from __future__ import annotations

import gc
import subprocess
import sys


def test_a_python_that_a_test_starts_keeps_what_it_compiles() -> None:
    """Else each of more than a thousand would compile all modules of fluxmesh again."""
    code = "import sys; print(sys.dont_write_bytecode)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_collection_of_garbage_goes_through_what_collecting_made() -> None:
    assert gc.get_freeze_count() > 10_000
