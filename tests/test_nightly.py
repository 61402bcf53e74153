"""The nightly job of examples/nightly: its very command line, with the bare environment that cron gives."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from charseq2seq.checkpoint import load_resume_state
from charseq2seq.errors import ExitCode
from tests.hub.server import WRITE, HubServer
from tests.push_client import ALL_FILES
from tests.train_client import ROOT, TINY, tiny_text

NIGHTLY = ROOT / "examples" / "nightly"
REPO = "alice/my-shakespeare-transformer"


def crontab_line() -> tuple[list[str], str]:
    """The five fields of time of the crontab's one line, and its command."""
    text = (NIGHTLY / "crontab").read_text()
    (line,) = [line for line in text.splitlines() if line and not line.startswith("#")]
    *times, command = line.split(maxsplit=5)
    return times, command


class Machine:
    """A home with the suite in ~/charseq2seq, a stored login, and nights.

    Args:
        home: an empty folder.
        hub: where to push.
    """

    def __init__(self, home: Path, hub: HubServer) -> None:
        self.home = home
        self.suite = home / "charseq2seq"
        self.log = self.suite / "nightly.log"
        self.suite.mkdir()
        (self.suite / "train_transformer.py").symlink_to(ROOT / "train_transformer.py")
        (self.suite / ".venv").symlink_to(sys.prefix)
        shutil.copytree(NIGHTLY, self.suite / "examples" / "nightly")
        login = home / ".cache" / "huggingface" / "token"
        login.parent.mkdir(parents=True)
        login.write_text(WRITE)
        # What a person would put above the line in the crontab, to reach another Hub.
        self.above = {
            name: value for name, value in hub.environment(home).items() if name in ("HF_ENDPOINT", "NO_PROXY")
        }
        self.above |= {"HF_XET_DATA_XORB_COMPRESSION_POLICY": "none", "OMP_NUM_THREADS": "1"}
        (self.suite / "small.txt").write_text(tiny_text())
        self.edit("--data_path", "small.txt", *TINY, "--eval_interval", "20", "--log_interval", "1")

    def edit(self, *more: str) -> None:
        """Append to nightly.args."""
        with (self.suite / "examples" / "nightly" / "nightly.args").open("a") as file:
            file.write(" ".join(more) + "\n")

    def start(self) -> subprocess.Popen[str]:
        """Let the night begin."""
        _, command = crontab_line()
        bare = [f"HOME={self.home}", "PATH=/usr/bin:/bin", *(f"{name}={value}" for name, value in self.above.items())]
        return subprocess.Popen(
            ["/usr/bin/env", "-i", *bare, "/bin/sh", "-c", command],
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def night(self) -> str:
        """A whole night; returns what cron would mail."""
        mail, _ = self.start().communicate()
        return mail

    def reports(self) -> list[dict[str, Any]]:
        """The JSON line of every night so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
def test_three_nights(hub: HubServer, tmp_path: Path) -> None:
    machine = Machine(tmp_path, hub)
    machine.edit("--max_steps", "40")
    assert machine.night() == "", machine.log.read_text()
    (first,) = machine.reports()
    assert (first["outcome"], first["exit_code"], first["steps"]) == ("pushed", 0, 40)
    assert first["url"] == f"{hub.endpoint}/{REPO}"
    assert set(hub.repo(REPO).files()) - {".gitattributes"} == ALL_FILES
    published, model = hub.repo(REPO).head, (machine.suite / "nightly.pth").read_bytes()
    assert "token: from the stored login" in machine.log.read_text()

    kept = machine.log.read_bytes()
    machine.log.write_bytes(b"")  # logrotate's copytruncate
    machine.edit("--max_steps", "400")
    shell = machine.start()
    while " step 200 (" not in machine.log.read_text() and shell.poll() is None:
        time.sleep(0.01)
    (child,) = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)  # the machine is shut down
    mail, _ = shell.communicate()
    (second,) = machine.reports()
    assert (second["outcome"], second["exit_code"]) == ("stopped", ExitCode.TERMINATED), machine.log.read_text()
    assert "the same command continues this run" in mail, "cron mails the end of a night that was cut off"
    assert hub.repo(REPO).head == published and (machine.suite / "nightly.pth").read_bytes() == model
    stopped_at = load_resume_state(machine.suite / "nightly.resume.pth")["step"]
    assert 200 <= stopped_at < 400
    assert not machine.log.read_bytes().startswith((b"\0", kept[:100])), "it appends to what logrotate left"

    assert machine.night() == "", machine.log.read_text()
    third = machine.reports()[-1]
    assert (third["outcome"], third["exit_code"], third["steps"]) == ("pushed", 0, 400)
    assert f"resume: continuing the unfinished run at step {stopped_at}" in machine.log.read_text()
    assert hub.repo(REPO).head != published and (machine.suite / "nightly.pth").read_bytes() != model
    log = kept + machine.log.read_bytes()
    assert WRITE.encode() not in log and b"\x1b" not in log and b"\r" not in log


def test_a_night_without_rights_is_mailed_and_costs_no_training(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("GET", "whoami", status=401)
    machine = Machine(tmp_path, hub)
    mail = machine.night()
    assert "Push failed: HTTP 401 Unauthorized" in mail and '"exit_code": 77' in mail
    assert not (machine.suite / "nightly.pth").exists()


def test_cron_reads_the_line_as_it_is_meant() -> None:
    times, command = crontab_line()
    for field, last in zip(times, (59, 23, 31, 12, 7), strict=True):
        assert field == "*" or 0 <= int(field) <= last
    assert "%" not in command, "cron would make a line end of it"
    assert (NIGHTLY / "crontab").read_text().endswith("\n"), "cron ignores a last line that does not end"


def unit(kind: str) -> configparser.RawConfigParser:
    """A systemd unit."""
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign] # names have capitals
    parser.read(NIGHTLY / f"charseq2seq-nightly.{kind}")
    return parser


def test_systemd_runs_the_same_command_at_the_same_time() -> None:
    (minute, hour, *_), command = crontab_line()
    service, timer = unit("service")["Service"], unit("timer")["Timer"]
    words = service["ExecStart"].removeprefix("%h/charseq2seq/")
    assert words in command and service["WorkingDirectory"] == "%h/charseq2seq"
    assert f"{int(hour):02}:{int(minute):02}:00" in timer["OnCalendar"]
    assert service["SuccessExitStatus"] == str(int(ExitCode.TERMINATED))
    assert service["StandardOutput"] == service["StandardError"] == "append:%h/charseq2seq/nightly.log"
