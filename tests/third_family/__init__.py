"""A family that fluxmesh does not have: all that it takes to add one stands here.

Patchwork's shape is unlike FLUX's on purpose: no vocabulary (a prompt is its bytes), one kind of
block under names of its own, no modulator, a small autoencoder without convolutions, folders that
are called otherwise. `row.py` puts its one row into the registry of every Python that has
`installed/` on its path.
"""
