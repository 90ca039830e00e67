"""Programs that measure fluxmesh, beside its peers where there are any; `docs/performance.md`."""
