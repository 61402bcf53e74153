"""Damaged and hostile files through the loaders: only our own errors come out, and memory stays bounded.

    python benchmarks/campaigns/fuzz.py                 # 10,000 model files and 10,000 JSON files, some minutes
    python benchmarks/campaigns/fuzz.py --count 500     # of each

Model files are changed in four ways: bytes of the file; bytes of the pickle inside, with right checksums; values of the
content, saved anew; parts of the archive. JSON files are changed in their text and in their values. What a loader
accepts is used: a model is built and writes, a card and a curve are made. All files come from the seed. The work is
done in processes of their own, so that a crash of the interpreter is seen and memory can be measured.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.machine import peak_memory
from charseq2seq.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    load_checkpoint,
    load_resume_state,
    save_checkpoint,
)
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.vocabulary import CharVocabulary

BATCH = 1000  # files a process
MEMORY_ALLOWANCE = 256 << 20  # bytes that reading may take beyond four times the file
Parts = dict[str, bytes]


# --- model files


def read_parts(archive: bytes) -> Parts:
    """The parts of a model file, by their names within the archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name.partition("/")[2]: opened.read(name) for name in opened.namelist()}


def write_parts(parts: Parts) -> bytes:
    """An archive as `torch.save` writes it, checksums and all."""
    import torch

    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in parts.items():
        if name not in ("version", ".data/serialization_id"):  # these it writes by itself
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return buffer.getvalue()


def saved(content: Any) -> bytes:
    """What `torch.save` makes of a content."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip, cut, insert, repeat, blank or move a few bytes."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 5, 30])):
        place, length = chance.randrange(len(data) + 1), chance.choice([1, 1, 2, 4, 8, 64, 1000])
        match chance.randrange(8):
            case 0 | 1 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case 2 if place < len(data):
                data[place] = chance.choice(b"\x00\x01\x7f\xff(.)}]tRbQqhcXKMJG0e\x80\x85\x8f\x93")
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = chance.randbytes(length)
            case 5:
                data[place:place] = data[place : place + length] * chance.choice([1, 2, 50])
            case 6:
                data[place : place + length] = bytes(len(data[place : place + length]))
            case _:
                source = chance.randrange(len(data) + 1)
                data[place : place + length] = data[source : source + length]
    return bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.1 else data)


def hostile_values(chance: random.Random) -> Any:
    """Something that nobody expects."""
    import torch

    shared: list[Any] = ["x"]
    for _ in range(chance.choice([5, 14, 40])):
        shared = [shared, shared]
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(chance.choice([10, 20, 200])):
        deep = [deep]
    plain: list[Any] = [None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**80, 0.5, -1.5, 1e300, 1e308, float("nan")]
    plain += [float("inf"), "", "x", "<start>", "\ud800", "\x1b[2J\n", "x" * 100_000, "\U0001f3ad" + "x" * 100_000]
    boxes: list[Any] = [
        [],
        {},
        [[]],
        {"a": {}},
        {1: 2},
        {"step": 1},
        [{"step": True}],
        [{"step": 1, "nats_per_char": "x"}],
    ]
    boxes += [(), (1,), OrderedDict(a=1), shared, endless, deep, [0] * 10_000, b"bytes", {1, 2}, 1j, bytearray(9)]
    tensors: list[Any] = [
        torch.zeros(()),
        torch.zeros(0),
        torch.full((3,), float("nan")),
        torch.arange(3),
        torch.ones(2, 2).double(),
    ]
    tensors += [torch.zeros(1).expand(10**8), torch.zeros(1).expand(10**5, 10**5), torch.ones(3, dtype=torch.bfloat16)]
    tensors += [torch.zeros(2, dtype=torch.bool), torch.ones(2) * 1j, torch.eye(3).to_sparse(), torch.zeros(1000)[:2]]
    tensors += [
        torch.nn.Parameter(torch.ones(2)),
        torch.float32,
        torch.Size([2]),
        torch.device("cpu"),
        torch.ones(3, 2).T,
    ]
    return chance.choice([chance.choice(plain), chance.choice(plain), chance.choice(boxes), chance.choice(tensors)])


def change_values(content: Any, chance: random.Random, values: Callable[[random.Random], Any]) -> Any:
    """A copy with one value changed, added, moved or removed, anywhere."""
    changed = {"": copy.deepcopy(content)}
    box: Any = changed
    key: Any = ""
    while isinstance(box[key], (dict, list)) and len(box[key]) and chance.random() < 0.85:
        box = box[key]
        key = chance.choice(list(box)) if isinstance(box, dict) else chance.randrange(len(box))
    others = list(box.values()) if isinstance(box, dict) else box
    match chance.randrange(6):
        case 0:
            del box[key]
        case 1:
            box[key] = chance.choice(others)
        case 2 if isinstance(box, dict):
            new = chance.choice([1, None, 2.5, "\ud800", "", "x" * 1000, "vocab_size", "step"])
            box[new] = box.pop(key)
        case 3 if isinstance(box, dict):
            box[chance.choice(["extra", "start_id", "bigram", "history", "__class__", 0])] = values(chance)
        case 4 if isinstance(box, list):
            box.insert(chance.randrange(len(box) + 1), values(chance))
        case _:
            box[key] = values(chance)
    return changed.get("")


def change_parts(parts: Parts, chance: random.Random) -> bytes:
    """Change the weights' bytes, or which parts there are, or how they are stored."""
    parts, name = dict(parts), chance.choice(list(parts))
    match chance.randrange(6):
        case 0:
            del parts[name]
        case 1:
            parts[name] = change_bytes(parts[name], chance)
        case 2:
            parts[name] = parts[chance.choice(list(parts))]
        case 3:
            parts[chance.choice(["constants.pkl", "data/99", "other.pkl", "code/x.py", "byteorder"])] = b"big"
        case 4:
            weights = chance.choice([part for part in parts if part.startswith("data/")])
            parts[weights] = chance.choice([b"\xff", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"]) * len(parts[weights])
            parts[weights] = parts[weights][: chance.choice([1, 1, 4]) * len(parts[weights]) // 4]
        case _:  # a zip of any other program, packed
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for part, content in parts.items():
                    archive.writestr(f"archive/{part}", content * chance.choice([1, 1, 1000]))
            return buffer.getvalue()
    return write_parts(parts)


class ModelFiles:
    """Changed model files, by the way of change."""

    def __init__(self, kind: str) -> None:
        from tests.push_client import tiny_checkpoint

        self.kind = kind
        self.checkpoint = tiny_checkpoint()
        self.loader = load_resume_state if kind == "resume" else load_checkpoint
        path = Path(tempfile.mkstemp()[1])
        save_checkpoint(path, self.checkpoint)
        self.whole = path.read_bytes()
        path.unlink()
        self.parts = read_parts(self.whole)
        self.content = {"format": "charseq2seq model", "format_version": FORMAT_VERSION} | {
            field.name: getattr(self.checkpoint, field.name) for field in dataclasses.fields(Checkpoint)
        }
        if kind == "resume":
            self.content |= {"format": "charseq2seq resume state", "random": [3, (1, 2, 3), None], "step": 7}

    def make(self, chance: random.Random) -> bytes:
        """One more file."""
        if self.kind == "bytes":
            return change_bytes(self.whole, chance)
        if self.kind == "pickle":
            return write_parts(self.parts | {"data.pkl": change_bytes(self.parts["data.pkl"], chance)})
        if self.kind == "parts":
            return change_parts(self.parts, chance)
        if self.kind == "largest":  # as many boxes, a byte each, as a pickle of the size that is still read can hold
            start = self.parts["data.pkl"][:-1] + b"X\5\0\0\0extra]("
            boxes = chance.choice([b"}", b"]", b")\x85", b"\x88", b"(]e"])
            boxes *= ((1 << 20) - len(start) - 3) // len(boxes)
            return write_parts(self.parts | {"data.pkl": start + boxes + b"es."})
        content = self.content
        if self.kind == "config":  # as config.json would have it
            content = content | {"config": change_values(content["config"], chance, json_values)}
            return saved(content)
        for _ in range(chance.choice([1, 1, 2])):
            content = change_values(content, chance, hostile_values)
        return saved(content)

    def load(self, path: Path) -> object:
        """Load one."""
        return self.loader(path)

    def load_whole(self) -> object:
        """What the unchanged file holds."""
        return self.checkpoint

    def use(self, loaded: Any) -> None:
        """Do with a model what the suite does with it."""
        if not isinstance(loaded, Checkpoint):
            return
        from charseq2seq.generation import Sampling, TextGenerator
        from charseq2seq.publishing.card import render_card
        from charseq2seq.publishing.training_curve import draw_training_curve

        TextGenerator(loaded.build_model(), loaded.vocabulary()).generate("", 3, Sampling())
        render_card(loaded, "alice/model", {}, None)
        json.dumps([loaded.config, loaded.training_args, loaded.metrics, loaded.corpus, loaded.environment])
        if loaded.metrics != self.checkpoint.metrics:
            draw_training_curve(loaded.metrics, loaded.config["vocab_size"])


# --- JSON files


def json_values(chance: random.Random) -> Any:
    """A value that JSON can hold."""
    plain = [None, True, False, -1, 0, 1, 2, 3, 12, 2**31, 2**64, 10**80, 0.5, 1.0, 1e308, float("nan"), float("inf")]
    texts = ["", "a", "ab", "<start>", "\ud800", "\0", "../x", "x" * 300, "x" * 10_000, "/etc/passwd", "charseq2seq"]
    boxes = [[], {}, [[]], {"a": 1}, {"": {}}, [1] * 1000, {str(i): i for i in range(1000)}]
    return copy.deepcopy(chance.choice([chance.choice(plain), chance.choice(texts), chance.choice(boxes)]))


class JsonFiles:
    """Changed files of a repository folder: vocab.json or training_args.json."""

    def __init__(self, kind: str) -> None:
        from charseq2seq.publishing.folder import build_folder
        from charseq2seq.publishing.hub import RECORD
        from tests.push_client import tiny_checkpoint

        self.name = "vocab.json" if kind == "vocab.json" else RECORD
        self.folder = Path(tempfile.mkdtemp())
        build_folder(tiny_checkpoint(), self.folder, "alice/model")
        self.text = (self.folder / self.name).read_bytes()

    def make(self, chance: random.Random) -> bytes:
        """One more file."""
        if chance.random() < 0.3:
            return change_bytes(self.text, chance)
        if chance.random() < 0.02:
            return b"[" * 100_000 if chance.random() < 0.5 else b'{"a":' * 100_000
        return json.dumps(change_values(json.loads(self.text), chance, json_values)).encode()

    def load_whole(self) -> object:
        """What the unchanged file holds."""
        return self.load(self.folder / self.name)

    def load(self, path: Path) -> object:
        """Load one."""
        from charseq2seq.publishing.folder import parse_record

        content = path.read_bytes()
        if self.name == "vocab.json":
            try:
                parsed = json.loads(content)
            except (ValueError, RecursionError) as error:  # no JSON: nothing of ours has seen it
                raise SuiteError("not JSON", ExitCode.BAD_DATA) from error
            return CharVocabulary.from_index_of_token(parsed)
        record = parse_record(content.decode("utf-8", errors="replace"))
        if record is None:
            raise SuiteError("not a record of this suite", ExitCode.BAD_DATA)
        return record

    def use(self, loaded: Any) -> None:
        """What is accepted must be whole."""
        if isinstance(loaded, CharVocabulary):
            assert loaded.decode(range(len(loaded))) == "".join(loaded.characters)
        else:
            parts = [part for name in loaded["files"] for part in name.split("/")]
            assert not {"", ".", ".."} & set(parts), "none reaches outside of the folder"


# --- many of them

MODEL_KINDS = {"bytes": 2000, "pickle": 3000, "content": 2500, "parts": 1000, "resume": 1480, "largest": 20}
JSON_KINDS = {"vocab.json": 4000, "training_args.json": 4000, "config": 2000}
Outcome = dict[str, Any]


def work(kind: str, first: int, last: int) -> None:
    """Make, load and use one file for each seed, and print what happened, a line a file."""
    files = JsonFiles(kind) if kind.endswith(".json") else ModelFiles(kind)
    files.use(files.load_whole())
    gc.freeze()  # what is imported by now need not be looked through after every file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for seed in range(first, last):
            print(json.dumps({"kind": kind, "seed": seed}), flush=True)  # the last line of a process that dies
            path.write_bytes(files.make(random.Random(f"{kind} {seed}")))
            print(json.dumps({"kind": kind, "seed": seed} | try_file(files, path)), flush=True)


def try_file(files: ModelFiles | JsonFiles, path: Path) -> Outcome:
    """Load and use one file: whether it was refused, what else went wrong, and the memory beyond four times it."""
    loaded: list[object] = []
    outcome: Outcome = {"refused": False, "wrong": None}

    def load() -> None:
        try:
            loaded.append(files.load(path))
        except SuiteError as error:
            outcome["refused"] = True
            if "\n" in str(error) or len(str(error)) > 1000:
                outcome["wrong"] = f"not one sentence: {error!s:.200}"
        except BaseException as error:
            outcome["wrong"] = f"{type(error).__name__}: {error!s:.100}"

    outcome["beyond"] = peak_memory(load) - 4 * path.stat().st_size
    if outcome["beyond"] > MEMORY_ALLOWANCE:
        outcome["wrong"] = f"{outcome['beyond'] >> 20} MiB beyond four times the file"
    if loaded:
        try:
            files.use(loaded[0])
        except BaseException as error:
            outcome["wrong"] = f"accepted, then {type(error).__name__}: {error!s:.100}"
    return outcome


def run_process(jobs: list[tuple[str, int, int]]) -> list[Outcome]:
    """Outcomes of some kinds and seeds, from a process of its own."""
    words = [str(word) for job in jobs for word in job]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", *words], env=quiet, capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    outcomes = [line for line in lines if "refused" in line]
    if done.returncode != 0:
        last = lines[-1] if lines else {"kind": jobs[0][0], "seed": jobs[0][1]}
        died = f"the process died ({done.returncode}): {done.stderr[-300:]}"
        outcomes.append({**last, "refused": False, "wrong": died, "beyond": 0})
    return outcomes


def main() -> int:
    """Try all kinds of files and print a table; 1 where something came out that should not."""
    parser = argparse.ArgumentParser(description="Fuzz the loaders.")
    parser.add_argument("--count", type=int, default=10_000, help="files of each sort (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first file (default: %(default)s)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        for kind, first, last in zip(*[iter(args.worker)] * 3, strict=True):
            work(kind, int(first), int(last))
        return 0
    counts = {kind: max(1, args.count * share // 10_000) for kind, share in (MODEL_KINDS | JSON_KINDS).items()}
    jobs = [
        (kind, first, min(first + BATCH, args.seed + count))
        for kind, count in counts.items()
        for first in range(args.seed, args.seed + count, BATCH)
    ]
    outcomes: list[Outcome] = []
    while jobs:
        group = [jobs.pop(0)]
        while jobs and sum(last - first for _, first, last in [*group, jobs[0]]) <= BATCH:
            group.append(jobs.pop(0))
        outcomes += run_process(group)
        print(f"{len(outcomes):,} of {sum(counts.values()):,}", file=sys.stderr)
    show(outcomes, counts)
    return 1 if any(outcome["wrong"] for outcome in outcomes) else 0


def show(outcomes: list[Outcome], counts: dict[str, int]) -> None:
    """Print the table, and the first of what went wrong."""
    print("| files | tried | refused | used | wrong | most memory beyond 4 x file |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, count in counts.items():
        ours = [outcome for outcome in outcomes if outcome["kind"] == kind]
        refused, wrong = (sum(bool(outcome[what]) for outcome in ours) for what in ("refused", "wrong"))
        used = sum(not outcome["refused"] and not outcome["wrong"] for outcome in ours)
        most = max([0, *(outcome["beyond"] for outcome in ours)]) / 2**20
        print(f"| {kind} | {count:,} | {refused:,} | {used:,} | {wrong:,} | {most:.1f} MiB |")
    models, texts = (sum(counts[kind] for kind in kinds) for kinds in (MODEL_KINDS, JSON_KINDS))
    print(f"\n{models:,} model files, {texts:,} JSON files; {MEMORY_ALLOWANCE >> 20} MiB are allowed beyond 4 x file.")
    for outcome in [outcome for outcome in outcomes if outcome["wrong"]][:20]:
        print(f"{outcome['kind']}, seed {outcome['seed']}: {outcome['wrong']}")


if __name__ == "__main__":
    sys.exit(main())
