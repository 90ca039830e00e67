"""`python -m fluxmesh_agent`: the same as `fluxmesh-agent`, where only the interpreter is known."""

from fluxmesh_agent.ending import Ending

Ending()  # before what takes time is loaded

from fluxmesh_agent.cli import main  # noqa: E402

main(prog_name="fluxmesh-agent")
