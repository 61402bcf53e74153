"""Bad texts, models and prompts, a table each: a row gets one clear sentence (what, where, what to do), its exit code
and no traceback (`WarmClient` looks for those), and leaves the files of earlier runs as they are. See test_options.py
for bad arguments.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from charseq2seq.errors import ExitCode
from tests.train_client import TINY, Trainee, contents, see, see_refused, tiny_text
from tests.warm_client import WITHOUT_POWERS, WarmClient

OK, BAD_DATA, NO_INPUT, OUT_OF_MEMORY = ExitCode.OK, ExitCode.BAD_DATA, ExitCode.NO_INPUT, ExitCode.OUT_OF_MEMORY
TRAIN = ["--mode", "train", "--data_path", "text.txt", *TINY, "--max_steps", "2"]
EVALUATE = ["--mode", "evaluate", "--data_path", "text.txt"]
GENERATE = ["--mode", "generate", "--num_chars", "20"]
PUSH = "push_to_huggingface.py"
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
ENOUGH = 8 << 30  # bytes of address space for what must not take the machine's memory


# --- texts


# A text: what `text.txt` is made to be, and what training on it is answered with.
Content = str | bytes | Callable[[Path], object]
CJK = "".join(chr(0x4E00 + (number * 17) % 5000) for number in range(6000))
MISSING_TEXTS: dict[str, tuple[Content, str]] = {
    "missing": (lambda path: None, r"the text text\.txt does not exist; check --data_path\."),
    "a folder": (Path.mkdir, r"text\.txt is a folder that holds none \(\*\.txt, .*; name another, or a pat"),
    "a pipe": (os.mkfifo, r"text\.txt is a pipe or device, not a text file; name a file"),
    "unreadable": (lambda path: path.touch(0), r"text\.txt cannot be read \(Permission denied\); check its perm"),
}
UNUSABLE_TEXTS: dict[str, tuple[Content, str]] = {
    "empty": ("", r"the text text\.txt is empty; give one with some thousands of characters\."),
    "Latin-1": ("Où ça?".encode("latin-1"), r"not UTF-8: byte 0xF9 at offset 1; .* --encoding"),
    "UTF-16 without a mark": (tiny_text().encode("utf-16-le"), r"NUL byte at offset 1; most likely it is utf_16_le"),
    "NUL bytes": (tiny_text() + "\0" + tiny_text(), r"has a NUL byte at offset 4,\d{3}; .* give plain"),
    "a Word document": (b"PK\3\4\x14\0\6\0", r"is a zip archive \(\.docx, .*; save its text as plain text"),
}
TOO_LITTLE_TO_LEARN: dict[str, tuple[Content, str]] = {
    "one character": ("a", r"has 1 characters?, training with these windows needs at least 55; give"),
    "shorter than a window": (tiny_text()[:20], r"has 20 characters, .* 55; give a longer text or a smaller --source_"),
    "one distinct character": ("a" * 5000, r"text\.txt consists of one character repeated; "),
}
BAD_TEXTS = MISSING_TEXTS | UNUSABLE_TEXTS | TOO_LITTLE_TO_LEARN
UNUSUAL_TEXTS: dict[str, tuple[Content, str]] = {
    "UTF-16": (tiny_text().encode("utf-16"), r"text: text\.txt, 4,310 characters, 39 distinct"),
    "a lone surrogate in JSON": (json.dumps([tiny_text(), "\ud800"]), r"text: text\.txt, 4,\d{3} characters"),
    "beyond the basic plane": ("👍🏽 𝔸𝔹 😀\n" * 100, r"text: text\.txt, 800 characters, 7 distinct"),
    "5,000 distinct characters": (CJK, r"text: text\.txt, 6,000 characters, 5000 distinct"),
    "the shortest that will do": (tiny_text()[:55], r"text: text\.txt, 55 characters"),
}


def put(content: Content, path: Path) -> None:
    """Put a text in place of the user's."""
    path.unlink()
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_cannot_be_learned_from_is_refused(case: str, client: WarmClient, owner: Trainee) -> None:
    if case == "unreadable" and WITHOUT_POWERS is None:
        pytest.skip("root without setpriv may read everything")
    content, says = BAD_TEXTS[case]
    code = NO_INPUT if case in MISSING_TEXTS else BAD_DATA
    model, resume = owner.model.read_bytes(), owner.resume.read_bytes()
    put(content, owner.text)
    see_refused(client.run(owner.home, *TRAIN), code, says)
    if case not in TOO_LITTLE_TO_LEARN:
        done = client.run(owner.home, *EVALUATE)
        see(done, code, says)
        assert done.out == ""
    assert (owner.model.read_bytes(), owner.resume.read_bytes()) == (model, resume)


@pytest.mark.parametrize("case", UNUSUAL_TEXTS)
def test_an_unusual_text_is_learned_from(case: str, client: WarmClient, owner: Trainee) -> None:
    content, says = UNUSUAL_TEXTS[case]
    put(content, owner.text)
    done = client.run(owner.home, *TRAIN)
    see(done, OK, says)
    assert done.report["outcome"] == "finished"


@needs_proc
def test_a_text_larger_than_the_memory_is_refused(client: WarmClient, owner: Trainee) -> None:
    text = owner.home / "large.txt"
    text.write_text("To be or not to be,\n" * 2_000_000)
    before = owner.model.read_bytes()
    done = client.run(owner.home, "--data_path", "large.txt", *TINY, memory=client.size + (8 << 20))
    see_refused(done, OUT_OF_MEMORY, "out of memory; use a smaller model or text")
    assert owner.model.read_bytes() == before


# --- model files


class Hostile:
    """Something whose pickle runs code when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def change(**parts: Any) -> Callable[[Path], object]:
    """Replace parts of what is in a model file; a function makes the new part from the old one."""

    def spoil(path: Path) -> None:
        content = contents(path)
        torch.save(content | {name: new(content[name]) for name, new in parts.items()}, path)

    return spoil


def flip(path: Path) -> None:
    """Turn over one bit of the weights."""
    content = bytearray(path.read_bytes())
    content[content.index(contents(path)["model_state_dict"]["head.weight"].numpy().tobytes()) + 9] ^= 32
    path.write_bytes(content)


def with_nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One weight that is not a number."""
    name, weight = next(iter(weights.items()))
    return weights | {name: torch.full_like(weight, float("nan"))}


def without_last(mapping: dict[str, Any]) -> dict[str, Any]:
    """All entries but the last."""
    return dict(list(mapping.items())[:-1])


REMEDY = r"; restore a good copy or train again\."
ARCHIVE = r"it (is no checkpoint archive|cannot be read) \(damaged\?.*\)" + REMEDY
UNFIT = r"its config and weights do not fit this version of the model .*" + REMEDY
# A model file: how it is made from a good one, and what it is answered with.
NO_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, r"cannot be read \(No such file .*\); train a model first \(.*\) or name another"),
    "a folder": (lambda path: put(Path.mkdir, path), r"is a folder, pipe or device; name a model file"),
    "unreadable": (lambda path: path.chmod(0), r"cannot be read \(Permission denied\); check"),
}
DAMAGED_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:5000]), ARCHIVE),
    "a bit turned over": (flip, r"its part \S+ is damaged" + REMEDY),
    "a pickle that would run code": (
        lambda path: torch.save(contents(path) | {"metrics": Hostile(path.with_name("it-ran"))}, path),
        r"holds more than tensors .*code .* is never run" + REMEDY,
    ),
    "a state_dict of another project": (
        lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
        r"is not a charseq2seq model file" + REMEDY,
    ),
    "a resume state": (
        lambda path: path.write_bytes(path.with_name("transformer_model.resume.pth").read_bytes()),
        r"is the state of a run, not a model; the run's own command with --resume transformer_model\.pth .* writes the",
    ),
    "a newer format": (change(format_version=lambda _: 99), r"version is 99, this suite reads \d; use the version"),
    "a wrong vocabulary size": (change(vocab=without_last), r"its vocabulary and its model differ in size" + REMEDY),
    "weights that are not numbers": (change(model_state_dict=with_nan), r"numbers that are not finite" + REMEDY),
    "another architecture": (change(config=lambda old: old | {"d_ff": 64}), UNFIT),
    "a part too few": (change(metrics=lambda _: None), r"it lacks metrics" + REMEDY),
}
BAD_MODELS = NO_MODELS | DAMAGED_MODELS


def identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced; nothing where there is none."""
    if not path.exists():
        return ()
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_file_that_cannot_be_used_is_refused(case: str, client: WarmClient, owner: Trainee) -> None:
    if case == "unreadable" and WITHOUT_POWERS is None:
        pytest.skip("root without setpriv may read everything")
    spoil, says = BAD_MODELS[case]
    spoil(owner.model)
    found = identity(owner.model)
    for program, arguments in (
        ("train_transformer.py", EVALUATE),
        ("train_transformer.py", GENERATE),
        (PUSH, ["--dry_run", "--output_dir", "folder"]),
    ):
        asked_to_trust = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        done = client.run(owner.home, *arguments, program=program, memory=ENOUGH, **asked_to_trust)
        see(done, NO_INPUT if case in NO_MODELS else BAD_DATA, r"transformer_model\.pth.* " + says)
        assert done.out == ""
    assert not (owner.home / "it-ran").exists(), "the code in the file ran"
    assert not (owner.home / "folder").exists()
    assert identity(owner.model) == found


# --- generation


# A line: arguments of --mode generate, and after "->" how many characters are written, or a code and what is said.
GENERATIONS = r"""
--prompt 'sù sail?' --unknown skip -> 26
--prompt LONG -> 920
--prompt_file empty.txt -> 20
--prompt_file crlf.txt -> 25
--temperature 1e308 --top_p 1e-300 -> 20
--prompt ALL: --num_chars 0 -> 4
--prompt_file absent.txt -> NO_INPUT absent\.txt cannot be read: No such file.*; check --prompt_file
--prompt_file latin.txt -> BAD_DATA latin\.txt is not UTF-8: byte 0xF9 at offset 1;
--prompt_file /dev/zero -> BAD_DATA /dev/zero has more than 100,000,000 bytes; the model reads only
--temperature -1 -> USAGE --temperature must be a finite number at least 0, not '-1'
""".strip().splitlines()


@pytest.mark.parametrize("line", GENERATIONS)
def test_any_wish_for_text_is_granted_or_refused(line: str, client: WarmClient, owner: Trainee) -> None:
    for name, content in (("latin.txt", b"O\xf9"), ("empty.txt", b""), ("crlf.txt", b"ALL:\r\n")):
        (owner.home / name).write_bytes(content)
    words, answer = line.split(" -> ")
    arguments = [word.replace("LONG", "We sail, we sail! " * 50) for word in shlex.split(words)]
    done = client.run(owner.home, *GENERATE, *arguments)
    if answer.isdigit():
        assert done.code == OK and len(done.out) == int(answer) + 1, done.log  # and a newline
        return
    code, says = answer.split(maxsplit=1)
    see(done, ExitCode[code], says)
    assert done.out == ""


def test_stdin_is_the_prompt_where_that_is_asked_for(client: WarmClient, owner: Trainee) -> None:
    for name, content in (("prompt.txt", b"ALL:\r\n"), ("latin.txt", b"O\xf9")):
        (owner.home / name).write_bytes(content)
    done = client.run(owner.home, *GENERATE, "--prompt_file", "-", stdin="prompt.txt")
    assert done.code == OK and done.out.startswith("ALL:\n") and len(done.out) == 26 and done.log == ""
    done = client.run(owner.home, *GENERATE, stdin="prompt.txt")
    assert done.code == OK and len(done.out) == 21
    assert done.log.endswith("note: what comes on stdin is not read; --prompt_file - makes it the prompt.\n")
    done = client.run(owner.home, *GENERATE, "--prompt_file", "-", stdin="latin.txt")
    see(done, BAD_DATA, r"the prompt on stdin is not UTF-8: byte 0xF9 at offset 1; most likely it is")


def test_unknown_characters_of_a_prompt_are_named(client: WarmClient, owner: Trainee) -> None:
    done = client.run(owner.home, *GENERATE, "--prompt", "sù?\udcff")
    see(
        done,
        BAD_DATA,
        r"the text has 3 characters that the model never saw: '\?' \(U\+003F QUESTION MARK\), 'ù' \(U\+00F9 LATIN "
        r"SMALL LETTER U WITH GRAVE\), '\\udcff' \(U\+DCFF Cs\); leave them out or add --unknown skip\.",
    )
    assert done.out == ""


def test_a_vocabulary_with_a_lone_surrogate_writes_and_builds_a_folder(client: WarmClient, owner: Trainee) -> None:
    def with_surrogate(vocab: dict[str, int]) -> dict[str, int]:
        return without_last(vocab) | {"\ud800": len(vocab) - 1}

    change(vocab=with_surrogate)(owner.model)
    done = client.run(owner.home, *GENERATE, "--num_chars", "200", "--temperature", "5")
    assert done.code == 0 and "?" in done.out, done.log
    done = client.run(owner.home, "--dry_run", "--output_dir", "folder", program=PUSH)
    assert done.code == 0, done.log
    assert json.loads((owner.home / "folder" / "vocab.json").read_text())["\ud800"]


@needs_proc
def test_ten_million_characters_stream_in_constant_memory_until_nobody_reads(owner: Trainee) -> None:
    process = owner.start("--mode", "generate", "--num_chars", "10000000")
    assert process.stdout is not None and process.stderr is not None
    resident = []
    for characters in (2_000, 10_000):
        process.stdout.read(characters)
        resident += re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    assert int(resident[1]) - int(resident[0]) < 4_000, "KiB"
    process.stdout.close()
    log = process.stderr.read()
    assert process.wait() == ExitCode.OUTPUT_CLOSED and log == ""
