"""Does a change leave alone what the suite computes and says? Record a checkout before and after it, and compare.

    python benchmarks/campaigns/same_before_and_after.py record /path/to/checkout before.json
    python benchmarks/campaigns/same_before_and_after.py record . after.json --parts train help
    python benchmarks/campaigns/same_before_and_after.py compare before.json after.json

A transcript holds what the checkout's command lines did: seeded fp32 training on one thread (every loss and the sha256
of the weights), a stop and a resume, generated text, an evaluation, every --help, every kind of refusal, and the files
of a --dry_run folder. Times and speeds are left out. `compare` prints each difference and exits with 1 if there is one.
Both transcripts have to come from the same machine, Python and PyTorch. A full recording takes twelve minutes on two
cores. Nothing of the checkout is imported, so this script can record older and newer states than its own.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.campaigns.refused_commands import (
    PUSH,
    TINY,
    TRAIN,
    Case,
    argument_cases,
    model_cases,
    text_cases,
    tiny_text,
    words,
)

SHAKESPEARE = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinyshakespeare.txt"
SMALL = words("--d_model 64 --num_heads 2 --num_encoder_layers 1 --num_decoder_layers 2 --d_ff 128")
SMALL += words("--source_length 32 --target_length 64 --batch_size 8")
EXACT = words("--device cpu --num_threads 1 --log_interval 1")
VARIANTS = {
    "dropout and accumulation": "--dropout 0.1 --accumulation_steps 2",
    "gradient checkpointing": "--gradient_checkpointing",
    "bf16": "--precision bf16",
    "another seed and weight decay": "--seed 7 --weight_decay 0.3",
}
GENERATIONS = {
    "a prompt": "--prompt ROMEO: --num_chars 300",
    "nothing": "--num_chars 200",
    "three samples": "--prompt JULIET: --num_chars 100 --num_samples 3 --top_k 5",
    "top_p": "--prompt KING --num_chars 100 --top_p 0.8 --temperature 1.1",
    "greedy": "--prompt KING --num_chars 100 --temperature 0",
    "float32 model of PyTorch": "--prompt KING --num_chars 100 --device cpu",
}
ADDRESS_SPACE = 8 << 30  # bytes: what has to be refused must not fill the machine's memory
TIMES = re.compile(r".*seconds|.*per_second|duration.*")
Transcript = dict[str, Any]


# --- running a checkout's command lines


@dataclass(frozen=True)
class Done:
    """How a command line ended."""

    code: int
    out: str
    log: str


class Checkout:
    """A checkout of the suite whose command lines are run.

    Args:
        path: its folder.
        scratch: an empty folder for what the runs write.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path.resolve()
        self.scratch = scratch.resolve()

    def folder(self, name: str) -> Path:
        """A new folder for one user of the suite."""
        made = self.scratch / name
        made.mkdir(parents=True)
        return made

    def start(self, home: Path, program: str, arguments: Iterable[str], limited: bool = False) -> subprocess.Popen[str]:
        """Start a command line in a folder, without the network, and without root's power to read every file."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "COLUMNS": "100"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
        limit = partial(resource.setrlimit, resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)) if limited else None
        return subprocess.Popen(
            [*_as_a_user(), sys.executable, str(self.path / program), *arguments],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
            preexec_fn=limit,  # noqa: PLW1509  # sets one limit and nothing else
        )

    def run(self, home: Path, program: str, arguments: Iterable[str], limited: bool = False) -> Done:
        """Run a command line to its end."""
        process = self.start(home, program, arguments, limited)
        out, log = process.communicate()
        return Done(process.returncode, out, log)

    def tidy(self, text: str) -> str:
        """A text without what differs from run to run: time stamps, folders, processes, memory."""
        text = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ?", "", text, flags=re.MULTILINE)
        text = text.replace(str(self.scratch), "SCRATCH").replace(str(self.path), "CHECKOUT")
        return re.sub(r" *\d[\d.,]* (GiB|MiB|KiB|bytes)\b", r" N \1", re.sub(r"process \d+", "process N", text))

    def report(self, done: Done) -> dict[str, Any]:
        """Exit code, refusal and last JSON line of a run; no times."""
        lines = self.tidy(done.log).splitlines()
        first = next((at for at, line in enumerate(lines) if re.search(r"\berror: |❌|Traceback", line)), len(lines))
        return {"exit code": done.code, "refusal": lines[first:], "stdout": self.result(done.out)}

    def result(self, out: str) -> Any:
        """Standard output: its last line parsed where that is JSON, without times."""
        lines = self.tidy(out).splitlines()
        try:
            return without_times(json.loads(lines[-1]))
        except (IndexError, ValueError):
            return lines


def _as_a_user() -> list[str]:
    """What a command starts with so that root, too, is bound by permissions."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        return []
    return [setpriv, "--bounding-set=-dac_override,-dac_read_search"]


def without_times(value: Any, instead: float | None = None) -> Any:
    """A copy of nested dicts and lists without what measures time, or with a fixed number in its place."""
    if isinstance(value, Mapping):
        kept = {name: without_times(part, instead) for name, part in value.items() if not TIMES.fullmatch(str(name))}
        if instead is None:
            return kept
        return {name: kept.get(name, instead) for name in value}
    return [without_times(part, instead) for part in value] if isinstance(value, list) else value


def losses(log: str) -> list[str]:
    """Step and losses of each line of a training log."""
    found = re.findall(r"step (\d+)\b.*?(?:loss|validation) ([\d.]+) nats/char(?:, training ([\d.]+))?", log)
    return [" ".join(part for part in line if part) for line in found]


def weights_sha256(path: Path) -> str:
    """Hash of names, types, shapes and numbers of all weights in a model file."""
    import torch

    digest = hashlib.sha256()
    for name, weight in torch.load(path, weights_only=True)["model_state_dict"].items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes() if weight.dim() else b"")
    return digest.hexdigest()


# --- the parts of a transcript


def record_train(checkout: Checkout) -> Transcript:
    """200 seeded steps on tiny Shakespeare, what is written with the model and how it scores; then short variants."""
    home = checkout.folder("train")
    shutil.copy(SHAKESPEARE, home / "text.txt")
    text = ["--data_path", "text.txt"]
    done = checkout.run(home, TRAIN, [*text, *SMALL, *EXACT, "--precision", "fp32", "--max_steps", "200"])
    transcript: Transcript = {"200 steps": trained(checkout, home, done)}
    for name, arguments in GENERATIONS.items():
        written = checkout.run(home, TRAIN, ["--mode", "generate", "--seed", "1", *arguments.split()])
        transcript[f"generate from {name}"] = {"exit code": written.code, "text": written.out.splitlines()}
    for name, more in {"validation split": text, "another text": ["--data_path", "other.txt"]}.items():
        (home / "other.txt").write_text(tiny_text(), encoding="utf-8")
        scored = checkout.run(home, TRAIN, ["--mode", "evaluate", "--device", "cpu", "--num_threads", "1", *more])
        transcript[f"evaluate, {name}"] = checkout.report(scored)
    for name, arguments in VARIANTS.items():
        home = checkout.folder(name)
        shutil.copy(SHAKESPEARE, home / "text.txt")
        steps = ["--max_steps", "20", "--eval_interval", "20"]
        done = checkout.run(home, TRAIN, [*text, *TINY, *EXACT, *steps, *arguments.split()])
        transcript[name] = trained(checkout, home, done)
    return transcript


def trained(checkout: Checkout, home: Path, done: Done) -> Transcript:
    """What a training run is compared by."""
    model = home / "transformer_model.pth"
    weights = weights_sha256(model) if model.exists() else None
    return checkout.report(done) | {"losses": losses(done.log), "weights sha256": weights}


def record_resume(checkout: Checkout) -> Transcript:
    """A run that is stopped by SIGTERM and continued, beside the same run without a stop."""
    command = ["--data_path", "text.txt", *TINY, *EXACT, "--precision", "fp32", "--max_steps", "600"]
    command += ["--eval_interval", "100", "--dropout", "0.1"]
    straight, stopped = checkout.folder("straight"), checkout.folder("stopped")
    for home in (straight, stopped):
        (home / "text.txt").write_text(tiny_text(), encoding="utf-8")
    transcript = {"never stopped": trained(checkout, straight, checkout.run(straight, TRAIN, command))}
    process = checkout.start(stopped, TRAIN, command)
    assert process.stderr is not None
    for line in process.stderr:
        if " step 150 " in line:
            process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    told = checkout.result(out)
    at_stop = {name: told[name] for name in ("outcome", "exit_code")} if isinstance(told, dict) else told
    transcript["stopped"] = {"exit code": process.returncode, "stdout": at_stop}
    transcript["stopped"]["a model is there"] = (stopped / "transformer_model.pth").exists()
    continued = trained(checkout, stopped, checkout.run(stopped, TRAIN, command))
    continued.pop("losses")  # where the signal arrived decides where they begin
    transcript["continued"] = continued
    same = continued["weights sha256"] == transcript["never stopped"]["weights sha256"]
    transcript["the weights are those of the run that was never stopped"] = same
    return transcript


def record_help(checkout: Checkout) -> Transcript:
    """Every --help."""
    home = checkout.folder("help")
    scripts = [TRAIN, PUSH, "data/prepare.py"]
    done = {script: checkout.run(home, script, ["--help"]) for script in scripts}
    return {script: {"exit code": one.code, "stdout": one.out.splitlines()} for script, one in done.items()}


def record_folder(checkout: Checkout) -> Transcript:
    """The files of a --dry_run folder, of a model whose times are set to fixed numbers."""
    import torch

    home = checkout.folder("folder")
    (home / "text.txt").write_text(tiny_text(), encoding="utf-8")
    checkout.run(home, TRAIN, ["--data_path", "text.txt", *TINY, *EXACT, "--precision", "fp32", "--max_steps", "40"])
    model = home / "transformer_model.pth"
    trained_model = torch.load(model, weights_only=True)
    torch.save(trained_model | {"metrics": without_times(trained_model["metrics"], 10.0)}, model)
    done = checkout.run(home, PUSH, ["--dry_run", "--output_dir", "made", "--username", "somebody"])
    files = {}
    for path in sorted((home / "made").rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            readable = path.suffix in (".md", ".json", ".txt")
            name = str(path.relative_to(home / "made"))
            files[name] = content.decode().splitlines() if readable else hashlib.sha256(content).hexdigest()
    return checkout.report(done) | {"files": files}


def record_refusals(checkout: Checkout) -> Transcript:
    """Exit code and message of every refused command line."""
    good = checkout.folder("good")
    (good / "text.txt").write_text(tiny_text(), encoding="utf-8")
    done = checkout.run(good, TRAIN, ["--data_path", "text.txt", *TINY, *EXACT, "--max_steps", "8"])
    transcript: Transcript = {"the model that others spoil": checkout.report(done)}
    home_of = checkout.folder("refusals")

    def refused(numbered: tuple[int, tuple[str, Case]]) -> tuple[str, Transcript]:
        number, (name, case) = numbered
        home = home_of / str(number)
        shutil.copytree(good, home)
        case.prepare(home)
        kept = {
            path.name: path.read_bytes() for path in home.iterdir() if path.suffix in (".pth", ".txt") and usable(path)
        }
        told = checkout.report(checkout.run(home, case.program, case.arguments, limited=True))
        changed_files = [file for file, content in kept.items() if (home / file).read_bytes() != content]
        text = json.dumps(told, ensure_ascii=False).replace(f"/{number}/", "/HOME/")
        result = json.loads(text) | {"changed files": changed_files, "code ran": (home / "it-ran").exists()}
        shutil.rmtree(home)
        return name, result

    cases = text_cases() | argument_cases() | model_cases()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        transcript |= dict(pool.map(refused, enumerate(cases.items())))
    return transcript


def usable(path: Path) -> bool:
    """Whether a path is a plain file that this process may read."""
    return path.is_file() and not path.is_symlink() and bool(path.stat().st_mode & 0o400)


PARTS: dict[str, Callable[[Checkout], Transcript]] = {
    "help": record_help,
    "train": record_train,
    "resume": record_resume,
    "folder": record_folder,
    "refusals": record_refusals,
}


# --- the command line


def record(path: Path, parts: Iterable[str]) -> Transcript:
    """Run a checkout's command lines.

    Args:
        path: the checkout.
        parts: which of PARTS.
    """
    transcript: Transcript = {}
    for part in parts:
        print(f"recording {part}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="same-") as scratch:
            transcript[part] = PARTS[part](Checkout(path, Path(scratch)))
    return transcript


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Every difference of two transcripts, as lines to print."""
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for name in before | after:
            there = f"{where} > {name}" if where else name
            if name not in after:
                found.append(f"--- {there}: only before")
            elif name not in before:
                found.append(f"--- {there}: only after")
            else:
                found += differences(before[name], after[name], there)
        return found
    if isinstance(before, list) and isinstance(after, list):
        lines = difflib.unified_diff([str(x) for x in before], [str(x) for x in after], lineterm="", n=1)
        return [f"--- {where}", *(f"    {line}" for line in list(lines)[2:])]
    return [f"--- {where}", f"    - {before}", f"    + {after}"]


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run a checkout's command lines and keep what they did")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("transcript", type=Path, help="a JSON file to write")
    recording.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    comparing = commands.add_parser("compare", help="print the differences; only parts that both files have")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        transcript = record(args.checkout, args.parts)
        args.transcript.write_text(json.dumps(transcript, indent=1, ensure_ascii=True) + "\n")
        return 0
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    both = [part for part in before if part in after]
    found = [line for part in both for line in differences(before[part], after[part], part)]
    print("\n".join(found) if found else f"The same: {', '.join(both)}.")
    for part in PARTS:
        if part not in both:
            print(f"Not compared: {part}.")
    return 1 if found or not both else 0


if __name__ == "__main__":
    sys.exit(main())
