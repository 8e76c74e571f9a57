"""hooks: objects that watch a module while they are entered."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Hooked:
    """A context manager that undoes, on leaving, what was noted in `_undo` on entering."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()
