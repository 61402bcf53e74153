"""The command lines: a wrong one is refused at once, with all that is wrong with it; `--help` tells the rest."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from charseq2seq import __version__
from charseq2seq.errors import ExitCode
from charseq2seq.options import (
    OPTIONS,
    SIZES,
    PushOptions,
    read_push_options,
    read_settings,
    resolve_settings,
    training_command,
)
from encoder_decoder_transformer import Transformer
from tests.hub.server import fake_token
from tests.train_client import TINY, Trainee, see, see_refused
from tests.warm_client import WarmClient

ENOUGH = 1 << 30  # bytes beside those of the imports, for what must not take the machine's memory
PROGRAMS = ["train_transformer.py", "push_to_huggingface.py"]

# A line: exit code, arguments besides those of a short training run, and after "->" what the answer matches.
WRONG_ARGUMENTS = r"""
USAGE --max_steps -3 -> --max_steps must be a whole number from 1 to 2,147,483,647, not '-3'
USAGE --learning_rate nan -> --learning_rate must be a number above 0 and at most 1e\+36, not 'nan'
USAGE --d_model 64 --num_heads 3 -> --d_model 64 cannot be divided into 3 heads of an even size; choose --d_model 66
USAGE --num_kv_heads 3 -> --num_kv_heads 3 must divide --num_heads 2; choose 1, say
USAGE --d_model 1024 --source_length 16384 --target_length 16384 -> are together more than 16,384; choose shorter
USAGE --device cpu --precision fp16 -> --precision fp16 is for GPUs; on a CPU use bf16 or fp32
USAGE --mode sleep -> error: --mode must be one of train, evaluate, generate, demo, not 'sleep'
USAGE --temprature 1 -> unrecognized arguments: --temprature 1; did you mean --temperature\?
USAGE --num_chars 5 -> --num_chars belongs to --mode generate, not --mode train
USAGE --mode generate -> --data_path belongs to --mode train and evaluate, not --mode generate
USAGE --mode generate --prompt_file prompt.txt --log_file prompt.txt -> --log_file and --prompt_file name the same file
USAGE --mode generate --prompt x --prompt_file y -> --prompt and --prompt_file exclude each other
USAGE --hf_repo_name poet -> --hf_repo_name needs --push_to_hf
USAGE @nul.args -> --data_path must be a path without NUL characters, not
USAGE --mode generate --prompt --num_chars 5 -> --prompt needs a value; one that is itself a flag is given as --prompt=V
USAGE --data_path text.txt transformer_model.pth -> unrecognized arguments: transformer_model\.pth; quote a pattern, so
USAGE @open.args -> the arguments file open\.args cannot be read: .*; close its quotes
USAGE @latin.args -> the arguments file latin\.args cannot be read: it is not UTF-8
USAGE @circle.args -> --seed must be a whole number from 0 to 2,147,483,647, not .many
USAGE --model_path text.txt -> --model_path and --data_path name the same file, .*; choose another
USAGE --log_file transformer_model.resume.pth -> --log_file and the resume state of --model_path name the same file, .*;
USAGE --log_file transformer_model.pth.lock -> --log_file and the lock of --model_path name the same file, .*; choose
USAGE --log_file transformer_model.metrics.jsonl -> --log_file and the metrics of --model_path name the same file, .*;
CANNOT_CREATE --model_path '' -> Is a directory;
CANNOT_CREATE --model_path no/m.pth -> no/m\.pth: No such file or directory;
CANNOT_CREATE --model_path N244.pth -> File name too long;
CANNOT_CREATE --log_file no/x.log -> no/x\.log: No such file or directory;
NO_INPUT --resume absent.pth -> absent\.pth does not exist; --resume takes
BAD_DATA --resume transformer_model.pth -> not a charseq2seq resume state file
BAD_DATA --source_length 16384 -> needs at least 3\d,\d{3}; give a
OUT_OF_MEMORY --d_model 65536 --d_ff 1048576 -> a model of [\d,]+ parameters takes about .* choose a smaller
OUT_OF_MEMORY --batch_size 1048576 --d_model 1024 -> out of memory: .* choose a smaller --batch_size
DIVERGED --learning_rate 1e36 --max_steps 6 -> the learning rate \(\S+\) is too high
""".strip().splitlines()
ABSENT = [device for device in ("cuda", "mps") if not getattr(torch, device).is_available()]
WRONG_ARGUMENTS += [
    rf"USAGE --device {device} -> --device {device}: this PyTorch .* finds no such" for device in ABSENT
]


@pytest.mark.parametrize("line", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_refused(line: str, client: WarmClient, owner: Trainee) -> None:
    name, rest = line.split(maxsplit=1)
    code, (words, says) = ExitCode[name], rest.split(" -> ")
    for file, content in (
        ("open", b'--prompt "unclosed\n'),
        ("circle", b"@circle.args --seed many\n"),
        ("nul", b"--data_path 'a\0b'\n"),
        ("latin", b"--prompt \xe9\n"),
    ):
        (owner.home / f"{file}.args").write_bytes(content)
    before = {path: path.read_bytes() for path in (owner.text, owner.model)}
    arguments = shlex.split(re.sub(r"N(\d+)", lambda length: "n" * int(length[1]), words))
    arguments += [] if "--max_steps" in arguments else ["--max_steps", "2"]
    memory = client.size + ENOUGH if Path("/proc/self/status").exists() else 0
    done = client.run(owner.home, "--data_path", "text.txt", *TINY, *arguments, memory=memory)
    (see_refused if done.out else see)(done, code, says)
    assert done.out or code == ExitCode.USAGE, "only a command line that is not understood has no report"
    assert {path: path.read_bytes() for path in before} == before
    assert "step 2" not in done.log or code == ExitCode.DIVERGED, "refused before work starts"
    assert not list(owner.home.glob("*.tmp"))


def test_all_problems_are_told_at_once(client: WarmClient, user: Trainee) -> None:
    wrong_values = "--max_steps 0 --dropout nan --device tpu --hf_private --top_k 3"
    done = client.run(user.home, *wrong_values.split(), "--bogus", fake_token("mistaken"))
    see(done, ExitCode.USAGE, r"error: 6 problems:")
    for told in ("max_steps must", "dropout must", "device must", "arguments: --bogus …", "private needs", "k belongs"):
        assert told in done.log
    done = client.run(user.home, "--num_heads", "1024", "--num_kv_heads", "3", "--device", ABSENT[0])
    see_refused(done, ExitCode.USAGE, rf"3 problems: .*--device {ABSENT[0]}.* into 1024 heads .*--num_kv_heads 3 must")


def test_arguments_come_from_a_file_too(client: WarmClient, owner: Trainee) -> None:
    (owner.home / "nightly.args").write_text(
        '# every night\n--mode generate --num_chars 5\n--prompt "We sail"  # quoted as in a shell\n',
        encoding="utf-8-sig",  # as Windows' editors save it
    )
    done = client.run(owner.home, "@nightly.args", "--num_chars", "6")
    assert done.code == 0 and len(done.out) == len("We sail") + 6 + 1, done.log


def test_a_value_may_begin_like_a_flag_or_an_arguments_file() -> None:
    for text in ("-the", "--", "@bob: better", "-1", ""):
        assert read_settings(["--mode", "generate", "--prompt", text]).prompt == text
    push = read_push_options(["--username", "@alice", "--commit_message", "@bob: better", "--only_if_better"])
    assert (push.username, push.commit_message, push.only_if_better) == ("@alice", "@bob: better", 0.0)


def test_a_tilde_is_the_home_where_the_shell_leaves_it() -> None:
    settings = read_settings(["--data_path=~/x.txt", "--model_path=./~", "--resume=~/y.pth"])
    assert (settings.data_path, settings.resume) == (Path.home() / "x.txt", str(Path.home() / "y.pth"))
    assert settings.model_path == Path("~")


# --- help


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_a_terminal_and_imports_no_torch(program: str, user: Trainee) -> None:
    for name in ("torch", "numpy"):
        (user.home / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    shadowed = {"PYTHONPATH": str(user.home), "COLUMNS": "80"}
    shown = user.run("--help", program=program, **shadowed)
    assert shown.code == 0 and max(map(len, shown.out.splitlines())) <= 80
    assert shown.out.count(f"python {program}") >= 2, "examples"
    assert user.run("--version", program=program, **shadowed).out == f"charseq2seq {__version__}\n"
    wrong = user.run("--bogus", "--token", "x", "--token_file", "y", program=program, **shadowed)
    assert wrong.code == 2 and "was imported" not in wrong.log


def test_help_has_an_example_of_every_mode_and_every_option(user: Trainee) -> None:
    told = user.run("--help").out
    examples = re.findall(r"^    python train_transformer.py ?([^@\n]*)$", told, re.MULTILINE)
    modes = {read_settings(shlex.split(words)).mode for words in examples}
    assert modes == set(OPTIONS["mode"].kind.metavar.split("|"))
    assert all(f"  --{name}" in told and row.help for name, row in OPTIONS.items())
    for size, shape in SIZES.items():
        with torch.device("meta"):
            config: dict[str, Any] = {"vocab_size": 70, **shape}
            parameters = sum(weight.numel() for weight in Transformer(**config).parameters())
        (millions,) = re.findall(rf"\b{size} \(([\d.]+)", " ".join(told.split()))
        assert float(millions) == pytest.approx(parameters / 1e6, rel=0.05), size


# --- what else the rows decide


def test_a_size_can_be_asked_for_and_changed(tmp_path: Path) -> None:
    fewer = resolve_settings(read_settings(["--size", "small", "--d_model", "192", "--num_heads", "3"]), tmp_path)
    assert fewer.num_kv_heads == 3, "the default fits what was asked for"
    settings = resolve_settings(read_settings(["--size", "small", "--d_ff", "64", "--device", "cpu"]), tmp_path)
    config = settings.model_config(66)
    assert config | SIZES["small"] | {"d_ff": 64} == config
    assert "size small: asked for, except --d_ff" in settings.reasons
    assert settings.model_config(512)["bigram"] and not settings.model_config(513)["bigram"], "no table for CJK"


def test_defaults_depend_on_the_device_and_a_limit_of_steps_needs_no_clock(tmp_path: Path) -> None:
    for words, steps, minutes in (("", None, 4.5), ("--max_steps 9", 9, None), ("--max_steps 9 --max_minutes 1", 9, 1)):
        settings = resolve_settings(read_settings(["--device", "cpu", *words.split()]), tmp_path)
        assert (settings.size, settings.max_steps, settings.max_minutes) == ("tiny", steps, minutes)


def test_a_checkpoint_records_the_run_and_neither_paths_nor_tokens(tmp_path: Path) -> None:
    asked = read_settings(["--push_to_hf", "--hf_token", "secret", "--log_file", "x.log", "--device", "cpu"])
    settings = resolve_settings(asked, tmp_path / "text.txt")
    recorded = settings.training_args()
    assert recorded["data"] == "text.txt" and recorded["seed"] == 1337 and "secret" not in repr(settings)
    assert not {"model_path", "data_path", "log_file", "hf_token", "resume", "size"} & recorded.keys()
    assert set(settings.identity()) < set(recorded)
    only_rounding = {"num_threads", "accumulation_steps", "gradient_checkpointing"}
    assert recorded.keys() - settings.identity().keys() == {"data", *only_rounding}


def test_the_command_for_such_a_model_is_understood_and_counts_steps(tmp_path: Path) -> None:
    settings = resolve_settings(
        read_settings(["--device", "cpu", "--dropout", "0.1", "--batch_size", "16", "--gradient_checkpointing"]),
        tmp_path,
    )
    recorded = settings.training_args() | {"nesterov": True}  # of another version
    words = " ".join(training_command(recorded, steps=77)).split()
    again = read_settings(words)
    assert (again.max_steps, again.max_minutes, again.dropout, again.batch_size) == (77, None, 0.1, 16)
    assert not {"--nesterov", "--gradient_checkpointing", "--device", "--patience", "--log_interval"} & set(words)
    assert again.model_config(66) == settings.model_config(66)


def test_the_flags_of_the_guide_are_here() -> None:
    assert OPTIONS.keys() >= {"mode", "push_to_hf", "hf_repo_name", "hf_username", "hf_token", "hf_private"}
    flags = {"model_path", "repo_name", "username", "token", "private", "commit_message"}
    assert PushOptions.rows().keys() >= flags
