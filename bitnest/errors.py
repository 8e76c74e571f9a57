"""The errors a user can cause, each saying what is wrong, where, and what to do about it.

Every error a person can mend is a `BitnestError`; the command line prints its three parts and exits
with status 2. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from importlib.util import find_spec


class BitnestError(Exception):
    """A mistake in the input, found before or while working.

    what: the rule that was broken, with the offending value.
    where: the file, tensor, option or rule it was found in.
    hint: what the user can do next, as a sentence or a command.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class CheckpointError(BitnestError):
    """The model directory is not a readable checkpoint."""


class UnsupportedModel(BitnestError):
    """The architecture cannot be handled; the message says which part of it and why."""


class FormatError(BitnestError):
    """An impossible number format, or one that does not fit the weight it was asked for."""


class RecipeError(BitnestError):
    """A contradiction in what was asked: a rule that matches nothing, options at odds."""


class PlanError(BitnestError):
    """A plan or recipe file that is broken; `where` holds the line."""


class DataError(BitnestError):
    """Calibration or evaluation text that is missing, unreadable or too short."""


class ArtifactError(BitnestError):
    """A compressed directory that is incomplete, damaged or of another version."""


class StatisticsError(BitnestError):
    """Statistics that are incomplete, damaged, or of something else than they are used for."""


class TargetError(BitnestError):
    """The named engine cannot run what it would be given."""


class MissingExtra(BitnestError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> None:
    """Raise `MissingExtra` naming the command to type when `module` cannot be imported.

    Raises:
        MissingExtra: `module` is not installed.
    """
    if find_spec(module) is None:
        raise MissingExtra(
            f"this needs the Python package '{module}', which is not installed",
            hint=f"pip install 'bitnest[{extra}]'",
        )
