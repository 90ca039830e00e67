"""Pictures on the mesh that is up, or on this machine alone: python examples/mesh.py [MODEL].

A program sees a job as a stream of events: the plan, each step with the host that made it, each
picture as soon as it is ready. Closing the stream cancels the job within a step.
"""

import sys

import numpy as np
from PIL import Image

from fluxmesh import Mesh
from fluxmesh.events import Picture, Planned, Step
from fluxmesh.request import GenerateRequest

model = sys.argv[1] if len(sys.argv) > 1 else "tiny"
request = GenerateRequest(
    "a red apple on a yellow background", seed=7, model=model, n_images=2, height=64, width=64
)

pictures = {}
with Mesh.connect() as mesh:
    for event in mesh.generate(request):
        match event:
            case Planned():
                print(f"{event.placement} on hosts {event.hosts}: {event.reason}")
            case Step():
                print(f"image {event.image}: step {event.step} of {event.steps}, host {event.host}")
            case Picture():
                pictures[event.image] = event.pixels

Image.fromarray(np.hstack([pictures[k] for k in sorted(pictures)])).save("mesh.png")
print("wrote mesh.png")
