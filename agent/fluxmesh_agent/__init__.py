"""The agent: the long-lived process on a host of the mesh. It never imports mlx."""
