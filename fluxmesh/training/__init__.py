"""Training: LoRA and QLoRA on the transformer, the same bytes on one host and on many.

A run walks forward through the modules: `request.py` (what is asked), `dataset.py`, `crops.py`
(pictures and captions in), `sampling.py` (what micro-batch n is), `cache.py`, `encoding.py`
(latents and text features), `adapters.py` (the weights that are trained), `step.py`, `exact.py`
(loss, gradients, their sum without rounding), `optimizer.py`, `checkpoint.py`, `trainer.py` (the
loop). Only encoding, adapters, step, exact, optimizer and trainer import mlx.
"""
