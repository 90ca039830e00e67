"""`python -m fluxmesh_coordinator` is `fluxmesh`."""

from fluxmesh_coordinator.cli import main

if __name__ == "__main__":
    main()
