"""Training: LoRA and QLoRA on the transformer, the same bytes on one host and on many.

A run walks forward through the modules:

- what is asked: `request.py`; what is told: `events.py`
- `data/`: pictures and captions in, encoded once and kept
- which of them when: `plan.py`, `micro_batches.py` (what micro-batch n is), `rng.py` (randomness)
- `compute/`: one host's work: loss and gradient, sums without rounding, the update
- the run: `run.py` (the loop), `checkpoint.py` (what a resume needs), `local_executor.py` (a run in
  this process), `worker.py` (an engine's part of a run on a mesh)

Only `compute/`, `data/encoding.py`, `local_executor.py` and `worker.py` import mlx.
"""
