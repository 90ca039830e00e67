"""Training: LoRA and QLoRA on the transformer, the same bytes on one host and on many.

A run walks forward through the modules:

- what is asked: `request.py`; what is told: `events.py`
- pictures and captions in: `dataset.py`, `bucketing.py`, `encode_units.py`, `feature_cache.py`, `encoding.py`
- which of them when: `plan.py`, `sampling.py` (what micro-batch n is), `rng.py` (randomness)
- one host's work: `parameter_vector.py` and `adapters.py` (the weights that are trained), `loss.py` (loss and
  gradient), `exact_sum.py` (sums without rounding), `optimizer.py`, `lr_schedule.py`, `learner.py`
- the run: `run.py` (the loop), `checkpoint.py` (what a resume needs), `local_executor.py` (a run in this
  process), `messages.py` and `worker.py` (an engine's part of a run on a mesh)

Only adapters, encoding, exact, learner, optimizer, step, trainer and worker import mlx.
"""
