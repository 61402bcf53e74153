"""Command lines that report every problem at once.

argparse stops at the first wrong value. Here a wrong value is noted, parsing goes on, and `parse` ends with all of
them in one message and status 2. Nothing here imports torch: `--help` and argument errors answer at once.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from charseq2seq.errors import TOKEN

Converter = Callable[[str], Any]
# argparse knows groups and exclusive groups by one private base class; both have add_argument.
Group = Any


class CommandLine(argparse.ArgumentParser):
    """A parser whose values are checked together; arguments can also come from a file, `@nightly.args`.

    In such a file words stand as in a shell, any number a line, and `#` begins a comment.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            fromfile_prefix_chars="@",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # an abbreviation that works today is ambiguous tomorrow
            **options,
        )
        self.problems: list[str] = []

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of one line of an arguments file."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:  # the line is not shown: it may hold a token
            self.error(f"a line of the arguments file cannot be read: {error}; close its quotes")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but for an arguments file that names itself."""
        try:
            return super().parse_known_args(args, namespace)
        except RecursionError:
            self.error("an arguments file names itself, or files name each other, without end")

    def error(self, message: str) -> NoReturn:
        """End the program with status 2, with every problem found so far in one message."""
        problems = [message, *self.problems]
        if len(problems) > 1:
            message = f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
        super().error(TOKEN.sub("…", message))

    def add(self, group: Group, flag: str, convert: Converter, **options: Any) -> None:
        """Add an argument to a group; `convert` raises ValueError with what it wants instead.

        Args:
            group: of this parser.
            flag: with its dashes.
            convert: text -> value.
            options: as for `add_argument`.
        """

        def noted(text: str) -> Any:
            try:
                return convert(text)
            except ValueError as error:
                self.problems.append(f"{flag} must be {error}, not {text!r}")
                return None

        group.add_argument(flag, type=noted, **options)

    def refuse(self, problems: Iterable[str] = ()) -> None:
        """End the program with status 2 if there is any problem, all of them in one message."""
        self.problems += problems
        if self.problems:
            self.error(self.problems.pop(0))


def whole(minimum: int, maximum: int = 2**31 - 1) -> Converter:
    """Converts to a whole number from `minimum` to `maximum`."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not minimum <= number <= maximum:
            raise ValueError(f"a whole number from {minimum:,} to {maximum:,}")
        return number

    return convert


def number(minimum: float, maximum: float, *, above: bool = False, below: bool = False) -> Converter:
    """Converts to a finite number from `minimum` to `maximum`.

    Args:
        minimum, maximum: the limits.
        above, below: whether the minimum, the maximum itself is excluded.
    """

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (value > minimum if above else value >= minimum) and (value < maximum if below else value <= maximum)
        if not inside or not math.isfinite(value):
            low = f"above {minimum:g}" if above else f"at least {minimum:g}"
            high = "" if maximum == math.inf else f" and below {maximum:g}" if below else f" and at most {maximum:g}"
            raise ValueError(f"{'a finite' if maximum == math.inf else 'a'} number {low}{high}")
        return value

    return convert


def one_of(*names: str) -> Converter:
    """Converts to one of these words."""

    def convert(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return convert
