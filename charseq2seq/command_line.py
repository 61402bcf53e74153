"""Command lines read into a dataclass that has one field per option, and every problem told at once.

argparse stops at the first wrong value. Here a wrong value is collected and reading goes on; `read_options` ends with
all of them in one message and status 2. Nothing here imports torch: `--help` and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from charseq2seq import __version__
from charseq2seq.errors import TOKEN as LOOKS_LIKE_A_TOKEN
from charseq2seq.errors import list_problems

T = TypeVar("T")


class Kind(NamedTuple):
    """What values an option takes.

    Attributes:
        metavar: what stands for the value in `--help`.
        convert: text -> value; raises ValueError with what it wants instead.
    """

    metavar: str
    convert: Callable[[str], Any]


class PerDevice(NamedTuple):
    """A default that depends on the device."""

    cpu: Any
    gpu: Any

    def __str__(self) -> str:
        return f"{self.cpu} on a CPU, {self.gpu} on a GPU"


@dataclass(frozen=True)
class Option:
    """What is known of an option; its name is that of the dataclass field, and with two dashes the flag.

    Attributes:
        kind: what values it takes.
        help: what it does; the default is added unless it is told here.
        default: its value where the flag is not given; None: no value, or one that other options decide.
        group: its heading in `--help`.
        modes: of the program to which it belongs; none: all.
        needs: another option, without which this one does nothing.
        excludes: another option, which cannot be given together with this one.
        without_value: its value where the flag is given without one; None: it needs one.
        recorded: whether a checkpoint's `training_args` tell it.
        changes_weights: whether a run with another value is another run, which a resume state must not continue.
        in_command: whether the model card shows it in the command that trains such a model.
    """

    kind: Kind
    help: str
    default: Any = None
    group: str = "options"
    modes: tuple[str, ...] = ()
    needs: str = ""
    excludes: str = ""
    without_value: Any = None
    recorded: bool = False
    changes_weights: bool = False
    in_command: bool = False


def option(kind: Kind, help: str, default: Any = None, **more: Any) -> Any:  # noqa: A002 (as argparse calls it)
    """A dataclass field that is an option; the arguments are those of `Option`."""
    row = Option(kind, help, False if kind is SWITCH else default, **more)
    return field(default=None if isinstance(default, PerDevice) else row.default, metadata={"option": row})


def options_of(kind: type) -> dict[str, Option]:
    """The options of a dataclass by name, in order."""
    return {one.name: one.metadata["option"] for one in fields(kind) if "option" in one.metadata}


def read_options(
    kind: type[T], argv: Sequence[str] | None, description: str | None, check: Callable[[T], Iterable[str]]
) -> T:
    """Read a command line; a wrong one ends the program with status 2 and everything that is wrong with it.

    Args:
        kind: a dataclass whose fields are options. One named `mode` says which of the others may be given.
        argv: the words; None: those of the program.
        description: of the program, for `--help`.
        check: finds the problems that no single option has.
    """
    rows = options_of(kind)
    parser = _Parser(rows, description)
    namespace, unknown = parser.parse_known_args(argv)
    given = vars(namespace)
    read = kind(**given)
    problems = [*_unrecognized(unknown, rows), *parser.problems, *_misplaced(given, rows, read), *check(read)]
    if problems:
        parser.problems.clear()
        parser.error(list_problems(problems))
    return read


class _Parser(argparse.ArgumentParser):
    """A parser that goes on after a wrong value; arguments can also come from a file, `@nightly.args`.

    In such a file words stand as in a shell, any number a line, and `#` begins a comment.
    """

    def __init__(self, rows: dict[str, Option], description: str | None) -> None:
        super().__init__(
            usage="%(prog)s [options] [@file]",
            description=description,
            fromfile_prefix_chars="@",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,  # so that what was given can be told from what was not
            allow_abbrev=False,  # an abbreviation that works today is ambiguous tomorrow
        )
        self.problems: list[str] = []
        self.add_argument("--version", action="version", version=f"charseq2seq {__version__}")
        groups = {title: self.add_argument_group(title) for title in dict.fromkeys(row.group for row in rows.values())}
        for name, row in rows.items():
            value: dict[str, Any] = {"type": self._collecting(name, row.kind), "metavar": row.kind.metavar}
            if row.kind is SWITCH:
                value = {"action": "store_true"}
            elif row.without_value is not None:
                value |= {"nargs": "?", "const": row.without_value}
            groups[row.group].add_argument(f"--{name}", help=_help(row), **value)

    def _collecting(self, name: str, kind: Kind) -> Callable[[str], Any]:
        """The conversion of an option's value; where it fails, the problem is kept and reading goes on."""

        def convert(text: str) -> Any:
            try:
                return kind.convert(text)
            except ValueError as error:
                self.problems.append(f"--{name} must be {error}, not {text!r}")
                return None

        return convert

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of one line of an arguments file."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:  # the line is not shown: it may hold a token
            self.error(f"a line of the arguments file cannot be read: {error}; close its quotes")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, except that an arguments file that names itself is told."""
        try:
            return super().parse_known_args(args, namespace)
        except RecursionError:
            self.error("an arguments file names itself, or files name each other, without end")

    def error(self, message: str) -> NoReturn:
        """End the program with status 2, with every problem found so far in one message."""
        message = list_problems([message, *self.problems])
        super().error(LOOKS_LIKE_A_TOKEN.sub("…", message))


def _help(row: Option) -> str:
    told = row.default in (None, "") or row.kind is SWITCH or "default:" in row.help
    default = f"{row.default:g}" if isinstance(row.default, float) else row.default
    return row.help if told else f"{row.help} (default: {default})"


def _unrecognized(words: list[str], rows: dict[str, Option]) -> Iterator[str]:
    if not words:
        return
    import difflib

    flags = [f"--{name}" for name in rows]
    near = [difflib.get_close_matches(word.partition("=")[0], flags, 1) for word in words if word.startswith("-")]
    meant = [flag for found in near for flag in found]
    yield f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {' '.join(meant)}?" if meant else "")


def _misplaced(given: dict[str, Any], rows: dict[str, Option], read: Any) -> Iterator[str]:
    """A problem for each option that does not go with the mode or with another option."""
    mode = getattr(read, "mode", None)  # None: there are no modes, or a mistyped one, which is a problem of its own
    for name, value in given.items():
        row = rows[name]
        if mode is not None and row.modes and mode not in row.modes:
            yield f"--{name} belongs to --mode {' and '.join(row.modes)}, not --mode {mode}"
        elif row.needs and not getattr(read, row.needs):
            yield f"--{name} needs --{row.needs}"
        if row.excludes and value and getattr(read, row.excludes):
            yield f"--{name} and --{row.excludes} exclude each other"


# --- kinds of values

SWITCH = Kind("", bool)  # on where the flag is given
TEXT, NAME, TOKEN, FILE = Kind("TEXT", str), Kind("NAME", str), Kind("TOKEN", str), Kind("FILE", Path)


def whole(minimum: int, maximum: int = 2**31 - 1) -> Kind:
    """Whole numbers from `minimum` to `maximum`."""

    def convert(text: str) -> int:
        with contextlib.suppress(ValueError):
            if minimum <= int(text) <= maximum:
                return int(text)
        raise ValueError(f"a whole number from {minimum:,} to {maximum:,}")

    return Kind("N", convert)


def number(
    minimum: float, maximum: float = math.inf, *, above: bool = False, below: bool = False, metavar: str = "X"
) -> Kind:
    """Finite numbers from `minimum` to `maximum`; `above` excludes the minimum itself, `below` the maximum."""

    def convert(text: str) -> float:
        value = math.nan
        with contextlib.suppress(ValueError):
            value = float(text)
        inside = (value > minimum if above else value >= minimum) and (value < maximum if below else value <= maximum)
        if inside and math.isfinite(value):
            return value
        low = f"above {minimum:g}" if above else f"at least {minimum:g}"
        high = "" if maximum == math.inf else f" and below {maximum:g}" if below else f" and at most {maximum:g}"
        raise ValueError(f"{'a finite' if maximum == math.inf else 'a'} number {low}{high}")

    return Kind(metavar, convert)


def one_of(*words: str) -> Kind:
    """One of these words."""

    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return Kind("|".join(words), convert)
