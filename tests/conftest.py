"""For all tests."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# An example may stand still for as long as others have the processor. All other settings are
# Hypothesis' own: where CI is set, the same examples each time.
settings.register_profile(
    "patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

# Whoever runs the tests in the background may have them ignore Ctrl-C, and so would every command
# that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests start more than a thousand Pythons. Where the environment forbids bytecode, each of them
# would compile some 400 modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# float32 means float32: MLX reads this when it is loaded, before any test module. The GPU of an M5,
# as CUDA, would compute tf32.
os.environ["MLX_ENABLE_TF32"] = "0"

# `EMULATE=mac make test`, on Linux: this process and all Pythons that it starts are as on a Mac.
if os.environ.get("EMULATE"):
    MAC = str(Path(__file__).parent / "as_on_a_mac")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, [MAC, *paths])))
    sys.path.insert(0, MAC)
    import as_on_a_mac

    as_on_a_mac.install()


def pytest_collection_finish() -> None:
    """What collecting has made stays to the end, and no collection of garbage looks at it again.

    An engine collects whenever a model leaves memory, and here would go through the hundred
    thousands of objects that 6,400 tests are: 0.2 s each time, several times a test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys, and records of jobs that fail here, are not left in the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if "FLUXMESH_HOME" not in os.environ:
            patch.setenv("FLUXMESH_HOME", str(tmp_path_factory.mktemp("home") / "fluxmesh"))
        yield
