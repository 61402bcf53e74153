"""Command lines that have to be refused (and some that just pass), for same_before_and_after.py to run and record."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRAIN, PUSH = "train_transformer.py", "push_to_huggingface.py"


def words(line: str) -> list[str]:
    """A line as arguments, with what cannot stand in it as it is."""
    stand_ins = {"EMPTY": "", "LONGNAME": "n" * 300, "LONGNAME.pth": "n" * 300 + ".pth", "UNKNOWN": "sù?"}
    return [stand_ins.get(word, word) for word in line.split()]


TINY = words("--d_model 16 --num_heads 2 --num_encoder_layers 1 --num_decoder_layers 1 --d_ff 32")
TINY += words("--source_length 8 --target_length 16 --batch_size 4")


def tiny_text(repeats: int = 60) -> str:
    """A text of about 70 characters a repeat, with something to learn in it."""
    return "".join(
        f"FIRST CITIZEN:\nSpeak to the {number % 7} ships, speak.\n\nALL:\nWe sail, we sail {number}!\n\n"
        for number in range(repeats)
    )


@dataclass(frozen=True)
class Case:
    """A command line that is refused, or just not.

    Args:
        arguments: of the command line, after the script.
        program: the script.
        prepare: makes the folder what it has to be; a text there, a model and its resume state are there already.
    """

    arguments: list[str]
    program: str = TRAIN
    prepare: Callable[[Path], object] = field(default=lambda home: None)


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Write a file into the folder."""
    whole = content if isinstance(content, bytes) else content.encode()
    return lambda home: replaced(home / name).write_bytes(whole)


def on(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Do something to a file of the folder."""
    return lambda home: make(home / name)


def replaced(path: Path) -> Path:
    """The path, with nothing there."""
    path.unlink(missing_ok=True)
    return path


def unreadable(path: Path) -> None:
    """Let nobody read a file."""
    path.touch()
    path.chmod(0)


def text_cases() -> dict[str, Case]:
    """Texts that cannot be learnt from."""
    text = tiny_text()
    contents: dict[str, str | bytes] = {
        "empty": "",
        "nothing but a byte order mark": b"\xef\xbb\xbf",
        "Latin-1": "Où ça?".encode("latin-1"),
        "Latin-1 after a byte order mark": b"\xef\xbb\xbfO\xf9",
        "UTF-16": text.encode("utf-16"),
        "UTF-16 without a mark": text.encode("utf-16-le"),
        "NUL bytes": text + "\0" + text,
        "cut within a character": text.encode() + b"\xe2\x82",
        "surrogates": b"a\xed\xa0\x80b" * 999,
        "one character": "a",
        "shorter than a window": text[:20],
        "one distinct character": "a" * 5000,
        "a damaged gzip file": b"\x1f\x8b\x08\x00not gzip at all",
    }
    makers: dict[str, Callable[[Path], object]] = {
        "missing": replaced,
        "a folder": lambda path: replaced(path).mkdir(),
        "a pipe": lambda path: os.mkfifo(replaced(path)),
        "a device": lambda path: replaced(path).symlink_to("/dev/zero"),
        "a link to nothing": lambda path: replaced(path).symlink_to("absent"),
        "unreadable": unreadable,
    }
    prepared = {name: write("text.txt", content) for name, content in contents.items()}
    prepared |= {name: on("text.txt", make) for name, make in makers.items()}
    modes = {"train on": [*TINY, "--max_steps", "2"], "evaluate": ["--mode", "evaluate"]}
    return {
        f"{mode} a text: {name}": Case(["--data_path", "text.txt", *arguments], prepare=prepare)
        for name, prepare in prepared.items()
        for mode, arguments in modes.items()
    }


ARGUMENTS = """
--max_steps -3
--batch_size 0
--max_minutes 0
--learning_rate nan
--max_minutes inf
--max_steps 9999999999999999999999999999999999999999
--num_encoder_layers 1.5
--d_model wide
--dropout 1.0
--dropout -0.1
--d_model 64 --num_heads 3
--d_model 6 --num_heads 2
--d_model 1024 --source_length 16384 --target_length 16384
--num_heads 1024
--device tpu
--device cuda
--device mps
--precision int8
--mode sleep
--temprature 1
--num_chars 5
--mode generate
--mode generate --precision bf16
--mode generate --prompt_file prompt.txt --log_file prompt.txt
@nul.args
--resume LONGNAME
--hf_repo_name poet
--push_to_hf --hf_token x --hf_token_file y
--mode generate --prompt x --prompt_file y
@absent.args
@open.args
@circle.args
--device cpu --precision fp16
--model_path EMPTY
--model_path /
--model_path text.txt
--log_file text.txt
--log_file transformer_model.pth
--log_file transformer_model.resume.pth
--model_path text --data_path text.lock
--num_threads 4096
--model_path folder
--model_path no/m.pth
--model_path text.txt/m.pth
--model_path LONGNAME.pth
--log_file no/x.log
--resume absent.pth
--resume text.txt
--resume transformer_model.pth
--source_length 16384
--d_model 65536 --d_ff 1048576
--batch_size 1048576 --d_model 1024
--learning_rate 1e36 --max_steps 6
--max_steps 0 --dropout nan --device tpu --d_model 10 --num_heads 4 --hf_private --top_k 3 --bogus hf_secret
--unknown skip
--patience 0
--eval_interval 0
--size enormous
--weight_decay -1
--log_interval 0
--accumulation_steps 0
"""
GENERATE_ARGUMENTS = """
--prompt UNKNOWN
--prompt_file absent.txt
--prompt_file .
--prompt_file latin.txt
--prompt_file /dev/zero
--prompt_file empty.txt
--prompt_file crlf.txt
--temperature 0
--temperature 1e-320
--temperature 1e-30 --top_k 100000
--temperature 1e9
--temperature 1e308 --top_p 1e-300
--temperature -1
--temperature nan
--top_p 0
--top_p 2
--top_k 0
--num_chars 0 --prompt ALL:
--num_chars -1
--num_samples 0
--device tpu
--max_steps 5
--unknown sometimes
"""
PUSH_ARGUMENTS = """
--check --dry_run
--token x --token_file y
--create_pr --tag v1
--create_pr --revision other
--timeout 0
--only_if_better -1
--bogus
--dry_run --model_path absent.pth
--dry_run --output_dir text.txt
--dry_run --output_dir folder
--token_file absent.txt --check
--check
--check --token x
--dry_run --repo_name a/b/c
--dry_run --repo_name ..
--dry_run --username -bad-
--check --json
"""


def prepare_arguments(home: Path) -> None:
    """Files that wrong arguments name."""
    for name, content in (("open.args", '--prompt "unclosed\n'), ("circle.args", "@circle.args\n")):
        (home / name).write_text(content)
    (home / "nul.args").write_text("--data_path 'a\0b'\n")
    (home / "latin.txt").write_bytes(b"O\xf9")
    (home / "empty.txt").write_bytes(b"")
    (home / "crlf.txt").write_bytes(b"ALL:\r\n")
    (home / "folder").mkdir()
    (home / "folder" / "mine.txt").write_text("not to be lost")


def argument_cases() -> dict[str, Case]:
    """Wrong arguments of both scripts."""
    cases: dict[str, Case] = {}
    for line in ARGUMENTS.strip().splitlines():
        more = [] if "--max_steps" in line else ["--max_steps", "2"]
        cases[f"train {line}"] = Case(["--data_path", "text.txt", *TINY, *words(line), *more])
    for line in GENERATE_ARGUMENTS.strip().splitlines():
        cases[f"generate {line}"] = Case(["--mode", "generate", "--num_chars", "20", *words(line)])
    for line in PUSH_ARGUMENTS.strip().splitlines():
        cases[f"push {line}"] = Case(words(line), PUSH)
    return {name: Case(case.arguments, case.program, prepare_arguments) for name, case in cases.items()}


class Hostile:
    """Something whose pickle runs code when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it-ran",)


def changed(**parts: Callable[[Any], Any]) -> Callable[[Path], object]:
    """Replace parts of what is in the model file by what a function makes of them."""
    import torch

    def change(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(content | {name: new(content.get(name)) for name, new in parts.items()}, path)

    return change


def without_last(mapping: dict[str, Any]) -> dict[str, Any]:
    """All entries but the last."""
    return dict(list(mapping.items())[:-1])


def flip(path: Path) -> None:
    """Change one bit in the middle of the weights."""
    import torch

    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["model_state_dict"]["head.weight"]
    content[content.index(weight.numpy().tobytes()) + 9] ^= 32
    path.write_bytes(content)


def model_cases() -> dict[str, Case]:
    """Model files that cannot be used."""
    import torch

    def with_nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name, weight = next(iter(weights.items()))
        return weights | {name: torch.full_like(weight, float("nan"))}

    spoilt: dict[str, Callable[[Path], object]] = {
        "missing": replaced,
        "a folder": lambda path: replaced(path).mkdir(),
        "a pipe": lambda path: os.mkfifo(replaced(path)),
        "unreadable": lambda path: path.chmod(0),
        "empty": lambda path: path.write_bytes(b""),
        "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10]),
        "one bit changed": flip,
        "a pickle that would run code": changed(metrics=lambda _: Hostile()),
        "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Hostile())),
        "a state_dict": lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
        "a resume state": lambda path: shutil.copy(path.with_name("transformer_model.resume.pth"), path),
        "a newer format": changed(format_version=lambda _: 99),
        "a wrong vocabulary size": changed(vocab=without_last),
        "a vocabulary that is none": changed(vocab=lambda vocab: vocab | {"ab": 99}),
        "weights that are not numbers": changed(model_state_dict=with_nan),
        "a weight too few": changed(model_state_dict=without_last),
        "another architecture": changed(config=lambda config: config | {"d_ff": 64}),
        "a config of another model": changed(config=lambda config: config | {"rope": 1}),
        "a part too few": changed(metrics=lambda _: None),
    }
    commands = {
        "evaluate": (TRAIN, ["--mode", "evaluate", "--data_path", "text.txt"]),
        "generate with": (TRAIN, ["--mode", "generate", "--num_chars", "20"]),
        "push": (PUSH, ["--dry_run", "--output_dir", "made"]),
    }
    return {
        f"{verb} a model: {name}": Case(arguments, program, on("transformer_model.pth", spoil))
        for name, spoil in spoilt.items()
        for verb, (program, arguments) in commands.items()
    }
