"""Where GPU kernels run in tests: on a GPU if there is one, else interpreted on the CPU.

The interpreter is chosen when a kernel is decorated, and Triton's own library when triton is
imported. So `conftest.py` imports this module before anything that could import triton; test files
take DEVICE from it. A TRITON_INTERPRET that is set already stays.
"""

from __future__ import annotations

import os
from pathlib import Path

HAS_GPU = Path("/dev/nvidiactl").exists()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
