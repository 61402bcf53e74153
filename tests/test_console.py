"""What a program says and how it ends, whatever terminals, pipes and cron have done to its streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from charseq2seq.errors import ending_of
from tests.push_client import ROOT

HEAD = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from charseq2seq.console import *
from charseq2seq.errors import *

def main(argv):
"""
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
SPEAK = "log('begun\\n\\nwith 莎'); write_result('text\\n'); log('done'); return 0"


def start(body: str, redirection: str = "", first: str = "", **environment: str) -> subprocess.Popen[bytes]:
    """An entry point whose main function has this body, run by a shell that first does something else."""
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    script = f"{HEAD}{lines}\nsys.exit(run(main))".encode("ascii", "backslashreplace")
    return subprocess.Popen(
        ["sh", "-c", f'{first} "$0" -c "$1" {redirection}', sys.executable, script],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(body: str, redirection: str = "", **environment: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of an entry point."""
    process = start(body, redirection, **environment)
    out, log = process.communicate()
    return process.returncode, out.decode(), log.decode()


def test_a_log_has_a_time_before_every_line_and_stdout_only_the_result() -> None:
    status, out, log = ended(SPEAK)
    assert (status, out) == (0, "text\n")
    assert re.fullmatch(f"{TIME} begun\n{TIME}\n{TIME} with 莎\n{TIME} done\n", log), log
    assert not re.search("[\x00-\x09\x0b-\x1f]", log), "no control characters"


@pytest.mark.parametrize(
    ("body", "status", "log"),
    [
        ("return 0", 0, ""),
        ("raise SuiteError('what, where', ExitCode.BAD_DATA)", 65, f"{TIME} error: what, where\n"),
        ("raise SuiteError('❌ no', ExitCode.NO_PERMISSION)", 77, f"{TIME} ❌ no\n"),
        ("raise KeyboardInterrupt", 130, f"{TIME} interrupted.\n"),
        ("os.kill(os.getpid(), signal.SIGINT)\nreturn 0", 130, f"{TIME} interrupted.\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)\nreturn 0", 143, f"{TIME} terminated.\n"),
        ("raise MemoryError", 71, f"{TIME} error: out of memory; use a smaller [^\n]*\n"),
        ("raise BrokenPipeError", 141, ""),
        ("raise ValueError('a defect')", 1, r"Traceback (?s:.*)ValueError: a defect\n"),
    ],
)
def test_every_end_has_its_status(body: str, status: int, log: str) -> None:
    code, out, said = ended(body)
    assert (code, out) == (status, "") and re.fullmatch(log, said)


def test_ctrl_c_ends_no_program_that_a_script_has_put_into_the_background() -> None:
    assert ended("os.kill(os.getpid(), signal.SIGINT)\nreturn 0", first="trap '' INT;") == (0, "", "")


def test_a_tensor_that_does_not_fit_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    code, message, _ = ending_of(caught.value)
    assert code == 71 and message.startswith("error: out of memory; use a smaller")


def test_a_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    status, out, log = ended("return 0", first=f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone;")
    assert (status, out) == (66, "")
    assert re.fullmatch(f"{TIME} error: the folder in which this was started is gone .*; change to another.*\n", log)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_a_log_that_cannot_be_written_stops_nothing(redirection: str) -> None:
    assert ended(SPEAK, redirection) == (0, "text\n", "")
    assert ended("raise SuiteError('no', ExitCode.BAD_DATA)", redirection) == (65, "", "")


def test_a_closed_stdout_is_nobody_listening() -> None:
    status, out, log = ended(SPEAK, ">&-")
    assert (status, out) == (0, "")
    assert log.endswith("done\n")


def test_a_full_stdout_is_one_sentence() -> None:
    for length in (1, 100_000):
        status, _, log = ended(f"write_result('x' * {length}); return 0", ">/dev/full")
        assert status == 74
        said = r"error: the result cannot be written to stdout \(No space left on device\); send it somewhere else"
        assert re.fullmatch(f"{TIME} {said} and run again.\n", log), log


def test_a_reader_that_went_away_ends_the_program_quietly() -> None:
    process = start("while True: write_result('text\\n')")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(5) == b"text\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_a_reader_of_the_log_that_went_away_ends_nothing() -> None:
    process = start("sys.stdin.read()\nfor _ in range(100_000): log('line')\nwrite_result('text\\n'); return 0")
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout is not None
    assert process.stdout.read() == b"text\n"
    assert process.wait() == 0
    process.stdout.close()


def test_text_is_utf8_in_every_locale() -> None:
    ascii_only = {"LC_ALL": "POSIX", "LANG": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    speak = "log('莎'); write_result('é莎🎭 \\ud800\\n'); return 0"
    status, out, log = ended(speak, **ascii_only)
    assert (status, out) == (0, "é莎🎭 ?\n")
    assert log.endswith(" 莎\n")


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_number_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    body = f"""
file = open({str(tmp_path / "model.pth")!r}, "wb")
file.write(b"model"); file.flush()
for descriptor in (1, 2): os.write(descriptor, b"a warning of a library")
return 0
"""
    assert ended(body, closed)[0] == 0
    assert (tmp_path / "model.pth").read_bytes() == b"model"


# --- the log file


def test_a_log_file_has_every_line_with_its_time(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    for _ in range(2):  # it is continued
        status, out, log = ended(f"log_to_file(Path({str(path)!r}))\n{SPEAK}")
        assert (status, out) == (0, "text\n")
        assert path.read_text().endswith(log)
    assert len(path.read_text().splitlines()) == 8
    assert ended(f"log_to_file(Path({str(path)!r}))\n{SPEAK}", "2>&-")[0] == 0
    assert len(path.read_text().splitlines()) == 12, "also where stderr is closed"
    assert ended(f"log_to_file(Path('/dev/full'))\n{SPEAK}")[:2] == (0, "text\n"), "one that fills up stops nothing"


def test_a_log_file_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    status, _, _ = ended(f"log_to_file(Path({str(path)!r}))\nfor i in range(45): log('x' * 999_900)\nreturn 0", "2>&-")
    assert status == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"run.log", "run.log.1", "run.log.2", "run.log.3"}
    assert all(entry.stat().st_size <= 10_000_000 for entry in tmp_path.iterdir())


def test_a_signal_while_a_line_is_written_does_no_harm() -> None:
    body = """
signal.signal(signal.SIGALRM, lambda *_: log("from the handler"))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for i in range(20_000): log(f"line {i}")
signal.setitimer(signal.ITIMER_REAL, 0)
return 0
"""
    status, _, log = ended(body)
    assert status == 0
    assert "Traceback" not in log
    assert "from the handler" in log
    assert "line 19999" in log
