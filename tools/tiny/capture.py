"""Runs a training step as one CUDA graph a shape.

The models are so small that launching their kernels one by one takes longer than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[..., torch.Tensor]


class Captured:
    """Calls `step(**tensors)`, on CUDA by replaying the graph of the tensors' shapes.

    The step must do everything on the device, its optimizer included, and return one tensor.
    """

    def __init__(self, step: Step, enabled: bool) -> None:
        self.step = step
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, dict, torch.Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if enabled else None

    def __call__(self, **tensors: torch.Tensor) -> torch.Tensor:
        if self.pool is None:
            return self.step(**tensors)
        key = tuple(tensor.shape for tensor in tensors.values())
        if key not in self.graphs:
            self.graphs[key] = self._capture(tensors)
        graph, inputs, output = self.graphs[key]
        for name, tensor in tensors.items():
            inputs[name].copy_(tensor)
        graph.replay()
        return output.clone()

    def _capture(
        self, tensors: dict[str, torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, dict, torch.Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # real steps, which let cuBLAS and the compiler settle
                self.step(**tensors)
        torch.cuda.current_stream().wait_stream(side)
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.step(**inputs)
        return graph, inputs, output
