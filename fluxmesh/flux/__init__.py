"""FLUX.1 in MLX: models, weights, adapters, pipeline. Knows no sockets and no command line."""
