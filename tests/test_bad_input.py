"""Bad input, one table a kind: each row gets one clear sentence (what, where, what to do), its exit code and no
traceback, and leaves the files of earlier runs as they are.

The command line is what is tested. `WarmClient` checks for tracebacks; where a case has many variants of the same
thing, a few go through the command line and all of them through the loader.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from charseq2seq.checkpoint import load_checkpoint, load_resume_state
from charseq2seq.errors import ExitCode, SuiteError
from tests.hub.server import fake_token
from tests.train_client import TINY, Done, Trainee, assert_same, contents, strike_at, tiny_text
from tests.warm_client import WITHOUT_POWERS, WarmClient

OK, USAGE, BAD_DATA, NO_INPUT = ExitCode.OK, ExitCode.USAGE, ExitCode.BAD_DATA, ExitCode.NO_INPUT
OUT_OF_MEMORY, CANNOT_CREATE = ExitCode.OUT_OF_MEMORY, ExitCode.CANNOT_CREATE
TRAIN = ["--mode", "train", "--data_path", "text.txt", *TINY, "--max_steps", "2"]
EVALUATE = ["--mode", "evaluate", "--data_path", "text.txt"]
GENERATE = ["--mode", "generate", "--num_chars", "20"]
PUSH = "push_to_huggingface.py"
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
ENOUGH = 8 << 30  # bytes of address space for what must not take the machine's memory


@pytest.fixture(scope="module")
def client() -> Iterator[WarmClient]:
    """Runs command lines."""
    with WarmClient() as warm:
        yield warm


@pytest.fixture(scope="module")
def trained(client: WarmClient, tmp_path_factory: pytest.TempPathFactory) -> Trainee:
    """A user with a trained model, which no test may change."""
    trainee = Trainee(tmp_path_factory.mktemp("trained"))
    done = client.train(trainee, "--max_steps", "8")
    assert done.code == 0, done.log
    return trainee


@pytest.fixture
def user(trained: Trainee, tmp_path: Path) -> Trainee:
    """A user with a text, and with model and resume state of an earlier run."""
    trainee = Trainee(tmp_path / "user")
    trainee.model.write_bytes(trained.model.read_bytes())
    trainee.resume.write_bytes(trained.resume.read_bytes())
    return trainee


def see(done: Done, code: ExitCode, says: str) -> None:
    """Check how a command line ended: with this code and, where that is not 0, with one sentence that matches.

    A sentence says what is wrong and, after a semicolon, what to do.
    """
    assert done.code == code, done.log
    flat = " ".join(done.log.split())
    assert re.search(says, flat), done.log
    if code != OK:
        assert len(re.findall(r"\berror: |❌", done.log)) == 1, done.log
        assert done.log.replace("\n", "").isprintable() and len(re.split(r"\berror: |❌", flat)[1]) < 1000, done.log


def see_refused(done: Done, code: ExitCode, says: str) -> None:
    """As `see`, for a training run: its last line of stdout tells the same."""
    see(done, code, says)
    assert done.report["outcome"] == "failed" and done.report["exit_code"] == code
    assert re.search(says, " ".join(done.report["message"].split())), done.report


# --- texts


@dataclass(frozen=True)
class Text:
    """A text: what `text.txt` is made to be, and how training on it ends."""

    content: str | bytes | Callable[[Path], object]
    code: ExitCode
    says: str


def unreadable(path: Path) -> None:
    """Let nobody read a file."""
    path.touch()
    path.chmod(0)


CJK = "".join(chr(0x4E00 + (number * 17) % 5000) for number in range(6000))
UNUSABLE_TEXTS = {
    "missing": Text(lambda path: None, NO_INPUT, r"the text text\.txt does not exist; check --data_path\."),
    "a folder": Text(Path.mkdir, NO_INPUT, r"the folder \S*text\.txt holds no text \(\*\.txt, .*; name another"),
    "a pipe": Text(os.mkfifo, NO_INPUT, r"text\.txt is a pipe or device, not a text file; name a file"),
    "a device": Text(
        lambda path: path.symlink_to("/dev/zero"), NO_INPUT, r"text\.txt is a pipe or device, not a text file"
    ),
    "a link to nothing": Text(lambda path: path.symlink_to("absent"), NO_INPUT, r"text\.txt does not exist; check"),
    "unreadable": Text(
        unreadable, NO_INPUT, r"text\.txt cannot be read \(Permission denied\); check its permissions\."
    ),
    "empty": Text("", BAD_DATA, r"the text text\.txt is empty; give one with some thousands of characters\."),
    "nothing but a byte order mark": Text(b"\xef\xbb\xbf", BAD_DATA, r"text\.txt is empty; give"),
    "Latin-1": Text("Où ça?".encode("latin-1"), BAD_DATA, r"not UTF-8: byte 0xF9 at offset 1; convert it \(iconv"),
    "Latin-1 after a byte order mark": Text(
        b"\xef\xbb\xbfO\xf9", BAD_DATA, r"not UTF-8: byte 0xF9 at offset 4; convert it"
    ),
    "UTF-16": Text(tiny_text().encode("utf-16"), BAD_DATA, r"is UTF-16, not UTF-8; convert it \(iconv -f UTF-16"),
    "UTF-16 without a mark": Text(
        tiny_text().encode("utf-16-le"), BAD_DATA, r"has a NUL byte at offset 1: it is binary or UTF-16; give plain"
    ),
    "NUL bytes": Text(tiny_text() + "\0" + tiny_text(), BAD_DATA, r"has a NUL byte at offset 4,\d{3}: .*; give plain"),
    "cut within a character": Text(tiny_text().encode() + b"\xe2\x82", BAD_DATA, r"not UTF-8: .* at offset 4,\d{3};"),
    "surrogates as UTF-8 must not have them": Text(
        b"a\xed\xa0\x80b" * 999, BAD_DATA, r"not UTF-8: byte 0xED at offset 1; convert it"
    ),
}
TOO_LITTLE_TO_LEARN = {
    "one character": Text("a", BAD_DATA, r"has 1 characters?, training with these windows needs at least 55; give"),
    "shorter than a window": Text(
        tiny_text()[:20],
        BAD_DATA,
        r"has 20 characters, .* at least 55; give a longer text or a smaller --source_length",
    ),
    "one distinct character": Text("a" * 5000, BAD_DATA, r"text\.txt consists of one character repeated; "),
}
UNUSUAL_TEXTS = {
    "a byte order mark": Text(
        b"\xef\xbb\xbf" + tiny_text().encode(), OK, r"text: text\.txt, 4,310 characters, 39 dist"
    ),
    "CRLF": Text(tiny_text().replace("\n", "\r\n"), OK, r"text: text\.txt, 4,310 characters, 39 distinct"),
    "a lone surrogate in JSON": Text(json.dumps([tiny_text(), "\ud800"]), OK, r"text: text\.txt, 4,\d{3} characters"),
    "beyond the basic plane": Text("👍🏽 𝔸𝔹 😀\n" * 100, OK, r"text: text\.txt, 800 characters, 7 distinct"),
    "5,000 distinct characters": Text(CJK, OK, r"text: text\.txt, 6,000 characters, 5000 distinct"),
    "the shortest that will do": Text(tiny_text()[:55], OK, r"text: text\.txt, 55 characters"),
}


def put(text: Text, path: Path) -> None:
    """Put a text in place of the user's."""
    path.unlink()
    if callable(text.content):
        text.content(path)
    else:
        path.write_bytes(text.content.encode() if isinstance(text.content, str) else text.content)


@pytest.mark.parametrize("case", [*(UNUSABLE_TEXTS | TOO_LITTLE_TO_LEARN)])
def test_a_text_that_cannot_be_learnt_from_is_refused(case: str, client: WarmClient, user: Trainee) -> None:
    if case == "unreadable" and WITHOUT_POWERS is None:
        pytest.skip("root without setpriv may read everything")
    text = (UNUSABLE_TEXTS | TOO_LITTLE_TO_LEARN)[case]
    model, resume = user.model.read_bytes(), user.resume.read_bytes()
    put(text, user.text)
    see_refused(client.run(user.home, *TRAIN), text.code, text.says)
    if case in UNUSABLE_TEXTS:
        done = client.run(user.home, *EVALUATE)
        see(done, text.code, text.says)
        assert done.out == ""
    assert (user.model.read_bytes(), user.resume.read_bytes()) == (model, resume)


@pytest.mark.parametrize("case", UNUSUAL_TEXTS)
def test_an_unusual_text_is_learnt_from(case: str, client: WarmClient, user: Trainee) -> None:
    put(UNUSUAL_TEXTS[case], user.text)
    done = client.run(user.home, *TRAIN)
    see(done, OK, UNUSUAL_TEXTS[case].says)
    assert done.report["outcome"] == "finished"


def test_the_same_text_gives_the_same_model_with_a_mark_and_with_crlf(client: WarmClient, user: Trainee) -> None:
    weights = []
    for text in (tiny_text().encode(), b"\xef\xbb\xbf" + tiny_text().replace("\n", "\r\n").encode()):
        user.text.write_bytes(text)
        assert client.run(user.home, *TRAIN).code == 0
        weights.append(contents(user.model)["model_state_dict"])
    assert_same(*weights)


def test_a_line_of_50_megabytes_is_learnt_from(user: Trainee) -> None:
    user.text.write_text("We sail, we sail! " * 2_800_000)
    # A run that is stopped while an earlier model stands does not measure 5 million characters for a quarter minute.
    done = strike_at(user.start(*TRAIN, "--max_steps", "1000000", "--log_interval", "1"), 1, signal.SIGTERM)
    assert done.code == ExitCode.TERMINATED, done.log
    assert "text: text.txt, 50,400,000 characters, 10 distinct" in done.log


def test_a_text_that_changes_does_not_touch_the_run_that_has_read_it(client: WarmClient, user: Trainee) -> None:
    run = [*TRAIN[:-1], "60", "--eval_interval", "10", "--log_interval", "1"]
    assert client.run(user.home, *run).code == 0
    straight = contents(user.model)["model_state_dict"]
    process = user.start(*run)
    assert process.stderr is not None
    for line in process.stderr:
        if " step 5 (" in line:
            user.text.write_text("Another text altogether.\n" * 100)
    assert process.wait() == 0
    assert_same(straight, contents(user.model)["model_state_dict"])


def test_resuming_says_that_the_text_is_another(client: WarmClient, user: Trainee) -> None:
    run = [*TRAIN[:-1], "100000", "--eval_interval", "10", "--log_interval", "1"]
    assert strike_at(user.start(*run), 10, signal.SIGTERM).code == ExitCode.TERMINATED
    unfinished, model = user.resume.read_bytes(), user.model.read_bytes()
    user.text.write_text(tiny_text(61))
    done = client.run(user.home, *run, "--resume", user.resume.name)
    see_refused(done, USAGE, r"different run: corpus_sha256 was \w{64}, is \w{64}\. Give the same text and arguments")
    assert (user.resume.read_bytes(), user.model.read_bytes()) == (unfinished, model)
    done = client.run(user.home, *TRAIN)
    see(done, OK, r"unfinished run here is a different one: corpus_sha256 was .* lay there is kept as \S+earlier\.pth")
    assert (user.home / "transformer_model.resume.earlier.pth").read_bytes() == unfinished


# --- arguments


@dataclass(frozen=True)
class Arguments:
    """Arguments, besides those of a short training run, and what they are answered with."""

    arguments: tuple[str, ...]
    says: str
    code: ExitCode = USAGE


def wrong(arguments: str, says: str, code: ExitCode = USAGE) -> Arguments:
    """A row, its arguments as one string."""
    return Arguments(tuple(arguments.split()), says, code)


WRONG_ARGUMENTS = {
    "negative": wrong("--max_steps -3", r"--max_steps must be a whole number from 1 to 2,147,483,647, not '-3'"),
    "zero": wrong("--batch_size 0", r"--batch_size must be a whole number from 1 to 1,048,576, not '0'"),
    "no time": wrong("--max_minutes 0", r"--max_minutes must be a finite number above 0, not '0'"),
    "NaN": wrong("--learning_rate nan", r"--learning_rate must be a number above 0 and at most 1e\+36, not 'nan'"),
    "endless": wrong("--max_minutes inf", r"--max_minutes must be a finite number above 0, not 'inf'"),
    "huge": wrong(
        "--max_steps " + "9" * 40, r"--max_steps must be a whole number from 1 to 2,147,483,647, not '9{40}'"
    ),
    "half a layer": wrong("--num_encoder_layers 1.5", r"--num_encoder_layers must be a whole number from 1 to 1,024"),
    "not a number": wrong("--d_model wide", r"--d_model must be a whole number from 2 to 65,536, not 'wide'"),
    "all dropped": wrong("--dropout 1.0", r"--dropout must be a number at least 0 and below 1, not '1\.0'"),
    "no share": wrong("--dropout -0.1", r"--dropout must be a number at least 0 and below 1, not '-0\.1'"),
    "heads": wrong("--d_model 64 --num_heads 3", r"--d_model 64 cannot be divided into 3 heads of an even size"),
    "odd heads": wrong("--d_model 6 --num_heads 2", r"--d_model 6 cannot be divided into 2 heads of an even size"),
    "lengths that no model file may have": wrong(
        "--d_model 1024 --source_length 16384 --target_length 16384",
        r"--source_length 16,384 and --target_length 16,384 are together more than 16,384, the most",
    ),
    "more heads than features": wrong("--num_heads 1024", r"--d_model 16 cannot be divided into 1024 heads"),
    "unknown device": wrong("--device tpu", r"--device must be one of auto, cpu, cuda, mps, not 'tpu'"),
    "unknown precision": wrong("--precision int8", r"--precision must be one of auto, fp32, bf16, fp16, not 'int8'"),
    "unknown mode": wrong("--mode sleep", r"error: --mode must be one of train, evaluate, generate, not 'sleep'"),
    "unknown argument": wrong("--temprature 1", r"unrecognized arguments: --temprature 1"),
    "an argument of another mode": wrong("--num_chars 5", r"--num_chars belongs to --mode generate, not --mode train"),
    "a text to read while writing": wrong("--mode generate", r"--data_path belongs to --mode train and evaluate"),
    "a precision to write in": wrong(
        "--mode generate --precision bf16", r"--precision belongs to --mode train and evaluate"
    ),
    "the log over the prompt": wrong(
        "--mode generate --prompt_file prompt.txt --log_file prompt.txt",
        r"--log_file and --prompt_file name the same file, .*; choose another",
    ),
    "a NUL in a path": wrong("@nul.args", r"--data_path holds a NUL character"),
    "a resume state whose name is too long": wrong(
        "--resume " + "a" * 300, r"a{300} does not exist; --resume", NO_INPUT
    ),
    "publishing without pushing": wrong("--hf_repo_name poet", r"--hf_repo_name needs --push_to_hf"),
    "two tokens": wrong(
        "--push_to_hf --hf_token x --hf_token_file y", r"--hf_token and --hf_token_file exclude each other"
    ),
    "two prompts": wrong(
        "--mode generate --prompt x --prompt_file y", r"2 problems|--prompt and --prompt_file exclude each other"
    ),
    "arguments file missing": wrong("@absent.args", r"No such file or directory: 'absent\.args'"),
    "arguments file with an open quote": wrong("@open.args", r"arguments file cannot be read: .* close its quotes"),
    "arguments file that names itself": wrong("@circle.args", r"an arguments file names itself"),
    "fp16 on a CPU": wrong("--device cpu --precision fp16", r"--precision fp16 is for GPUs; on a CPU use bf16 or fp32"),
    "no model path": Arguments(("--model_path", ""), r"Is a directory;", CANNOT_CREATE),
    "the root as model path": wrong("--model_path /", r"write /: Is a directory;", CANNOT_CREATE),
    "the model over the text": wrong(
        "--model_path text.txt", r"--model_path and --data_path name the same file, .*; choose another"
    ),
    "the log over the text": wrong(
        "--log_file text.txt", r"--log_file and --data_path name the same file, .*; choose another"
    ),
    "the log over the model": wrong(
        "--log_file transformer_model.pth", r"--log_file and --model_path name the same file, .*; choose another"
    ),
    "the log over the resume state": wrong(
        "--log_file transformer_model.resume.pth",
        r"--log_file and the resume state of --model_path name the same file, .*; choose another",
    ),
    "the text under the lock": wrong(
        "--model_path text --data_path text.lock",
        r"--data_path and the lock of --model_path name the same file, .*; choose another",
    ),
    "more threads than anybody has": wrong(
        "--num_threads 4096", r"--num_threads must be a whole number from 1 to \d+, not"
    ),
    "a folder in the model's place": wrong("--model_path folder", r"Is a directory;", CANNOT_CREATE),
    "no folder for the model": wrong("--model_path no/m.pth", r"no/m\.pth: No such file or directory;", CANNOT_CREATE),
    "a file as the model's folder": wrong("--model_path text.txt/m.pth", r"Not a directory", CANNOT_CREATE),
    "a model path too long": wrong(f"--model_path {'n' * 300}.pth", r"File name too long;", CANNOT_CREATE),
    "a resume path too long": wrong(f"--model_path {'n' * 244}.pth", r"File name too long;", CANNOT_CREATE),
    "no folder for the log": wrong("--log_file no/x.log", r"no/x\.log: No such file or directory;", CANNOT_CREATE),
    "resume state missing": wrong("--resume absent.pth", r"absent\.pth does not exist; --resume takes", NO_INPUT),
    "resume state is a text": wrong("--resume text.txt", r"text\.txt cannot be used: it is no complete", BAD_DATA),
    "resume state is a model": wrong(
        "--resume transformer_model.pth", r"not a charseq2seq resume state file", BAD_DATA
    ),
    "a window longer than the text": wrong("--source_length 16384", r"needs at least 3\d,\d{3}; give a", BAD_DATA),
    "a model larger than the memory": wrong(
        "--d_model 65536 --d_ff 1048576", r"a model of [\d,]+ parameters takes about .* choose a smaller", OUT_OF_MEMORY
    ),
    "a batch larger than the memory": wrong(
        "--batch_size 1048576 --d_model 1024", r"out of memory: .* choose a smaller --batch_size", OUT_OF_MEMORY
    ),
    "a learning rate that explodes": wrong(
        "--learning_rate 1e36 --max_steps 6", r"the learning rate \(\S+\) is too high", ExitCode.DIVERGED
    ),
}
WRONG_ARGUMENTS |= {
    f"{device} asked for and absent": wrong(f"--device {device}", rf"--device {device}: this PyTorch .* finds no such")
    for device, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    if not there
}


@needs_proc
def test_a_text_larger_than_the_memory_is_refused(client: WarmClient, user: Trainee) -> None:
    text = user.home / "large.txt"
    text.write_text("To be or not to be,\n" * 2_000_000)
    before = user.model.read_bytes()
    done = client.run(user.home, "--data_path", "large.txt", *TINY, memory=client.size + (8 << 20))
    see_refused(done, OUT_OF_MEMORY, "out of memory; use a smaller model or text")
    assert user.model.read_bytes() == before


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_refused(case: str, client: WarmClient, user: Trainee) -> None:
    row = WRONG_ARGUMENTS[case]
    (user.home / "open.args").write_text('--prompt "unclosed\n')
    (user.home / "circle.args").write_text("@circle.args\n")
    (user.home / "nul.args").write_text("--data_path 'a\0b'\n")
    (user.home / "folder").mkdir()
    before = {path: path.read_bytes() for path in (user.text, user.model)}
    arguments = [*row.arguments, *([] if "--max_steps" in row.arguments else ["--max_steps", "2"])]
    done = client.run(user.home, "--data_path", "text.txt", *TINY, *arguments, memory=ENOUGH)
    see(done, row.code, row.says)
    assert {path: path.read_bytes() for path in before} == before
    assert "step 2" not in done.log or row.code == ExitCode.DIVERGED, "refused before work starts"
    assert not list(user.home.glob("*.tmp"))


def test_a_link_that_names_itself_gives_way_to_the_model(client: WarmClient, user: Trainee) -> None:
    (user.home / "round").symlink_to("round")
    done = client.run(user.home, "--data_path", "text.txt", *TINY, "--max_steps", "2", "--model_path", "round")
    assert done.code == 0 and load_checkpoint(user.home / "round"), done.log


def test_all_problems_are_told_at_once(client: WarmClient, user: Trainee) -> None:
    wrong_values = "--max_steps 0 --dropout nan --device tpu --d_model 10 --num_heads 4 --hf_private --top_k 3"
    done = client.run(user.home, *wrong_values.split(), "--bogus", fake_token("mistaken"))
    see(done, USAGE, r"error: \d problems:")
    for told in ("--max_steps must", "--dropout must", "--device must", "unrecognized arguments: --bogus …"):
        assert told in done.log
    done = client.run(user.home, *wrong_values.split())
    for told in ("--max_steps", "--dropout", "--device", "--d_model 10", "--hf_private needs", "--top_k belongs"):
        assert told in done.log
    absent = [device for device in ("cuda", "mps") if f"{device} asked for and absent" in WRONG_ARGUMENTS]
    if absent:
        done = client.run(user.home, "--device", absent[0], "--precision", "fp16", "--num_heads", "1024")
        see_refused(done, USAGE, r"3 problems:")


# --- model files


class Hostile:
    """Something whose pickle runs code when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@dataclass(frozen=True)
class Model:
    """A model file: how it is made from a good one, and what it is answered with."""

    spoil: Callable[[Path], object]
    says: str
    code: ExitCode = BAD_DATA


def cut(share: float) -> Callable[[Path], object]:
    """Cut a file short."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def change(**parts: Any) -> Callable[[Path], object]:
    """Replace parts of what is in a model file; a function makes the new part from the old one."""

    def spoil(path: Path) -> None:
        content = contents(path)
        torch.save(content | {name: new(content[name]) for name, new in parts.items()}, path)

    return spoil


def flip(path: Path, place: int | None = None) -> None:
    """Turn over one bit, by default in the middle of the weights."""
    content = bytearray(path.read_bytes())
    place = content.index(bytes(contents(path)["model_state_dict"]["head.weight"].numpy().tobytes())) * 8 + 77
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Put something else in the place of a file."""

    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def with_nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One weight that is not a number."""
    name, weight = next(iter(weights.items()))
    return weights | {name: torch.full_like(weight, float("nan"))}


def without_last(mapping: dict[str, Any]) -> dict[str, Any]:
    """All entries but the last."""
    return dict(list(mapping.items())[:-1])


def hostile_archive(path: Path) -> None:
    """A model file of ours with something in it that runs code."""
    torch.save(contents(path) | {"metrics": Hostile(path.with_name("it-ran"))}, path)


def hostile_pickle(path: Path) -> None:
    """A bare pickle that runs code."""
    path.write_bytes(pickle.dumps(Hostile(path.with_name("it-ran"))))


REMEDY = r"; restore a good copy or train again\."
UNUSABLE_MODELS = {
    "missing": Model(Path.unlink, r"does not exist; train a model first \(.*\) or name another", NO_INPUT),
    "a folder": Model(replaced_by(Path.mkdir), r"is a folder; name a model file", NO_INPUT),
    "a pipe": Model(replaced_by(os.mkfifo), r"is a pipe or device; name a model file", NO_INPUT),
    "unreadable": Model(lambda path: path.chmod(0), r"cannot be read \(Permission denied\); check", NO_INPUT),
    "empty": Model(lambda path: path.write_bytes(b""), r"no complete checkpoint archive \(cut short or.*" + REMEDY),
    "cut short": Model(cut(0.7), r"no complete checkpoint archive \(cut short or damaged\?\)" + REMEDY),
    "a bit turned over": Model(flip, r"its part \S+ is damaged" + REMEDY),
    "a pickle that would run code": Model(
        hostile_archive, r"calls upon .*system.*code in a file is never run" + REMEDY
    ),
    "a bare pickle that would run code": Model(hostile_pickle, r"no complete checkpoint archive \(.*" + REMEDY),
    "a state_dict of another project": Model(
        lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), r"is not a charseq2seq model file" + REMEDY
    ),
    "a resume state": Model(
        lambda path: path.write_bytes(path.with_name("transformer_model.resume.pth").read_bytes()),
        r"is not a charseq2seq model file" + REMEDY,
    ),
    "a newer format": Model(
        change(format_version=lambda _: 99), r"its format version is 99, this suite reads 4; update the suite"
    ),
    "a wrong vocabulary size": Model(
        change(vocab=without_last), r"its vocabulary and its model differ in size" + REMEDY
    ),
    "a vocabulary that is none": Model(change(vocab=lambda vocab: vocab | {"ab": 99}), r"not a single char.*" + REMEDY),
    "weights that are not numbers": Model(change(model_state_dict=with_nan), r"numbers that are not finite" + REMEDY),
    "a weight too few": Model(change(model_state_dict=without_last), r"weights do not fit its config" + REMEDY),
    "another architecture": Model(
        change(config=lambda config: config | {"d_ff": 64}), r"its weights do not fit its config" + REMEDY
    ),
    "a config of another model": Model(change(config=lambda config: config | {"rope": 1}), r"'rope', which.*" + REMEDY),
    "a part too few": Model(change(metrics=lambda _: None), r"it lacks metrics" + REMEDY),
}


def identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced; nothing where there is none."""
    if not path.exists():
        return ()
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("case", UNUSABLE_MODELS)
def test_a_model_file_that_cannot_be_used_is_refused(case: str, client: WarmClient, user: Trainee) -> None:
    if case == "unreadable" and WITHOUT_POWERS is None:
        pytest.skip("root without setpriv may read everything")
    row = UNUSABLE_MODELS[case]
    row.spoil(user.model)
    found = identity(user.model)
    says = r"transformer_model\.pth.* " + row.says
    for program, arguments in (
        ("train_transformer.py", EVALUATE),
        ("train_transformer.py", GENERATE),
        (PUSH, ["--dry_run", "--output_dir", "folder"]),
    ):
        done = client.run(user.home, *arguments, program=program, memory=ENOUGH)
        see(done, row.code, says)
        assert done.out == ""
    assert not (user.home / "it-ran").exists(), "the code in the file ran"
    assert not (user.home / "folder").exists()
    assert identity(user.model) == found


def test_code_in_a_file_does_not_run_even_where_the_environment_asks_torch_to_trust(
    client: WarmClient, user: Trainee
) -> None:
    hostile_archive(user.model)
    done = client.run(user.home, *GENERATE, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    see(done, BAD_DATA, r"code in a file is never run")
    assert not (user.home / "it-ran").exists()


def refusal(load: Callable[[Path], object], path: Path) -> str | None:
    """The sentence with which a file is refused; None where it is read."""
    try:
        load(path)
    except SuiteError as error:
        assert error.exit_code == BAD_DATA
        return str(error)
    return None


def test_a_file_cut_short_anywhere_is_refused(trained: Trainee, tmp_path: Path) -> None:
    for source, load in ((trained.model, load_checkpoint), (trained.resume, load_resume_state)):
        whole = source.read_bytes()
        cuts = [0, 1, 3, 4, 100, *(len(whole) * part // 12 for part in range(1, 12))]
        cuts += [len(whole) - rest for rest in (1, 2, 21, 22, 98, 1000)]
        assert len(cuts) >= 20
        for length in cuts:
            (tmp_path / "cut.pth").write_bytes(whole[:length])
            said = refusal(load, tmp_path / "cut.pth")
            assert said is not None and "no complete checkpoint archive" in said, length


def test_a_bit_turned_over_anywhere_is_refused_or_changes_nothing(trained: Trainee, tmp_path: Path) -> None:
    chance = random.Random(4)
    for source, load in ((trained.model, load_checkpoint), (trained.resume, load_resume_state)):
        whole, good = source.read_bytes(), contents(source)
        refused = 0
        for _ in range(100):
            spoilt = bytearray(whole)
            spoilt[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            (tmp_path / "flipped.pth").write_bytes(spoilt)
            if refusal(load, tmp_path / "flipped.pth") is not None:
                refused += 1
            else:  # in the padding between the parts, or in what zip files say twice
                assert_same(good, contents(tmp_path / "flipped.pth"))
        assert refused > 50


# --- generation


@dataclass(frozen=True)
class Generation:
    """Arguments of --mode generate, and what they are answered with."""

    arguments: tuple[str, ...]
    code: ExitCode
    says: str = ""
    characters: int = 20


LONG_PROMPT = "We sail, we sail! " * 50
GENERATIONS = {
    "unknown characters": Generation(
        ("--prompt", "sù?\udcff"),
        BAD_DATA,
        r"the prompt has 3 characters that the model never saw: '\?' \(U\+003F QUESTION MARK\), 'ù' \(U\+00F9 LATIN "
        r"SMALL LETTER U WITH GRAVE\), '\\udcff' \(U\+DCFF Cs\); leave them out or add --unknown skip\.",
    ),
    "unknown characters left out": Generation(("--prompt", "sù sail?", "--unknown", "skip"), OK, characters=26),
    "nothing known in the prompt": Generation(("--prompt", "ÄÖ", "--unknown", "skip"), OK),
    "a prompt longer than the window": Generation(("--prompt", LONG_PROMPT), OK, characters=20 + len(LONG_PROMPT)),
    "no prompt file": Generation(
        ("--prompt_file", "absent.txt"), NO_INPUT, r"absent\.txt cannot be read: No such file.*; check --prompt_file"
    ),
    "a folder as prompt file": Generation(("--prompt_file", "."), NO_INPUT, r"cannot be read: Is a directory; check"),
    "a prompt file in Latin-1": Generation(
        ("--prompt_file", "latin.txt"), BAD_DATA, r"latin\.txt is not UTF-8 \(byte offset 1\); convert it"
    ),
    "an endless prompt file": Generation(
        ("--prompt_file", "/dev/zero"), BAD_DATA, r"/dev/zero has more than 100,000,000 bytes; the model reads only"
    ),
    "an empty prompt file": Generation(("--prompt_file", "empty.txt"), OK),
    "a prompt file of CRLF": Generation(("--prompt_file", "crlf.txt"), OK, characters=20 + len("ALL:\n")),
    "temperature 0": Generation(("--temperature", "0"), OK),
    "temperature next to nothing": Generation(("--temperature", "1e-320"), OK),
    "temperature 1e-30": Generation(("--temperature", "1e-30", "--top_k", "100000"), OK),
    "temperature 1e9": Generation(("--temperature", "1e9"), OK),
    "temperature 1e308": Generation(("--temperature", "1e308", "--top_p", "1e-300"), OK),
    "temperature below 0": Generation(
        ("--temperature", "-1"), USAGE, r"--temperature must be a finite number at least 0, not '-1'"
    ),
    "temperature NaN": Generation(("--temperature", "nan"), USAGE, r"--temperature must be a finite number at least 0"),
    "top_p 0": Generation(("--top_p", "0"), USAGE, r"--top_p must be a number above 0 and at most 1, not '0'"),
    "top_p 2": Generation(("--top_p", "2"), USAGE, r"--top_p must be a number above 0 and at most 1, not '2'"),
    "top_k 0": Generation(("--top_k", "0"), USAGE, r"--top_k must be a whole number from 1 to"),
    "no characters": Generation(("--prompt", "ALL:", "--num_chars", "0"), OK, characters=4),
    "fewer than no characters": Generation(("--num_chars", "-1"), USAGE, r"--num_chars must be a whole number from 0"),
    "device absent": Generation(("--device", "tpu"), USAGE, r"--device must be one of"),
}


@pytest.mark.parametrize("case", GENERATIONS)
def test_any_wish_for_text_is_granted_or_refused(case: str, client: WarmClient, user: Trainee) -> None:
    for name, content in (("latin.txt", b"O\xf9"), ("empty.txt", b""), ("crlf.txt", b"ALL:\r\n")):
        (user.home / name).write_bytes(content)
    row = GENERATIONS[case]
    done = client.run(user.home, *GENERATE, *row.arguments)
    see(done, row.code, row.says)
    assert len(done.out) == (row.characters + 1 if row.code == OK else 0), "and a newline"


def test_a_vocabulary_with_a_lone_surrogate_writes_and_builds_a_folder(client: WarmClient, user: Trainee) -> None:
    def with_surrogate(vocab: dict[str, int]) -> dict[str, int]:
        return without_last(vocab) | {"\ud800": len(vocab) - 1}

    change(vocab=with_surrogate)(user.model)
    done = client.run(user.home, *GENERATE, "--num_chars", "200", "--temperature", "5")
    assert done.code == 0 and "?" in done.out, done.log
    done = client.run(user.home, "--dry_run", "--output_dir", "folder", program=PUSH)
    assert done.code == 0, done.log
    assert json.loads((user.home / "folder" / "vocab.json").read_text())["\ud800"]


def resident_kilobytes(pid: int) -> int:
    """What a process has in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


@needs_proc
def test_ten_million_characters_stream_in_constant_memory_until_nobody_reads(user: Trainee) -> None:
    process = user.start("--mode", "generate", "--num_chars", "10000000")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(2_000)
    before = resident_kilobytes(process.pid)
    process.stdout.read(10_000)
    assert resident_kilobytes(process.pid) - before < 4_000
    process.stdout.close()
    log = process.stderr.read()
    assert process.wait() == ExitCode.OUTPUT_CLOSED and log == ""
