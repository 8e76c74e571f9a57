"""Where a long run reports to."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where a long run reports to."""

    def phase(self, name: str, total: int) -> None:
        """A stage begins that consists of `total` steps."""

    def step(self, amount: int = 1, note: str = "") -> None:
        """Some of the stage's steps are done."""


class Silent:
    """A progress that says nothing."""

    def phase(self, name: str, total: int) -> None:
        """Ignore."""

    def step(self, amount: int = 1, note: str = "") -> None:
        """Ignore."""
