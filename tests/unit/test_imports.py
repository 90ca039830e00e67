"""The import rules: who may import whom, and what must not load before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "fluxmesh": ROOT / "fluxmesh",
    "fluxmesh_agent": ROOT / "agent" / "fluxmesh_agent",
    "fluxmesh_coordinator": ROOT / "coordinator" / "fluxmesh_coordinator",
}
HEAVY = {"mlx", "zmq", "torch", "datasets", "transformers", "diffusers", "huggingface_hub"}
# What describes a model without computing: a coordinator imports it on a machine without mlx.
PURE = [
    *("fluxmesh", "fluxmesh.errors", "fluxmesh.events", "fluxmesh.request", "fluxmesh.images"),
    *(
        "fluxmesh.flux",
        "fluxmesh.models.flux1.config",
        "fluxmesh.sampling.schedule",
        "fluxmesh.sampling.latents",
    ),
    *("fluxmesh.weights.hub", "fluxmesh.models.flux1.tensor_maps", "fluxmesh.weights.checkpoint"),
    *(
        "fluxmesh.storage.safetensors",
        "fluxmesh.weights.reader",
        "fluxmesh.models.flux1.single_file",
    ),
    *("fluxmesh.weights.download", "fluxmesh.adapters.formats", "fluxmesh.models.tiling"),
    *("fluxmesh.engine.tf32", "fluxmesh_agent.cli", "fluxmesh_coordinator.commands.generate"),
    *("fluxmesh_coordinator.cli", "fluxmesh_coordinator.cli.generate"),
    *("fluxmesh_coordinator.cli.interactive", "fluxmesh_coordinator.cli.conversation"),
    *("fluxmesh_coordinator.cli.models", "fluxmesh.models.flux1.partition"),
    *("fluxmesh_coordinator.cli.adapters", "fluxmesh_coordinator.cli.progress"),
    *("fluxmesh.weights.writer", "fluxmesh.adapters.convert"),
    *("fluxmesh_coordinator.agents.bootstrap", "fluxmesh_coordinator.agents.launch"),
    *("fluxmesh_coordinator.deploy.bringup", "fluxmesh_coordinator.deploy.warmup"),
    *("fluxmesh_coordinator.agents.status", "fluxmesh_coordinator.console.tables"),
    *("fluxmesh_coordinator.deploy.what_if", "fluxmesh_coordinator.deploy.diagnosis"),
    *("fluxmesh_coordinator.console.up_report", "fluxmesh_coordinator.agents.mesh_file"),
    *("fluxmesh_coordinator.session", "fluxmesh_coordinator.runtime.mesh"),
    *("fluxmesh.training.request", "fluxmesh.training.data.dataset", "fluxmesh.training.plan"),
    *(
        "fluxmesh.training.micro_batches",
        "fluxmesh.training.compute.lr_schedule",
        "fluxmesh.training.data.feature_cache",
    ),
    *(
        "fluxmesh.training.checkpoint",
        "fluxmesh.training.events",
        "fluxmesh_coordinator.commands.train",
    ),
    *(
        "fluxmesh.training.run",
        "fluxmesh.training.data.encode_units",
        "fluxmesh.training.compute.parameter_vector",
    ),
    *("fluxmesh.wire.training_messages", "fluxmesh_coordinator.cli.train"),
]


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of a package."""
    folder = PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names.add(node.module or "")
    return names


def tops(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imported(path)}


def test_agent_and_coordinator_never_import_each_other_and_the_library_neither() -> None:
    forbidden = {
        "fluxmesh": {"fluxmesh_agent", "fluxmesh_coordinator", "click", "rich"},
        "fluxmesh_agent": {"fluxmesh_coordinator"},
        "fluxmesh_coordinator": {"fluxmesh_agent"},
    }
    for package, others in forbidden.items():
        for name, path in modules(package):
            assert not tops(path) & others, name


def test_only_the_flux_package_imports_mlx() -> None:
    allowed = (
        *("fluxmesh.kernels.", "fluxmesh.models.", "fluxmesh.weights."),
        *("fluxmesh.sampling.", "fluxmesh.adapters.", "fluxmesh.engine.", "fluxmesh.training."),
        "fluxmesh_agent.engine",
    )
    found = [
        name
        for package in PACKAGES
        for name, path in modules(package)
        if "mlx" in tops(path) and not name.startswith(allowed)
    ]
    assert found == []


def test_only_one_module_calls_a_collective() -> None:
    found = [
        name
        for package in PACKAGES
        for name, path in modules(package)
        if "mx.distributed" in path.read_text(encoding="utf-8")
    ]
    assert found == ["fluxmesh.models.flux1.parallel"]


def test_no_module_uses_what_mlx_keeps_private_or_needs_an_oracle() -> None:
    for package in PACKAGES:
        for name, path in modules(package):
            assert not tops(path) & {"torch", "diffusers", "transformers", "peft"}, name
            private = [
                other
                for other in imported(path)
                if other.startswith("mlx.") and any(p.startswith("_") for p in other.split("."))
            ]
            assert private == [], name


def test_planning_opens_no_socket_runs_no_loop_and_reads_no_clock() -> None:
    forbidden = {"mlx", "zmq", "asyncio", "time", "datetime", "random", "secrets", "socket"}
    planning = tuple(f"fluxmesh.{part}" for part in ("planning", "placement", "cluster", "host"))
    found = [(name, path) for name, path in modules("fluxmesh") if name.startswith(planning)]
    assert len(found) >= 9
    for name, path in found:
        assert not tops(path) & forbidden, name


def test_the_contract_opens_no_socket_runs_no_loop_and_reads_no_clock() -> None:
    forbidden = {"mlx", "zmq", "asyncio", "time", "datetime", "random", "socket", "threading"}
    wanted = {"fluxmesh.wire.messages", "fluxmesh.wire.protocol", "fluxmesh.wire.limits"}
    wanted |= {"fluxmesh.wire.training_messages"}
    found = {name: path for name, path in modules("fluxmesh") if name in wanted}
    assert found.keys() == wanted
    for name, path in found.items():
        assert not tops(path) & forbidden, name
    loaded = loaded_after(
        "import fluxmesh.wire.protocol, fluxmesh.wire.transport, fluxmesh.storage.keys"
    )
    assert not loaded & (HEAVY | {"zmq", "asyncio", "click", "rich"})


def test_only_the_transport_and_the_making_of_keys_know_zeromq() -> None:
    known = {name for package in PACKAGES for name, path in modules(package) if "zmq" in tops(path)}
    assert known == {
        "fluxmesh.storage.keys",
        "fluxmesh.wire.transport.dialer",
        "fluxmesh.wire.transport.gate",
        "fluxmesh.wire.transport.listener",
        "fluxmesh.wire.transport.sockets",
    }


def test_the_twins_load_no_zeromq() -> None:
    loaded = loaded_after("import fluxmesh.wire.transport.inproc, tests.broken_transport")
    assert "asyncio" in loaded and not loaded & (HEAVY | {"zmq"})


def test_what_an_agent_decides_opens_no_socket_runs_no_loop_and_reads_no_clock() -> None:
    forbidden = {"mlx", "zmq", "asyncio", "time", "datetime", "random", "secrets", "socket"}
    pure = ("fluxmesh_agent.lifecycle", "fluxmesh_agent.leases", "fluxmesh.wire.messages")
    found = dict(pair for package in PACKAGES for pair in modules(package) if pair[0] in pure)
    assert set(found) == set(pure)
    for name, path in found.items():
        assert not tops(path) & forbidden, name


def test_an_agent_never_loads_mlx() -> None:
    loaded = loaded_after(
        "import fluxmesh_agent.process, fluxmesh_agent.cli, fluxmesh.wire.transport.listener"
    )
    assert loaded & HEAVY == {"zmq"}
    assert "asyncio" in loaded


def test_a_session_opens_no_socket_runs_no_loop_and_reads_no_clock() -> None:
    forbidden = {"mlx", "zmq", "asyncio", "time", "datetime", "random", "secrets", "socket"}
    session = {"session", "course", "dispatch", "recovery", "rings", "hosts", "album", "jobs"}
    session |= {f"train_{part}" for part in ("session", "course", "dispatch", "losses", "jobs")}
    session |= {"train_hands", "failures"}
    found = [
        (name, path)
        for name, path in modules("fluxmesh_coordinator")
        if name.rpartition(".")[2] in session
    ]
    assert len(found) == 15
    for name, path in found:
        assert not tops(path) & forbidden, name


def loaded_after(code: str) -> set[str]:
    """The top-level packages that a new interpreter has loaded after running `code`."""
    tail = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_what_does_not_compute_loads_no_mlx() -> None:
    loaded = loaded_after("\n".join(f"import {name}" for name in PURE))
    assert not loaded & HEAVY
    assert "numpy" in loaded  # the check sees what is loaded


def test_the_pipeline_loads_mlx_when_it_is_first_named() -> None:
    assert "mlx" in loaded_after("import fluxmesh; fluxmesh.FluxPipeline")
    assert "FluxPipeline" in dir(__import__("fluxmesh"))


def test_the_mesh_computes_nothing_itself() -> None:
    loaded = loaded_after("import fluxmesh; fluxmesh.Mesh.connect")
    assert not loaded & HEAVY


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        __import__("fluxmesh").Nothing  # noqa: B018


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["train", "--help"],
        ["interactive", "--help"],
        ["up", "--help"],
        ["status", "--help"],
        ["plan", "--help"],
        ["doctor", "--help"],
        ["logs", "--help"],
        ["down", "--help"],
    ],
    ids=" ".join,
)
def test_the_command_line_answers_without_loading_what_computes(arguments: list[str]) -> None:
    loaded = loaded_after(
        "from fluxmesh_coordinator.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert end.code == 0"
    )
    assert not loaded & (HEAVY | {"numpy", "PIL", "rich", "zmq", "msgpack", "asyncio"})
    assert "click" in loaded
