"""`--mode generate --interactive`: a person types the beginning of a text, and the model goes on.

What is typed is not stored: the line editor forgets it when the program ends.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

from charseq2seq.console import log, write_result
from charseq2seq.errors import SuiteError, TerminatedError
from charseq2seq.generation import Sampling, TextGenerator, known_prompt
from charseq2seq.options import OPTIONS, Settings

_HELP = """Type the beginning of a text; Enter alone goes on with the last text.
/again            the last beginning once more, with the next seed
/temperature 0.7  another temperature; alone, it says which; so do /num_chars, /top_k, /top_p, /seed and /unknown
/help             these lines
Ctrl-C stops a text, Ctrl-D ends the program."""
_SETTINGS = ("/temperature", "/num_chars", "/top_k", "/top_p", "/seed", "/unknown")


class Conversation:
    """A person's session: the settings of the next text, and the last text with its beginning."""

    def __init__(self, settings: Settings, generator: TextGenerator) -> None:
        self.settings, self.generator = settings, generator
        self.beginning = self.text = ""

    def run(self, prompt: str) -> None:
        """Continue the prompt, if there is one, and answer each line until stdin ends."""
        log(_HELP)
        if prompt:
            self.write(prompt)
        for line in _lines():
            self.answer(line)

    def answer(self, line: str) -> None:
        """Obey a command, or write a text."""
        command, _, value = line.strip().partition(" ")
        if command == "/help":
            log(_HELP)
        elif command == "/again":
            self.write(self.beginning)
        elif command in _SETTINGS:
            self.change(command[1:], value.strip())
        elif command.startswith("/"):
            log(f"there is no command {command:.40}; /help lists them.")
        elif not line:
            self.write(self.text, echo=False)  # it is on the screen already
        else:
            try:
                prompt = known_prompt(self.generator.vocabulary, line, self.settings.unknown or "error")
            except SuiteError as error:
                log(str(error))
            else:
                self.write(prompt)

    def change(self, name: str, value: str) -> None:
        """Set an option, unless the value is empty, and say which value it has."""
        try:
            changed = {name: OPTIONS[name].kind.convert(value)} if value else {}
        except ValueError as error:
            log(f"/{name} must be {error}, not {value!r}")
        else:
            self.settings = replace(self.settings, **changed)
            log(f"{name}: {getattr(self.settings, name)}")

    def write(self, beginning: str, *, echo: bool = True) -> None:
        """Continue a text until it is long enough or Ctrl-C stops it. Every text has another seed."""
        asked = self.settings
        self.settings = replace(asked, seed=asked.seed + 1)
        self.beginning = self.text = beginning
        write_result(beginning if echo else "")
        sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.seed)
        try:
            for character in self.generator.stream(beginning, asked.num_chars, sampling):
                self.text += character
                write_result(character)
        except TerminatedError:
            raise
        except KeyboardInterrupt:
            log("stopped; Enter goes on, Ctrl-D ends the program.")
        write_result("\n")


def _lines() -> Iterator[str]:
    """The lines of stdin. At a terminal they can be edited, earlier ones are kept, and Ctrl-C discards one."""
    at_terminal = os.isatty(0) and os.isatty(1)
    if at_terminal:
        with contextlib.suppress(ImportError):  # Windows edits lines itself
            importlib.import_module("readline")
    while sys.stdin is not None:
        try:
            line = input("> " if at_terminal else "")
        except (EOFError, OSError):  # also where the terminal is gone
            return
        except TerminatedError:
            raise
        except KeyboardInterrupt:
            write_result("\n")
        else:
            yield line
