"""The import rules: who may import whom, and what must not load before it is used.

They are rules about folders, so that a new module has them without being named here. `make house`
prints what they describe.
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tools.house import ROOMS, ROOT, Tree, imported, modules

HEAVY = {"mlx", "zmq", "torch", "datasets", "transformers", "diffusers", "huggingface_hub"}
PACKAGES = ("fluxmesh", "fluxmesh_agent", "fluxmesh_coordinator")

# Decides, and does nothing: no sockets, no loop, no clock, no randomness.
IMPURE = {
    *("mlx", "zmq", "asyncio", "threading", "socket", "subprocess"),
    *("time", "datetime", "random", "secrets"),
}
PURE = (
    *("fluxmesh.cluster.", "fluxmesh.planning.", "fluxmesh_coordinator.jobs."),
    *("fluxmesh_agent.leases", "fluxmesh_agent.lifecycle"),
    *("fluxmesh.bounds", "fluxmesh.wire.messages"),
    *("fluxmesh.wire.fields", "fluxmesh.wire.values"),
    *("fluxmesh.wire.protocol", "fluxmesh.wire.limits"),
    *("fluxmesh_coordinator.server.queue.fair_queue", "fluxmesh_coordinator.server.metrics"),
    "fluxmesh_coordinator.server.queue.durations",
)

# Computes. A coordinator may import everything else of the library on a machine without mlx.
COMPUTES = (
    *("fluxmesh.kernels.", "fluxmesh.models.", "fluxmesh.engine.", "fluxmesh.sampling."),
    *("fluxmesh.weights.loading", "fluxmesh.weights.zero_copy", "fluxmesh.weights.quantize"),
    *("fluxmesh.adapters.lora", "fluxmesh.adapters.fuse"),
    *("fluxmesh.training.compute.", "fluxmesh.training.data.encoding"),
    *("fluxmesh.training.local_executor", "fluxmesh.training.worker", "fluxmesh_agent.engine"),
)
# Below those folders, what describes a model or a request without computing.
DESCRIBES = (
    *("fluxmesh.models.autoencoder.tiling", "fluxmesh.models.autoencoder.conv_tensors"),
    *("fluxmesh.models.tensor_map", "fluxmesh.models.transformer_shape", "fluxmesh.models.base"),
    *("fluxmesh.models.registry", "fluxmesh.models.files.family"),
    *("fluxmesh.models.flux1.family", "fluxmesh.models.flux1.architecture"),
    *("fluxmesh.models.flux1.files.folder", "fluxmesh.models.flux1.files.completion"),
    *("fluxmesh.models.flux2.family", "fluxmesh.models.flux2.architecture"),
    *("fluxmesh.models.flux2.files.folder", "fluxmesh.models.flux2.files.completion"),
    *(
        "fluxmesh.models.partition",
        "fluxmesh.models.autoencoder.packing",
        "fluxmesh.models.flux1.config",
    ),
    *("fluxmesh.models.flux1.tensor_maps", "fluxmesh.models.flux1.single_file"),
    *("fluxmesh.models.flux1.adapter_names", "fluxmesh.models.flux2.adapter_names"),
    *("fluxmesh.models.partition", "fluxmesh.models.flux1.partition"),
    "fluxmesh.models.flux1.quantization",
    *("fluxmesh.models.flux1.tokenizers", "fluxmesh.sampling.schedule"),
    *("fluxmesh.models.files.shapes", "fluxmesh.models.flux2.config"),
    *("fluxmesh.models.flux2.tensor_maps", "fluxmesh.models.flux2.single_file"),
    *("fluxmesh.models.flux2.quantization", "fluxmesh.models.flux2.positions"),
    *("fluxmesh.models.flux2.partition",),
    *("fluxmesh.models.flux2.tokenizer", "fluxmesh.models.flux2.references"),
    *("fluxmesh.sampling.latents", "fluxmesh.engine.tf32"),
    *("fluxmesh.training.compute.lr_schedule", "fluxmesh.training.compute.parameter_vector"),
)


def tops(name: str) -> set[str]:
    """The top-level packages that a module imports."""
    return {other.partition(".")[0] for other in imported(ALL[name])}


ALL = {name: path for package in PACKAGES for name, path in modules(package)}


def test_agent_and_coordinator_never_import_each_other_and_the_library_neither() -> None:
    forbidden = {
        "fluxmesh": {"fluxmesh_agent", "fluxmesh_coordinator", "click", "rich"},
        "fluxmesh_agent": {"fluxmesh_coordinator"},
        "fluxmesh_coordinator": {"fluxmesh_agent"},
    }
    for name in ALL:
        assert not tops(name) & forbidden[name.partition(".")[0]], name


def test_only_what_computes_imports_mlx() -> None:
    modules = [name for name in ALL if "mlx" in tops(name) and not name.startswith(COMPUTES)]
    assert modules == []


def test_only_one_module_calls_a_collective() -> None:
    modules = [name for name, path in ALL.items() if "mx.distributed" in path.read_text("utf-8")]
    assert modules == ["fluxmesh.models.collectives"]


def test_no_module_uses_what_mlx_keeps_private_or_needs_an_oracle() -> None:
    for name in ALL:
        assert not tops(name) & {"torch", "diffusers", "transformers", "peft"}, name
        private = [
            other
            for other in imported(ALL[name])
            if other.startswith("mlx.") and any(part.startswith("_") for part in other.split("."))
        ]
        assert private == [], name


def test_what_decides_opens_no_socket_runs_no_loop_and_reads_no_clock() -> None:
    pure = [name for name in ALL if name.startswith(PURE)]
    assert len(pure) >= 15 and all(any(name.startswith(rule) for name in pure) for rule in PURE)
    for name in pure:
        assert not tops(name) & IMPURE, name


def test_only_the_transport_and_the_making_of_keys_know_zeromq() -> None:
    known = {name for name in ALL if "zmq" in tops(name)}
    assert known and all(
        name.startswith(("fluxmesh.wire.transport.", "fluxmesh.storage.keys")) for name in known
    )


def test_nobody_imports_the_face_of_the_package_for_its_version() -> None:
    modules = [name for name in ALL if "fluxmesh.__version__" in imported(ALL[name])]
    assert modules == []


def test_imports_run_downward_and_never_in_circles() -> None:
    tree = Tree.read()
    assert tree.upward() == []
    assert tree.circles() == []


def test_every_folder_stands_in_the_order_of_rooms_and_fits_in_a_head() -> None:
    tree = Tree.read()
    assert tree.unknown() == []
    assert len(tree.arrows()) > 50 and set(ROOMS) == set(PACKAGES)  # the check sees the tree
    assert tree.crowded(20) == []


def loaded_after(code: str) -> set[str]:
    """The top-level packages that a new interpreter has loaded after running `code`."""
    tail = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_what_does_not_compute_loads_no_mlx() -> None:
    named = [name for name in ALL if name in DESCRIBES or not name.startswith(COMPUTES)]
    named = [name for name in named if not name.endswith("__main__")]
    loaded = loaded_after("\n".join(f"import {name}" for name in named))
    assert not loaded & (HEAVY - {"zmq"})
    assert "numpy" in loaded  # the check sees what is loaded


def test_the_contract_and_the_twins_load_no_zeromq() -> None:
    loaded = loaded_after(
        "import fluxmesh.wire.protocol, fluxmesh.wire.transport, fluxmesh.storage.keys"
    )
    assert not loaded & (HEAVY | {"asyncio", "click", "rich"})
    loaded = loaded_after("import fluxmesh.wire.transport.inproc")
    assert "asyncio" in loaded and not loaded & HEAVY


def test_an_agent_never_loads_mlx() -> None:
    loaded = loaded_after(
        "import fluxmesh_agent.process, fluxmesh_agent.cli, fluxmesh.wire.transport.listener"
    )
    assert loaded & HEAVY == {"zmq"}
    assert "asyncio" in loaded


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
        ["serve", "--help"],
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
    assert not loaded & {"starlette", "uvicorn"}
    assert "click" in loaded


def test_a_class_name_stands_once_in_the_tree() -> None:
    """Also in tests and tools: a name that is searched for is found where it is defined."""
    places: dict[str, list[str]] = {}
    for folder in ("fluxmesh", "agent", "coordinator", "tools", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}")
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
