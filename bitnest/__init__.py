"""bitnest: compress large language models, prove what was lost, and serve them.

The verbs of the command line are functions here: `compress`, `load`, `evaluate`, `export`.
"""

from __future__ import annotations

__version__ = "0.1.0"
