"""The edges of a picture, as FLUX.1 Canny was trained to follow them.

OpenCV finds them (Canny 1986, "A computational approach to edge detection"): no dependency, for its
40 MB serve this alone. Other detectors' thresholds mean other edges. Beside `files.py`.
Source: black-forest-labs/flux `src/flux/modules/image_embedders.py` (`CannyImageEncoder`).
"""

from __future__ import annotations

import importlib

import numpy as np

from fluxmesh.errors import UsageError

WEAK, STRONG = 50, 200  # steps of brightness from which on a pixel may be, and is, an edge


def edges_of(picture: np.ndarray) -> np.ndarray:
    """A picture's edges in white on black; both uint8 [H, W, 3].

    Raises `UsageError` where OpenCV is not installed.
    """
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError:
        raise UsageError.about(
            "control_from",
            "takes OpenCV to find edges",
            "`pip install opencv-python-headless`, or give a ready map as `control`",
        ) from None
    edges: np.ndarray = cv2.Canny(np.ascontiguousarray(picture), WEAK, STRONG)
    return np.repeat(edges[:, :, None], 3, axis=2)
