"""`--mode generate --interactive`: lines from a pipe, and a person at a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from charseq2seq.errors import TerminatedError
from charseq2seq.interactive import _lines
from tests.train_client import ROOT, Trainee
from tests.warm_client import WarmClient

GENERATE = ["--mode", "generate", "--num_chars", "20"]


def test_each_line_is_answered(client: WarmClient, owner: Trainee) -> None:
    lines = "ALL:", "", "/seed 7", "/again", "/temperature 0", "/temperature -1", "/top_k", "/sing", "sù", "/help"
    (owner.home / "lines.txt").write_bytes("\n".join(lines).encode() + b"\nAL\xffL")
    done = client.run(owner.home, *GENERATE, "--interactive", "--seed", "5", stdin="lines.txt")
    assert done.code == 0, done.log

    def text(seed: int, prompt: str) -> str:
        return client.run(owner.home, *GENERATE, "--seed", str(seed), "--prompt", prompt).out

    first = text(5, "ALL:")
    longer = text(6, first[:-1])
    assert done.out == first + longer.removeprefix(first[:-1]) + text(7, first[:-1])
    for said in (
        "seed: 7",
        "temperature: 0.0",
        "/temperature must be a finite number at least 0, not '-1'",
        "top_k: None",
        "there is no command /sing; /help lists them.",
        "'ù' (U+00F9 LATIN SMALL LETTER U WITH GRAVE)",
        "U+FFFD",
    ):
        assert said in done.log
    assert done.log.count("Ctrl-D ends the program") == 2


def test_it_goes_with_one_text_at_a_time(client: WarmClient, owner: Trainee) -> None:
    for more in (["--json"], ["--num_samples", "2"]):
        done = client.run(owner.home, *GENERATE, "--interactive", *more)
        assert done.code == 2 and "--interactive writes one text at a time" in done.log


def test_ctrl_c_discards_a_line_and_a_termination_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    events: Iterator[type[BaseException] | str] = iter([KeyboardInterrupt, "ALL:", EOFError, "no", TerminatedError])

    def read(prompt: str) -> str:
        event = next(events)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", read)
    assert list(_lines()) == ["ALL:"]
    with pytest.raises(TerminatedError):
        list(_lines())


class Terminal:
    """A person at a terminal with the program.

    Args:
        owner: whose model.
        kind: of the terminal.
    """

    def __init__(self, owner: Trainee, kind: str) -> None:
        self.unread = ""
        self.keys, screen = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_transformer.py"), *GENERATE, "--interactive", "--num_chars", "1000000"],
            env=owner.environment(TERM=kind),
            cwd=owner.home,
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (no lock); Ctrl-C reaches it
        )
        os.close(screen)

    def see(self, words: str) -> str:
        """What is shown from where this was last asked up to these words."""
        while words not in self.unread:
            self.unread += os.read(self.keys, 4096).decode(errors="replace")
        shown, _, self.unread = self.unread.partition(words)
        return shown + words

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.keys, keys.encode())


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_a_person_stops_a_text_edits_a_line_and_leaves(kind: str, owner: Trainee) -> None:
    terminal = Terminal(owner, kind)
    shown = terminal.see("> ")
    terminal.type("ALX\x7fL:\n")  # a backspace
    shown += terminal.see("\nALL:") + terminal.see("\n")
    terminal.type("\x03")
    shown += terminal.see("stopped; Enter goes on, Ctrl-D ends the program.") + terminal.see("> ")
    terminal.type("/num_chars 3\n")
    shown += terminal.see("num_chars: 3") + terminal.see("> ")
    terminal.type("\x10\x10\n")  # twice Ctrl-P: the line before the last
    shown += terminal.see("\nALL:") + terminal.see("> ")
    terminal.type("\x04")
    assert terminal.process.wait() == 0, shown
    os.close(terminal.keys)
    assert kind != "dumb" or "\x1b" not in shown, "no control characters where the terminal has none"
