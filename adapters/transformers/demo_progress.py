"""What the demo says on standard error while it works: a line for each step, and in a terminal a bar below them."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

__all__ = ["Progress"]


class Progress:
    """Lines with the seconds since the start, whether or not anybody watches; use it in a ``with`` statement.

    Standard output stays the report's.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        # soft_wrap: a log keeps one line a step, whatever width is guessed for it
        self._console = Console(file=sys.stderr, soft_wrap=True, markup=False, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("questions answered", total=None)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(f"[{time.perf_counter() - self._begin:5.1f} s] {text}")

    def expect(self, questions: int) -> None:
        """How many questions there are in all, once that is known."""
        self._bar.update(self._task, total=questions)

    def advance(self) -> None:
        """One more question was answered and its answer checked."""
        self._bar.update(self._task, advance=1)
