"""The options of both programs, a row each: flag, range, default, help, and what else depends on them.

A row gives the parser, `--help`, what a checkpoint records of its run, whether an unfinished run may be continued with
another value, and the command on the model card. A new option is one row here, and the lines that use it.
"""

# ruff: noqa: RUF009 (a row is a dataclass field, made by a function)
from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from charseq2seq.command_line import FILE, SWITCH, Kind, Options, filled, number, one_of, option, read_options, whole
from charseq2seq.device import choose_device, choose_precision, choose_threads, device_problems
from charseq2seq.errors import refuse_wrong_arguments, require_packages
from charseq2seq.files import lock_path, metrics_path, resume_path
from charseq2seq.text_encoding import known_encoding

_SIZED = ("d_model", "num_heads", "num_kv_heads", "num_encoder_layers", "num_decoder_layers", "d_ff")
# Heads have 64 features (on a CPU they beat those of 32), the encoder about a quarter of the decoder's layers. Nano and
# micro are for short texts; tiny makes text worth reading in about five minutes on two CPU cores.
SIZES: dict[str, dict[str, int]] = {
    "nano": dict(zip(_SIZED, (64, 2, 2, 1, 2, 256), strict=True)),
    "micro": dict(zip(_SIZED, (128, 2, 2, 1, 3, 512), strict=True)),
    "tiny": dict(zip(_SIZED, (192, 3, 1, 1, 3, 1024), strict=True)),
    "small": dict(zip(_SIZED, (384, 6, 6, 2, 6, 1536), strict=True)),
    "base": dict(zip(_SIZED, (512, 8, 8, 2, 8, 2048), strict=True)),
    "large": dict(zip(_SIZED, (1024, 16, 16, 4, 16, 4096), strict=True)),
}

# The bigram table has vocabulary size squared weights: few for an alphabet, far too many for Chinese.
LARGEST_BIGRAM_VOCABULARY = 512

MODEL = "model (train; defaults depend on the device and are printed)"
RUN = "run (train; the first limit ends it, one that is given replaces the defaults)"
DEFAULT_MODEL_PATH, DEFAULT_REPO_NAME = Path("transformer_model.pth"), "shakespeare-transformer"

_POSITIVE = number("a finite number above 0", lambda x: x > 0)
_NOT_NEGATIVE = number("a finite number at least 0", lambda x: x >= 0)
_RATE = number("a number above 0 and at most 1e+36", lambda x: 0 < x <= 1e36)
_DROPPED = number("a number at least 0 and below 1", lambda x: 0 <= x < 1)
_PROBABILITY = number("a number above 0 and at most 1", lambda x: 0 < x <= 1)
_COUNT, _THREADS = whole(1, 1_048_576), whole(1, 4 * (os.cpu_count() or 1))
_RESULT: dict[str, Any] = {"recorded": True, "changes_weights": True}

# `option`, with what the rows of a group have in common.
_what = partial(option, group="what to do")
_train = partial(option, modes=("train",))
_model = partial(_train, group=MODEL, **_RESULT)
_course = partial(_train, group=RUN)  # these do not change the weights
_run = partial(_course, **_RESULT)
_memory = partial(_train, group="memory and speed (train)", recorded=True)
_publishing = partial(_train, group="publishing (train)", needs="push_to_hf")
_text = partial(option, group="text (generate)", modes=("generate",))
_NAME, _TEXT, _TOKEN, _ENCODING = filled("NAME"), Kind("TEXT"), filled("TOKEN"), Kind("NAME", known_encoding)
_TOKEN_HELP = "Hugging Face token; others on this machine can see it, HF_TOKEN is safer"
_OWNER_HELP = "owner, a user or organisation (default: HF_USERNAME, else the token's user)"


@dataclass(frozen=True)
class Settings(Options):
    """The options of train_transformer.py, a field each.

    An option that was not given is None if its default depends on the device or the text, whatever its type here is.
    `resolve_settings` and then `with_text_defaults` fill it in.
    """

    mode: str = _what(one_of("train", "evaluate", "generate", "demo"), "what to do", "train")
    model_path: Path = _what(FILE, "the model file: train writes it, the others read it", DEFAULT_MODEL_PATH)
    data_path: Path = _what(
        FILE._replace(metavar="PATH"),
        "a UTF-8 text: a file, a folder of *.txt or a quoted pattern, plain or .gz, .bz2, .xz (default: Shakespeare's "
        "plays, prepared on first use). evaluate scores the validation split of the model's text, all of any other",
        modes=("train", "evaluate"),
    )
    encoding: str | None = _what(_ENCODING, "of --data_path and --prompt_file, as gb18030 (default: UTF-8)", **_RESULT)
    device: str = _what(
        one_of("auto", "cpu", "cuda", "mps"),
        "where to compute (default: auto, a GPU if there is one; but the CPU to write one text with size tiny)",
        "auto",
        **_RESULT,
    )
    precision: str = _what(
        one_of("auto", "fp32", "bf16", "fp16"),
        "of the arithmetic (default: auto, what the device is fast in)",
        "auto",
        modes=("train", "evaluate"),
        **_RESULT,
    )
    num_threads: int = _what(_THREADS, "CPU threads (default: all there are, generate 1)", recorded=True)
    seed: int = _what(whole(0), "of weights, batches and samples: one seed gives one result", 1337, **_RESULT)
    log_file: Path | None = _what(FILE, "write the log there too (10 MB, 3 old ones kept)")
    json: bool = _what(
        SWITCH,
        "print one line of JSON and nothing else, also where something goes wrong",
        modes=("train", "evaluate", "generate"),
    )
    unknown: Literal["error", "skip"] | None = _what(
        one_of("error", "skip"),
        "what to do with characters that the model never saw (default: generate error, evaluate skip)",
        modes=("evaluate", "generate"),
    )

    # The model; --size decides its sizes where none is given.
    size: str = _train(
        one_of(*SIZES),
        "nano (0.16 million parameters), micro (0.8), tiny (2), small (14), base (32) or large (252); training takes "
        "0.1, 0.4, 1 or 7 GiB from tiny on, and activations. The flags below change parts of it (default: by the "
        "text's length, at most tiny on a CPU, base on a GPU)",
        group=MODEL,
    )
    d_model: int = _model(whole(2, 65_536), "features per position")
    num_heads: int = _model(whole(1, 1024), "attention heads; d_model / num_heads must be even")
    num_kv_heads: int = _model(whole(1, 1024), "key/value heads, each for a group of attention heads")
    num_encoder_layers: int = _model(whole(1, 1024), "layers that read the source")
    num_decoder_layers: int = _model(whole(1, 1024), "layers that write the target")
    d_ff: int = _model(_COUNT, "features inside a feed-forward block")
    dropout: float = _model(
        _DROPPED, "fraction of features dropped in training (default: 0; 0.1 if a large model reads a small text often)"
    )
    source_length: int = _model(whole(1, 16_384), "characters that the encoder reads", 64)
    target_length: int = _model(whole(1, 16_384), "characters that the decoder writes", 192)

    # The run; the first limit reached ends it.
    max_steps: int | None = _run(whole(1), "end after so many optimizer steps (default: no limit)")
    max_epochs: float | None = _run(_POSITIVE, "end after so many passes over the text (default: by its length)")
    max_minutes: float | None = _run(_POSITIVE, "end after so many minutes of training (default: CPU 4.5, GPU 10)")
    patience: int | None = _run(whole(1), "evaluations without improvement that end it (default: 5, none with a limit)")
    batch_size: int = _run(
        _COUNT,
        "windows per step in all (default: 4 or 8 for a short text; else 16 on a CPU, 32 on a GPU, 128 for over 10 "
        "million characters)",
    )
    learning_rate: float = _run(_RATE, "highest learning rate of Muon, the optimizer of the hidden weights", 0.04)
    weight_decay: float | None = _run(
        _NOT_NEGATIVE, "times the learning rate, at every step (default: hidden weights shrink to a quarter an epoch)"
    )
    eval_interval: int | None = _run(whole(1), "steps between evaluations (default: twenty evaluations a run)")
    log_interval: int = _course(whole(1), "steps between lines of progress where there is no terminal", 100)
    tensorboard: Path | None = _course(Kind("DIR", FILE.convert), "write TensorBoard's event files into this folder")
    resume: str = _course(
        Kind("auto|never|FILE", os.path.expanduser),
        "auto continues an unfinished run of the same text and arguments; FILE extends a finished one",
        "auto",
    )

    accumulation_steps: int = _memory(_COUNT, "compute each batch in so many parts, which saves memory", 1)
    gradient_checkpointing: bool = _memory(SWITCH, "compute activations twice: a third more time, far less memory")

    push_to_hf: bool = _publishing(SWITCH, "push to the Hugging Face Hub when training has ended", needs="")
    hf_repo_name: str = _publishing(_NAME, "repository name", DEFAULT_REPO_NAME)
    hf_username: str | None = _publishing(_NAME, _OWNER_HELP)
    hf_token: str | None = _publishing(_TOKEN, _TOKEN_HELP, excludes="hf_token_file")
    hf_token_file: Path | None = _publishing(FILE, "file that holds the token")
    hf_private: bool = _publishing(SWITCH, "create a private repository")

    prompt: str = _text(_TEXT, "text to continue", "", excludes="prompt_file")
    prompt_file: Path | None = _text(FILE, "a UTF-8 file to continue; - is stdin")
    num_chars: int = _text(whole(0), "characters to write", 500)
    num_samples: int = _text(whole(1), "texts to write", 1)
    interactive: bool = _text(SWITCH, "write after each line that is typed; /help lists the commands")
    temperature: float = _text(_NOT_NEGATIVE, "0 takes the likeliest character, 1 samples from the model as it is", 0.8)
    top_k: int | None = _text(whole(1), "sample from the N likeliest characters (default: all)")
    top_p: float | None = _text(_PROBABILITY, "sample from the fewest characters of this probability (default: 1, all)")

    reasons: tuple[str, ...] = ()  # why device, precision, threads and size are what they are, for the user
    undecided: frozenset[str] = frozenset()  # the options that were not asked for

    def model_config(self, vocab_size: int) -> dict[str, Any]:
        """The keyword arguments of `Transformer`."""
        sizes = {name: getattr(self, name) for name in MODEL_OPTIONS}
        return {"vocab_size": vocab_size, **sizes, "bigram": vocab_size <= LARGEST_BIGRAM_VOCABULARY}

    def training_args(self) -> dict[str, Any]:
        """What a checkpoint records of the run: plain types, no path and no token."""
        return {"data": self.data_path.name} | {n: getattr(self, n) for n, row in OPTIONS.items() if row.recorded}

    def identity(self) -> dict[str, Any]:
        """The options that decide a run's weights; `--resume auto` continues a run only if all of them are the same."""
        return {name: getattr(self, name) for name, row in OPTIONS.items() if row.changes_weights}

    def contradictions(self) -> Iterator[str]:
        """Files that would be written over each other, and answers that have no form."""
        if self.interactive and (self.json or self.num_samples > 1):
            yield "--interactive writes one text at a time as text; leave out --json and --num_samples"
        names = ["log_file", "model_path", "data_path", "prompt_file", "hf_token_file"]
        paths = {f"--{name}": path for name in names if (path := getattr(self, name)) is not None}
        if self.mode == "train" and self.model_path.name:
            paths["the resume state of --model_path"] = resume_path(self.model_path)
            paths["the lock of --model_path"] = lock_path(self.model_path)
            paths["the metrics of --model_path"] = metrics_path(self.model_path)
        for (one, path), (other, same) in itertools.combinations(paths.items(), 2):
            if (file := os.path.realpath(path)) == os.path.realpath(same):
                yield f"{one} and {other} name the same file, {file}; choose another for one of them"


OPTIONS = Settings.rows()
LIMITS = {"max_steps", "max_epochs", "max_minutes"}
MODEL_OPTIONS = tuple(name for name, row in OPTIONS.items() if row.group == MODEL and row.recorded)
read_settings = partial(read_options, Settings)


def training_command(training_args: Mapping[str, Any], steps: int | None) -> list[str]:
    """The flags that train a model like a given one, for its card; options that this version lacks are left out.

    Where a time limit ended the run they ask for its steps: another machine makes more or fewer in that time.
    """
    told = {name: training_args.get(name) for name, row in OPTIONS.items() if row.changes_weights}
    told |= {"device": None, "max_minutes": None}
    if training_args.get("max_minutes") or not told["max_steps"]:
        told["max_steps"] = steps
    given = {name: value for name, value in told.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items()]


def resolve_settings(asked: Settings, data_path: Path) -> Settings:
    """Fill in the text to train on and what the device decides; refuse what the device lacks and unfitting sizes.

    This comes before torch is imported, see `choose_threads`.
    """
    num_threads, threads_reason = choose_threads(asked.num_threads)
    device, device_reason = choose_device(asked.device)
    precision, precision_reason = choose_precision(asked.precision, device)
    undecided = frozenset(name for name in OPTIONS if getattr(asked, name) is None)
    usual = ("tiny", "default for a CPU") if device == "cpu" else ("base", "default for a GPU")
    size, size_reason = (asked.size, "asked for") if asked.size else usual
    if changed := [f"--{name}" for name in MODEL_OPTIONS if getattr(asked, name) != OPTIONS[name].default]:
        size_reason += f", except {', '.join(changed)}"
    defaults: dict[str, Any] = {"size": size, **SIZES[size], "num_threads": num_threads}
    if asked.num_heads:  # the default has to divide it
        defaults["num_kv_heads"] = math.gcd(asked.num_heads, defaults["num_kv_heads"])
    if undecided >= LIMITS:  # a limit of steps or epochs replaces that of time
        defaults["max_minutes"] = 4.5 if device == "cpu" else 10.0  # with evaluation and sample 5 minutes
    settings = replace(
        asked,
        **{name: value for name, value in defaults.items() if name in undecided},
        data_path=data_path,
        device=device,
        precision=precision,
        hf_token=None,  # training needs no token, and what it does not have it cannot leak
        reasons=(device_reason, precision_reason, threads_reason, f"size {size}: {size_reason}"),
        undecided=undecided,
    )
    refuse_wrong_arguments([*device_problems(device, precision), *_size_problems(settings)])
    if settings.tensorboard:
        require_packages("--tensorboard", "tensorboard", pip="tensorboard")
    return settings


def _size_problems(settings: Settings) -> Iterator[str]:
    from encoder_decoder_transformer import LARGEST_TABLE

    d_model, heads, longest = settings.d_model, settings.num_heads, settings.source_length + settings.target_length
    if d_model % (2 * heads):
        near = 2 * heads * max(1, round(d_model / heads / 2))
        yield f"--d_model {d_model} cannot be divided into {heads} heads of an even size; choose --d_model {near}, say."
    if heads % settings.num_kv_heads:
        yield f"--num_kv_heads {settings.num_kv_heads} must divide --num_heads {heads}; choose 1, say."
    if longest > (most := LARGEST_TABLE * heads // d_model):
        yield f"--source_length and --target_length are together more than {most:,}; choose shorter ones or more heads."


# --- push_to_huggingface.py

_what, _where, _who, _how = (partial(option, group=title) for title in ("what", "where", "who", "how"))


@dataclass(frozen=True)
class PushOptions(Options):
    """The options of push_to_huggingface.py, a field each."""

    model_path: Path = _what(FILE, "the model file", DEFAULT_MODEL_PATH)
    output_dir: Path | None = _what(FILE._replace(metavar="DIR"), "build the repository folder here and keep it")
    only_if_better: float | None = _what(
        _NOT_NEGATIVE._replace(metavar="MARGIN"),
        "push only if the loss is lower than the published one, by more than MARGIN nats per character (default: 0)",
        without_value=0.0,
    )
    with_space: bool = _what(SWITCH, "also publish a page where the model writes, as the static Space NAME-demo")
    with_runs: bool = _what(SWITCH, "also publish the course of the training as TensorBoard's events, in runs/")
    repo_name: str = _where(_NAME, "repository name", DEFAULT_REPO_NAME)
    username: str | None = _where(_NAME, _OWNER_HELP)
    private: bool = _where(SWITCH, "create a private repository")
    revision: str = _where(filled("BRANCH"), "branch to push to, made if needed", "main")
    create_pr: bool = _where(SWITCH, "propose the push as a pull request")
    tag: str | None = _where(filled("TAG"), "name the commit, e.g. v1.0")
    commit_message: str | None = _where(_TEXT, "commit message (default: loss, steps and version)")
    overwrite: bool = _where(SWITCH, "push over a repository that this suite did not make")
    token: str | None = _who(_TOKEN, _TOKEN_HELP, excludes="token_file")
    token_file: Path | None = _who(FILE, "file that holds the token")
    check: bool = _how(SWITCH, "only find out whether a push could work", excludes="dry_run")
    dry_run: bool = _how(SWITCH, "do everything but send, and print the plan")
    no_verify: bool = _how(SWITCH, "do not download and run what was pushed")
    timeout: float = _how(_POSITIVE._replace(metavar="SECONDS"), "seconds to wait for one answer", 60.0)
    json: bool = _how(SWITCH, "print the result, or what went wrong, as one line of JSON")

    def contradictions(self) -> Iterator[str]:
        if self.create_pr and (self.tag or self.revision != "main"):
            yield "--create_pr proposes to main and tags nothing, so neither --tag nor --revision goes with it"
        if self.with_space and (self.create_pr or self.revision != "main"):
            yield "--with_space shows what is on main, so neither --create_pr nor --revision goes with it"


read_push_options = partial(read_options, PushOptions)
