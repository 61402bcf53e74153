"""Command lines read into a dataclass that has one field per option, and every problem told at once.

argparse stops at the first wrong value; here it only shows the help. Nothing here imports torch: `--help` and wrong
arguments are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from charseq2seq import __version__
from charseq2seq.errors import TOKEN, list_problems


class Kind(NamedTuple):
    """The values that an option takes: their name in `--help`, and text -> value, or a ValueError saying what fits."""

    metavar: str
    convert: Callable[[str], Any] = str


@dataclass(frozen=True)
class Option:
    """What is known of an option; its name is that of the dataclass field, and with two dashes the flag."""

    kind: Kind
    help: str  # the default is added unless it is told here
    default: Any = None  # None: no value, or one that other options decide
    group: str = "options"  # its heading in --help
    modes: tuple[str, ...] = ()  # of the program to which it belongs; none: all
    needs: str = ""  # another option, without which this one does nothing
    excludes: str = ""  # another option, which cannot be given together with this one
    without_value: Any = None  # its value where the flag is given without one; None: it needs one
    recorded: bool = False  # whether a checkpoint's `training_args` tell it
    changes_weights: bool = False  # whether a run with another value is another run, which no resume state continues


def option(kind: Kind, help: str, default: Any = None, **more: Any) -> Any:  # noqa: A002 (as argparse calls it)
    """A dataclass field that is an option; the arguments are those of `Option`."""
    row = Option(kind, help, False if kind is SWITCH else default, **more)
    return field(default=row.default, metadata={"option": row})


class Options:
    """A dataclass whose fields are options. One named `mode` says which of the others may be given."""

    @classmethod
    def rows(cls) -> dict[str, Option]:
        """The options by name, in order."""
        own: Any = cls  # a dataclass
        return {one.name: one.metadata["option"] for one in fields(own) if "option" in one.metadata}

    def contradictions(self) -> Iterable[str]:
        """The problems that no single option has."""
        return ()


T = TypeVar("T", bound=Options)


def read_options(kind: type[T], argv: Sequence[str] | None, description: str | None = None) -> T:
    """Read words, or those of the program, into a dataclass; wrong ones end it with status 2 and all that is wrong."""
    rows = kind.rows()
    parser = _parser(rows, description)
    given, unknown, problems = _split(sys.argv[1:] if argv is None else argv, rows)
    parser.parse_args([word for word in unknown if word in ("-h", "--help", "--version")])  # they end it here
    problems += _unrecognized(unknown, rows)
    for name, text in given.items():
        if isinstance(text, str):
            try:
                given[name] = rows[name].kind.convert(text)
            except ValueError as error:
                given[name] = None
                problems.append(f"--{name} must be {error}, not {text!r}")
    read = kind(**given)
    if problems := [*problems, *_misplaced(given, rows, read), *read.contradictions()]:
        parser.error(TOKEN.sub("…", list_problems(problems)))
    return read


def _split(words: Sequence[str], rows: dict[str, Option]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The given options with their values, the unknown words, and the problems.

    A value may begin with - or @, which argparse does not allow. Elsewhere `@nightly.args` stands for the words of a
    file, in which they stand as in a shell.
    """
    given: dict[str, Any] = {}
    unknown: list[str] = []
    problems: list[str] = []
    flags = {f"--{name}": name for name in rows}
    files, left = set[str](), list(reversed(words))
    while left:
        word = left.pop()
        flag, equals, value = word.partition("=")
        if word.startswith("@"):
            left += reversed(_words_of(word[1:], problems)) if word not in files else []
            files.add(word)  # read once: it may name itself
        elif flag not in flags:
            unknown.append(word)
        elif (name := flags[flag]) and rows[name].kind is SWITCH:
            given[name] = True
            problems += [f"{flag} takes no value"] * bool(equals)
        elif equals:
            given[name] = value
        elif rows[name].without_value is not None and (not left or left[-1].startswith(("-", "@"))):
            given[name] = rows[name].without_value
        elif left and left[-1] not in flags:
            given[name] = left.pop()
        else:
            problems.append(f"{flag} needs a value; one that is itself a flag is given as {flag}=VALUE")
    return given, unknown, problems


def _words_of(file: str, problems: list[str]) -> list[str]:
    """The words of an arguments file. What is wrong with it is told without them: one may be a token."""
    try:
        return shlex.split(Path(file).read_text(encoding="utf-8-sig"), comments=True)
    except OSError as error:
        problem = str(error.strerror)
    except ValueError as error:
        problem = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"{error}; close its quotes"
    problems.append(f"the arguments file {file} cannot be read: {problem}")
    return []


def _parser(rows: dict[str, Option], description: str | None) -> argparse.ArgumentParser:
    """An argparse parser that shows the help, the version and what is wrong; it reads nothing."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [@file]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"charseq2seq {__version__}")
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(row.group for row in rows.values())}
    for name, row in rows.items():
        value: dict[str, Any] = {"action": "store_true"} if row.kind is SWITCH else {"metavar": row.kind.metavar}
        if row.without_value is not None:
            value["nargs"] = "?"
        groups[row.group].add_argument(f"--{name}", help=_help(row), **value)
    return parser


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
    meant = " ".join(flag for found in near for flag in found)
    told = f"unrecognized arguments: {' '.join(words):.300}" + (f"; did you mean {meant}?" if meant else "")
    if any(map(os.path.isfile, words)):  # of `--data_path src/*.py`, all files but the first
        told += '; quote a pattern, so that the shell leaves it as it is: --data_path "src/*.py"'
    yield told


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


def checked(metavar: str, wanted: str, convert: Callable[[str], Any], fits: Callable[[Any], object]) -> Kind:
    """Values for which `fits` is true; `wanted` says in words which these are."""

    def convert_and_check(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if fits(value):
                return value
        raise ValueError(wanted)

    return Kind(metavar, convert_and_check)


SWITCH = Kind("", bool)  # on where the flag is given


def _path(text: str) -> Path:
    """A shell leaves the ~ of `--data_path=~/x` as it is."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path drops the ./ of ./~)


FILE = checked("FILE", "a path without NUL characters", _path, lambda path: "\0" not in str(path))


def filled(metavar: str) -> Kind:
    """Text, but not an empty one, as scripts pass a variable that is not set."""
    return checked(metavar, "something, or the flag left out", str, str.strip)


def whole(minimum: int, maximum: int = 2**31 - 1) -> Kind:
    """Whole numbers from `minimum` to `maximum`."""
    wanted = f"a whole number from {minimum:,} to {maximum:,}"
    return checked("N", wanted, int, lambda number: minimum <= number <= maximum)


def number(wanted: str, fits: Callable[[float], bool]) -> Kind:
    """Finite numbers for which `fits` is true."""
    return checked("X", wanted, float, lambda x: math.isfinite(x) and fits(x))


def one_of(*words: str) -> Kind:
    return checked("|".join(words), f"one of {', '.join(words)}", str, words.__contains__)
