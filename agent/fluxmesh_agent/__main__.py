"""`python -m fluxmesh_agent`: the same as `fluxmesh-agent`, where only the interpreter is known."""

from fluxmesh_agent.cli import main

main(prog_name="fluxmesh-agent")
