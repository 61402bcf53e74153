"""Kill one training job at random moments, hundreds of times; fill the disk under it; plant tokens and look for them.

    python benchmarks/campaigns/chaos.py                                           # a quarter of an hour
    python benchmarks/campaigns/chaos.py --kills 3 --full_disk 1 --pushes 1        # a try

Kills: a job is run once without a stop. Then it is started, killed and started again until it ends, and then anew,
until there were as many kills as asked for: by SIGKILL, SIGTERM, SIGINT and two SIGINTs, while it starts, while it
trains, as soon as it is seen to save, and as soon as it is seen to write the model. After every kill model and resume
state are read, and the state must be no older than before; at the end of a job both must equal those of the straight
run in everything but the time that was spent.

Full disks: a finished model lies on a tmpfs of one megabyte (root can mount one) that has little room left, or no room
for another name. A run there must end with 74 and leave everything as it is; with room again, the same command ends
well.

Tokens are in the environment of every run and, where it pushes (to a Hub on loopback), on the command line, in an
arguments file or in a token file; whatever a run has printed and written is searched for them.

The moments come from the seed, and from how busy the machine is. Ends with 1 if there was any damage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.campaigns.watched_folder import SPARE, Folder, Search, fingerprint
from benchmarks.machine import describe_machine, markdown_table
from charseq2seq.checkpoint import load_checkpoint, load_resume_state
from charseq2seq.console import log, run, write_result
from charseq2seq.errors import ExitCode, SuiteError
from tests.hub.server import WRITE, HubServer, hub_with_people
from tests.train_client import TINY

MODEL, STATE = "transformer_model.pth", "transformer_model.resume.pth"
STEPS, EVAL_INTERVAL = 600, 15
JOB = ["--data_path", "text.txt", *TINY, "--dropout", "0.1", "--device", "cpu", "--num_threads", "1"]
LOGGED = ["--log_interval", "1", "--log_file", "run.log"]

STARTING, TRAINING, SAVING, ENDING = "while starting", "while training", "while saving", "while the model was written"
MOMENTS = {STARTING: 15, TRAINING: 45, SAVING: 35, ENDING: 5}  # their shares in percent
TWICE = "SIGINT twice"
SIGNALS = {"SIGKILL": 50, "SIGTERM": 20, "SIGINT": 20, TWICE: 10}
# What a process ends with: saved and left; or not yet listening, so that the signal itself ends it.
CODES = {
    "SIGKILL": {-signal.SIGKILL},
    "SIGTERM": {ExitCode.TERMINATED, -signal.SIGTERM},
    "SIGINT": {ExitCode.INTERRUPTED, -signal.SIGINT},
    TWICE: {ExitCode.INTERRUPTED, -signal.SIGINT},
}


class Kills:
    """The job that is killed and started again.

    Args:
        root: an empty folder.
        steps: of the job.
        chance: of moments and signals.
        search: looks for tokens.
    """

    def __init__(self, root: Path, steps: int, chance: random.Random, search: Search) -> None:
        self.root = root
        self.chance = chance
        self.search = search
        self.command = [*JOB, *LOGGED, "--max_steps", str(steps), "--eval_interval", str(EVAL_INTERVAL)]
        self.signals: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.jobs = 0
        self.unreadable: list[str] = []
        self.lost: list[str] = []
        self.different: list[str] = []
        self.misbehaved: list[str] = []
        started = time.monotonic()
        self.straight = Folder(root / "straight", search)
        code = self.straight.run(self.command)
        if code != ExitCode.OK:
            raise SuiteError(f"the straight run failed; see to it first:\n{self.straight.log}", ExitCode.BAD_DATA)
        self.training_seconds = float(self.straight.report()["training_seconds"])
        self.starting_seconds = time.monotonic() - started - self.training_seconds
        self.expected = {name: fingerprint(self.straight.path / name) for name in (MODEL, STATE)}

    def go_on(self, kills: int) -> None:
        """Kill until there were so many kills, and let the last job end."""
        while self.signals.total() < kills:
            job = Folder(self.root / f"job-{self.jobs}", self.search)
            step, ended = 0, False
            while not ended:
                killing = self.signals.total() < kills
                code = self._sitting(job) if killing else job.run(self.command)
                step, ended = self._inspect(job, step)
                if not ended and (code == ExitCode.OK or not killing):
                    self.misbehaved.append(f"a run that nobody killed ended with {code}: {job.log[-500:]}")
                    break
            self._compare(job)
            self.jobs += 1

    def _sitting(self, job: Folder) -> int:
        """Start the job, kill it at a random moment, and return its exit code; 0 where it was done before that."""
        name, moment = (self._choose(shares) for shares in (SIGNALS, MOMENTS))
        wait = self._moment(job, moment)
        process = job.start(self.command, {"OMP_NUM_THREADS": "1"})
        wait(process)
        signals = {TWICE: [signal.SIGINT] * 2}.get(name) or [signal.Signals[name]]
        for number in signals:
            process.send_signal(number)
            time.sleep(self.chance.uniform(0, 0.003) if name == TWICE else 0)
        code = job.end(process)
        if code == ExitCode.OK:
            return code
        self.signals[name] += 1
        self.moments[moment] += 1
        if self.signals.total() % 20 == 0:
            log("\n".join([f"{self.signals.total()} kills, {self.jobs} jobs ended", *self.damage()]))
        # An interrupt while Python imports is Python's own to report.
        if code not in CODES[name] or ("Traceback" in job.log and code != -signal.SIGINT):
            self.misbehaved.append(f"{name} {moment}: ended with {code}: {job.log[-500:]}")
        return code

    def _choose(self, shares: Mapping[str, int]) -> str:
        return self.chance.choices(list(shares), list(shares.values()))[0]

    def _moment(self, job: Folder, moment: str) -> Callable[[subprocess.Popen[bytes]], None]:
        """What waits for a moment of a process, or for its end."""
        seconds = self.chance.uniform(0, self.training_seconds / 5 if moment == TRAINING else self.starting_seconds)
        saves, later = self.chance.randint(1, 6), self.chance.choice([0.0, self.chance.uniform(0, 0.004)])

        def until(condition: Callable[[], object], process: subprocess.Popen[bytes], pause: float) -> None:
            while process.poll() is None and not condition():
                time.sleep(pause)

        def wait(process: subprocess.Popen[bytes]) -> None:
            if moment != STARTING:
                until(lambda: b"files: " in (job.path / "stderr").read_bytes(), process, 0.002)
            if moment in (STARTING, TRAINING):
                end = time.monotonic() + seconds
                until(lambda: time.monotonic() >= end, process, 0.001)
                return
            pattern = f"{MODEL if moment == ENDING else STATE}.*.tmp"
            for number in range(1 if moment == ENDING else saves):  # watched without a pause: a save takes milliseconds
                if number:
                    until(lambda: not any(job.path.glob(pattern)), process, 0)
                until(lambda: any(job.path.glob(pattern)), process, 0)
            time.sleep(later)

        return wait

    def _inspect(self, job: Folder, step: int) -> tuple[int, bool]:
        """Read what a run left; returns how far it has come, and whether the job has ended."""
        ended = False
        for name, load in ((MODEL, load_checkpoint), (STATE, load_resume_state)):
            path = job.path / name
            try:
                content = load(path) if path.exists() else None
            except SuiteError as error:
                self.unreadable.append(str(error))
                continue
            if isinstance(content, dict):
                if content["step"] < step:
                    self.lost.append(f"{path} went back from step {step} to {content['step']}")
                step, ended = content["step"], content["finished"]
            elif content is None and name == STATE and step:
                self.lost.append(f"{path} has gone")
        if list(job.path.glob("*.earlier.pth")):
            self.lost.append(f"{job.path}: a state was set aside: {job.log[-500:]}")
        return step, ended

    def _compare(self, job: Folder) -> None:
        """An ended job must have what the straight run has, and nothing more."""
        for name, expected in self.expected.items():
            if not (job.path / name).exists() or fingerprint(job.path / name) != expected:
                self.different.append(f"{job.path / name} differs from the straight run's")
        if job.temporaries():
            self.misbehaved.append(f"{job.path}: left {job.temporaries()}")

    def rows(self) -> list[list[str]]:
        """The table's lines."""
        count = self.signals.total()
        return [
            ["kills", f"{count}", tell(self.signals), f"{len(self.unreadable)} files unreadable"],
            ["", "", tell(self.moments), f"{len(self.lost)} states lost, {len(self.misbehaved)} other mishaps"],
            [
                "jobs ended after kills",
                f"{self.jobs}",
                f"{count / max(1, self.jobs):.1f} kills each, {self.training_seconds:.1f} s of training without them",
                f"{len(self.different)} files differ from the straight run's",
            ],
        ]

    def damage(self) -> list[str]:
        """All that went wrong."""
        return self.unreadable + self.lost + self.different + self.misbehaved


def tell(counts: Mapping[str, int]) -> str:
    """Counts in words."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


# --- full disks


@contextlib.contextmanager
def small_disk(folder: Path, *options: str) -> Iterator[None]:
    """Mount a small disk.

    Raises:
        SuiteError: this user may not.
    """
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SuiteError(f"no mount here: {error}", ExitCode.NO_PERMISSION) from error
    if mounted.returncode:
        raise SuiteError(mounted.stderr.strip(), ExitCode.NO_PERMISSION)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class FullDisks:
    """Runs on a disk without room.

    Args:
        disk: where to mount them.
        user: who has a finished model.
        chance: of how little room there is.
    """

    def __init__(self, disk: Path, user: Folder, chance: random.Random) -> None:
        self.chance = chance
        self.user = user
        self.disk = disk
        self.codes: Counter[int] = Counter()
        self.problems: list[str] = []
        self.left_out = ""

    def go_on(self, count: int) -> None:
        """So many runs; none where no small disk can be had."""
        for number in range(count):
            # Every fourth disk has room, but for one name too few: folder, model, state, lock and ballast are there.
            options = ["size=1m", "nr_inodes=6" if number % 4 == 3 else "nr_inodes=100"]
            try:
                with small_disk(self.disk, *options):
                    self._fill_and_run(number)
            except SuiteError as error:
                self.left_out = str(error)
                return

    def _fill_and_run(self, number: int) -> None:
        model, state, ballast = self.disk / MODEL, self.disk / STATE, self.disk / "ballast"
        for name in (MODEL, STATE):
            (self.disk / name).write_bytes((self.user.path / name).read_bytes())
        (self.disk / f"{MODEL}.lock").touch()
        ballast.touch()
        room = os.statvfs(self.disk)
        ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - self.chance.randrange(200_000))))
        if number % 4 == 3:
            ballast.write_bytes(b"")
            (self.disk / "one-more").touch()
        before = model.read_bytes()
        command = [*JOB, "--max_steps", "6", "--eval_interval", "2", "--model_path", str(model), "--seed", "5"]
        code = self.user.run(command)
        self.codes[code] += 1
        if code == ExitCode.OK:
            self._check(load_checkpoint(model).training_args["seed"] == 5, "said to have ended, and did not")
            return
        self._check(
            code == ExitCode.IO_ERROR and "No space left on device; check the disk" in self.user.log, self.user.log
        )
        self._check(model.read_bytes() == before, "the earlier model was touched")
        with contextlib.suppress(SuiteError):
            self._check(bool(load_resume_state(state)), "the resume state is unreadable")
        self._check(not list(self.disk.glob("*.tmp")), f"left {sorted(path.name for path in self.disk.iterdir())}")
        for path in (ballast, self.disk / "one-more"):
            path.unlink(missing_ok=True)
        self._check(self.user.run(command) == ExitCode.OK, f"with room again: {self.user.log}")

    def _check(self, fine: bool, problem: str) -> None:
        if not fine:
            self.problems.append(f"full disk: {problem[-500:]}")

    def rows(self) -> list[list[str]]:
        """The table's line."""
        done = f"{self.codes[ExitCode.IO_ERROR]} refused for want of room, {self.codes[ExitCode.OK]} found enough"
        return [["full disks", f"{self.codes.total()}", self.left_out or done, f"{len(self.problems)} losses"]]


# --- pushes

# How a token is given to a run that pushes.
WAYS: dict[str, list[str]] = {
    "command line": ["--hf_token", WRITE],
    "token file": ["--hf_token_file", "token.txt"],
    "arguments file": ["@token.args"],
    "environment": [],
}


def push(root: Path, way: str, hub: HubServer, search: Search) -> list[str]:
    """Train and push with a token given in one way, and search all of it; returns what went wrong."""
    user = Folder(root / way.replace(" ", "-"), search)
    (user.path / "token.txt").write_text(WRITE)
    (user.path / "token.args").write_text(f"--hf_token {WRITE}")
    environment = hub.environment(user.path, WRITE if way == "environment" else SPARE) | {"OMP_NUM_THREADS": "1"}
    name = f"by-{way.replace(' ', '-')}"
    arguments = [*JOB, *LOGGED, "--max_steps", "4", "--push_to_hf", "--hf_repo_name", name, *WAYS[way]]
    code = user.end(user.start(arguments, environment), but=["token.txt", "token.args"])
    if code != ExitCode.OK:
        return [f"the push by {way} ended with {code}: {user.log[-500:]}"]
    for file, content in hub.repo(f"alice/{name}").files().items():
        search.text(f"{name}/{file} on the Hub", content)
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Do it all and print the table."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    # Started in the background, this process ignores Ctrl-C, and so would those that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.TERMINATED))  # unmounts the disk
    problems: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, hub_with_people() as hub:
        root, search = Path(folder), Search()
        kills = Kills(root, args.steps, random.Random(args.seed), search)
        kills.go_on(args.kills)
        disks = FullDisks(root / "disk", kills.straight, random.Random(args.seed))
        disks.go_on(args.full_disk)
        for way in list(WAYS)[: args.pushes]:
            problems += push(root, way, hub, search)
    found = f"{search.size / 1e6:.0f} MB of them, {args.pushes} pushes among them"
    rows = [
        *kills.rows(),
        *disks.rows(),
        ["outputs searched for tokens", f"{search.outputs:,}", found, f"{len(search.finds)} finds"],
    ]
    problems += kills.damage() + disks.problems + search.finds
    write_result(f"A job of {args.steps} steps, saved every {EVAL_INTERVAL}; seed {args.seed}.\n\n")
    write_result(markdown_table(["trial", "times", "of these", "damage"], rows) + "\n\n")
    write_result(f"{describe_machine()} It took {(time.monotonic() - started) / 60:.0f} minutes.\n")
    for problem in problems:
        log(problem)
    return ExitCode.UNEXPECTED if problems else ExitCode.OK


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("kills", 200, "kills"),
        ("full_disk", 20, "runs on a full disk"),
        ("pushes", len(WAYS), "ways to give a token to a push"),
        ("steps", STEPS, "steps of the job that is killed"),
        ("seed", 1, "of moments and signals"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(main))
