"""The embedded demo: a small, truly trained Qwen3-MoE and public-domain text to go with it.

What: paths of a 3.6M-parameter mixture of experts (4 layers, 8 experts each, top-2) that loads
with transformers, and of two disjoint texts, one to calibrate on and one to evaluate on. They let
every command run and be checked offline, in seconds, on one core. `README.md` beside this file
has the sources of the text and the measured numbers; `train.py` makes all of it again.

What it leaves out: nothing here imports torch or reads a file; the functions only say where.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """Directory of the checkpoint and its tokenizer, as `from_pretrained` wants it."""
    return _HERE / "model"


def calibration_text() -> Path:
    """Mixed-domain text from books the model was trained on; for statistics, never for scores."""
    return _HERE / "text" / "calibration.txt"


def evaluation_text() -> Path:
    """Mixed-domain text from books held out of training; for scores, never for statistics."""
    return _HERE / "text" / "evaluation.txt"
