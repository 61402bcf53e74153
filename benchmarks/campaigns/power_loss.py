"""Cut the power at every point of real saves, then let every file operation of a run fail: is anything ever lost?

    python benchmarks/campaigns/power_loss.py                # all of it
    python benchmarks/campaigns/power_loss.py --every 50     # a try: every 50th cut and failure

Needs Linux, glibc and a C compiler (cc; on Debian: apt-get install gcc). file_calls.c, loaded before the C library,
sees every open, write, fsync, rename, link, unlink and truncate of the suite's own programs in one folder. They train,
are stopped by SIGTERM, go on to the end, build a repository folder, train another model over the first, and build the
folder again. The record, repeated from its first call to its last, must give the files that are there.

Power cuts: after every call the disk is made as a power cut may leave it. Of what had no fsync, nothing is kept, or any
number of writes; or half of the last one; with zeros or garbage up to the file's size, or without; or later writes
without an earlier one. Of the names that had no fsync of their folder, any are kept. The suite opens what is there.
What was saved before the program began another file, or ended, is there: that version or a later one, whole. A torn
file is refused. A repository folder that lists its files is whole. And the same command goes on from there: what it
leaves is what a run without a cut leaves, but for the seconds in it.

Failures: EIO, ENOSPC and ENOMEM at the first, second, third, ... call, once or from there on, until a run makes fewer
calls. Every run ends well, or with 74 and one sentence; no file is worse than before, nor half of a new one; the same
command then ends well.

Ends with 1 if there was any damage.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import push_to_huggingface
import train_transformer
from benchmarks.campaigns.disk_after_power_cut import Call, Disk, Files, Versions
from benchmarks.campaigns.watched_program import (
    LIBRARY,
    METRICS,
    MODEL,
    STATE,
    Facts,
    Machine,
    Program,
    compile_library,
    read_folder,
    temporaries,
)
from benchmarks.machine import describe_machine, markdown_table
from charseq2seq.console import log, run, write_result
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.publishing.folder import parse_record
from charseq2seq.publishing.hub import RECORD
from charseq2seq.training import trainer
from tests.train_client import TINY, tiny_text

BUILT = "built/"  # the repository folder
TEXT = {"text.txt": tiny_text().encode()}
ERRORS = (errno.EIO, errno.ENOSPC, errno.ENOMEM)


def programs() -> list[Program]:
    """In their order."""
    job = ["--data_path", "text.txt", *TINY, "--dropout", "0.1", "--device", "cpu", "--num_threads", "1"]
    job += ["--max_steps", "8", "--eval_interval", "3"]
    first, second, third, fourth = ((*job, "--seed", seed) for seed in "1234")
    folder = ("--dry_run", "--output_dir", BUILT, "--repo_name", "tiny", "--username", "alice")
    train, push = train_transformer.main, push_to_huggingface.main
    return [
        Program("a run, stopped by SIGTERM", train, first, ExitCode.TERMINATED, stop=60),
        Program("the same run, to its end", train, first),
        Program("a repository folder", push, folder),
        Program("another run over the finished one", train, second),
        Program("the repository folder again", push, folder),
        Program("a third run, stopped", train, third, ExitCode.TERMINATED, stop=60),
        Program("a different run where that one was", train, fourth),
    ]


def whole_folder(files: Files) -> Files:
    """The files of a repository folder that counts as whole; empty where none does."""
    record = parse_record(files.get(BUILT + RECORD, b"").decode("utf-8", errors="replace"))
    names = [BUILT + name for name in record["files"]] if record else []
    return {name: files[name] for name in names} if all(name in files for name in names) else {}


class Campaign:
    """All trials, and the damage they found.

    Args:
        machine: runs the programs.
        every: of the cuts and failures every such one is tried.
    """

    def __init__(self, machine: Machine, every: int) -> None:
        self.machine, self.every = machine, every
        self.programs = programs()
        self.before: list[Files] = []  # each program
        self.calls: list[list[Call]] = []
        self.finals: list[Facts] = []  # what each leaves that nothing has stopped
        self.known: list[dict[str, set[str]]] = []  # what a program may find or leave of every file
        self.all_known: set[str] = set()
        self.folders: list[Files] = []  # complete ones
        self.went_on: set[Any] = set()
        self.damage: Counter[str] = Counter()

    def record(self) -> None:
        """Run the programs one after the other.

        Raises:
            SuiteError: one of them fails, or the record is not all that it did.
        """
        machine = self.machine
        machine.put(TEXT)
        for program in self.programs:
            machine.run(program)
            machine.import_the_same()
        disk = self._empty_disk()
        for program in self.programs:
            self.before.append(read_folder(machine.folder))
            code = machine.run(program, program.stop, -signal.SIGTERM, prove=True)
            self.calls.append([*machine.calls(), Call("end")])
            self.known.append({name: {meaning} for name, meaning in machine.facts(self.before[-1]).items()})
            self._replay(disk, self.calls[-1], self.known[-1])
            after = read_folder(machine.folder)
            if code != program.code or disk.visible() != after:
                raise SuiteError(f"{program.name}: {code}, or not all was recorded\n{machine.log}", ExitCode.BAD_DATA)
            self.finals.append(machine.facts(after))
            self.folders.append(whole_folder(after))
        for index, program in enumerate(self.programs):
            if program.stop:  # what it leaves without a stop
                machine.put(self.before[index])
                machine.run(program)
                self._replay(Disk(self.before[index], disk.inode), machine.calls(), self.known[index])
                self.finals[index] = machine.facts(read_folder(machine.folder))
        if self.finals[0] != self.finals[1]:
            self._note("the run that was stopped and went on is not the run without a stop")
        self.all_known = set().union(*(meanings for known in self.known for meanings in known.values()))

    def _replay(self, disk: Disk, calls: list[Call], known: dict[str, set[str]]) -> None:
        """Do recorded calls, and note what files were replaced by."""
        for call in calls:
            disk.apply(call)
            if call.name == "rename":
                name = call.paths[1]
                known.setdefault(name, set()).add(self.machine.meaning(name, disk.files[call.inode].whole))

    def _empty_disk(self) -> Disk:
        self.machine.put(TEXT)
        return Disk(TEXT, self.machine.folder.stat().st_ino)

    def _note(self, damage: str) -> None:
        if not self.damage[damage]:
            log(damage)
        self.damage[damage] += 1

    def _run_to_end(self, number: int, when: str) -> None:
        """Run a program where it was cut off; it must end well, and as if nothing had happened."""
        program, machine = self.programs[number], self.machine
        code = machine.run(program)
        after = read_folder(machine.folder)
        if code != ExitCode.OK or machine.facts(after) != self.finals[number]:
            differs = dict(machine.facts(after).items() ^ self.finals[number].items())
            self._note(f"{program.name}, {when}: {code}, {sorted(differs)} differ: {machine.log[-300:]}")
        if program.main is train_transformer.main:
            if left := temporaries(after):
                self._note(f"{program.name}, {when}: left {left}")
            steps = [json.loads(line)["step"] for line in after[METRICS].splitlines()]
            if steps != sorted(set(steps)):
                self._note(f"{program.name}, {when}: the rows of its metrics are {steps}")

    def cut_power(self) -> list[list[str]]:
        """After every call; returns the table's lines."""
        disk, versions, rows, number = self._empty_disk(), Versions(self.before[0]), [], 0
        for index, program in enumerate(self.programs):
            cuts = states = distinct = 0
            runs, damaged = len(self.went_on), self.damage.total()
            for call in self.calls[index]:
                disk.apply(call)
                if versions.note(call, disk):
                    seen: set[Any] = set()  # more is promised from here on
                number += 1
                if number % self.every and call.name != "end":
                    continue
                cuts += 1
                for files in disk.after_cut():
                    states += 1
                    if (key := frozenset((name, hash(content)) for name, content in files.items())) not in seen:
                        seen.add(key)
                        distinct += 1
                        self._open(index, files, versions)
            log(f"{program.name}: {states:,} states, {self.damage.total() - damaged} damaged")
            figures = (len(self.calls[index]) - 1, cuts, states, distinct, len(self.went_on) - runs)
            rows.append([program.name, *(f"{figure:,}" for figure in figures), f"{self.damage.total() - damaged}"])
        return rows

    def _open(self, index: int, files: Files, versions: Versions) -> None:
        """Look at what is there after a cut during a program, and go on from there."""
        machine, program = self.machine, self.programs[index]
        for problem in versions.problems(files):
            if not problem.startswith(METRICS) or problem.endswith("gone"):  # rows are appended, see `Machine.facts`
                self._note(f"{program.name}, a cut: {problem}")
        for name in temporaries(files):
            meaning = machine.meaning(name, files[name])
            if name.startswith((MODEL, STATE)) and not meaning.startswith("refused") and meaning not in self.all_known:
                self._note(f"{program.name}, a cut: {name} is torn and was accepted")
        if (folder := whole_folder(files)) and folder not in self.folders:
            self._note(f"{program.name}, a cut: half a folder counts as whole")
        key = (index or 1, frozenset(machine.facts(files).items()), *temporaries(files))
        if key not in self.went_on:
            self.went_on.add(key)
            machine.put(files)
            self._run_to_end(index, "again after a cut")

    def fail_calls(self) -> list[list[str]]:
        """Every call in turn; returns the table's lines."""
        rows = []
        for index, program in enumerate(self.programs):
            if index in (1, 5):  # the same as the first, and as another run over a finished one
                continue
            for error in ERRORS:
                codes: Counter[int] = Counter()
                damaged = self.damage.total()
                for for_good in (False, True):
                    nth = 1
                    while (code := self._fail(index, nth, error, for_good)) is not None:
                        codes[code] += 1
                        nth += self.every
                ends = ", ".join(f"{count:,} ended with {code}" for code, count in sorted(codes.items()))
                name = errno.errorcode[error]
                rows.append([program.name, name, f"{codes.total():,}", ends, f"{self.damage.total() - damaged}"])
                log(" ".join(rows[-1]))
        return rows

    def _fail(self, index: int, nth: int, error: int, for_good: bool) -> int | None:
        """Run a program of which a call fails; returns its exit code, None where it made no such call."""
        machine, program = self.machine, self.programs[index]
        machine.put(self.before[index])
        code = machine.run(program, nth, error, for_good)
        if not any(call.name == "fail" for call in machine.calls()):
            return None
        after, said = read_folder(machine.folder), machine.log
        when = f"{errno.errorcode[error]} at call {nth}{' and later' * for_good}"
        facts, before = machine.facts(after), self.before[index]
        lost = [name for name in before if name not in after and before[name] not in after.values()]
        problems = [f"{name} has gone" for name in lost]  # and was not given another name
        for name, meaning in facts.items():
            if meaning not in self.known[index].get(name, ()):
                problems.append(f"{name} is damaged")
        if code not in (ExitCode.OK, ExitCode.IO_ERROR):
            problems.append(f"ended with {code}")
        if "Traceback" in said or len(re.findall(r"\berror: |❌", said)) != (code != ExitCode.OK):
            problems.append(f"said {said[-500:]}")
        if code == ExitCode.OK and facts != self.finals[index]:
            problems.append("ended well with something else")
        if not for_good and temporaries(after):
            problems.append(f"left {temporaries(after)}")
        if (folder := whole_folder(after)) and folder not in self.folders:
            problems.append("half a folder counts as whole")
        for problem in problems:
            self._note(f"{program.name}, {when}: {problem}")
        key = (index, frozenset(facts.items()), bool(temporaries(after)))
        if key not in self.went_on:
            self.went_on.add(key)
            self._run_to_end(index, f"again after {when}")
        return code


def main(argv: Sequence[str] | None = None) -> int:
    """Do it all and print the tables."""
    args = parse_arguments(argv)
    library = os.environ.pop("LD_PRELOAD", "")
    if Path(library).name != LIBRARY:
        return start_watched(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    trainer._SAVE_COST = 1e9  # every evaluation saves
    started = time.monotonic()
    campaign = Campaign(Machine(Path(library).parent, ctypes.CDLL(library)), args.every)
    campaign.record()
    tried = "all" if args.every == 1 else f"one in {args.every}"
    header = ["program", "calls", "cuts", "disks", "different", "runs from there", "damage"]
    write_result(f"Power cuts, {tried}.\n\n{markdown_table(header, campaign.cut_power())}\n\n")
    header = ["program", "error", "failed calls", "runs", "damage"]
    write_result(f"Failures, {tried}.\n\n{markdown_table(header, campaign.fail_calls())}\n\n")
    write_result(f"{describe_machine()} It took {(time.monotonic() - started) / 60:.0f} minutes.\n")
    return ExitCode.UNEXPECTED if campaign.damage else ExitCode.OK


def start_watched(argv: Sequence[str]) -> int:
    """This script once more, with file_calls.c in it and nothing of the user's settings."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no fsync waits for a disk that others write to
    with tempfile.TemporaryDirectory(prefix="power-loss-", dir=memory) as root:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HOME": root, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(compile_library(Path(root)))}
        return subprocess.run([sys.executable, __file__, *argv], env=environment, check=False).returncode


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "try one in so many of the cuts and failures (default: %(default)s, all)"
    parser.add_argument("--every", type=int, default=1, metavar="N", help=text)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(main))
