"""What a run is going to do: what was asked for, completed by what suits the device.

Every default stands here beside its reason; the reasons are printed when a run starts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charseq2seq.checkpoint import LARGEST_TABLE
from charseq2seq.device import choose_device, choose_precision
from charseq2seq.errors import SuiteError, join_problems

# Heads have 64 features (on a CPU they beat those of 32), the encoder a quarter of the decoder's layers or so.
SIZES: dict[str, dict[str, int]] = {
    # the smallest that is useful: about five minutes on two CPU cores, text worth reading
    "tiny": {"d_model": 192, "num_heads": 3, "num_encoder_layers": 1, "num_decoder_layers": 3, "d_ff": 1024},
    "small": {"d_model": 384, "num_heads": 6, "num_encoder_layers": 2, "num_decoder_layers": 6, "d_ff": 1536},
    "base": {"d_model": 512, "num_heads": 8, "num_encoder_layers": 2, "num_decoder_layers": 8, "d_ff": 2048},
    "large": {"d_model": 1024, "num_heads": 16, "num_encoder_layers": 4, "num_decoder_layers": 16, "d_ff": 4096},
}

_CPU_DEFAULTS: dict[str, Any] = {
    "dropout": 0.0,  # weight decay does its work, and better but for tiny texts (benchmarks/LOG.md)
    "source_length": 64,
    "target_length": 192,
    "batch_size": 16,
    "learning_rate": 0.04,
    "max_minutes": 4.5,  # the final evaluation and the sample take the rest of the five
}
_GPU_DEFAULTS = _CPU_DEFAULTS | {
    "batch_size": 128,
    "max_minutes": 10.0,
}

# What a model file knows of its model, but for the vocabulary's size.
MODEL_SIZES = (
    "d_model",
    "num_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "d_ff",
    "dropout",
    "source_length",
    "target_length",
)

# The bigram table has vocabulary size squared entries: exact and nearly free for an alphabet, absurd for CJK.
LARGEST_BIGRAM_VOCABULARY = 512


@dataclass(frozen=True)
class Settings:
    """A run, completely decided.

    Attributes:
        model: keyword arguments of `Transformer`, but for those that the corpus decides.
        max_steps: end after so many optimizer steps; None: no such limit.
        max_minutes: end after so much training time; None: no such limit. The first limit reached ends the run.
        weight_decay: of the hidden matrices, per unit of learning rate; None: what suits the text.
        patience: end after so many evaluations without improvement; None: never.
        eval_interval: steps from one evaluation to the next; None: twenty evaluations a run.
        device: "cpu", "cuda" or "mps".
        precision: "fp32", "bf16" or "fp16": of the forward and backward pass; the optimizers always work in fp32.
        parallel: what several processes do: "ddp", each has the whole model, or "fsdp", each has a part of it.
        reasons: why device, precision and size are what they are, for the user.
    """

    data_path: Path
    model_path: Path
    model: dict[str, Any]
    max_steps: int | None
    max_minutes: float | None
    patience: int | None
    batch_size: int
    learning_rate: float
    weight_decay: float | None
    seed: int
    eval_interval: int | None
    log_interval: int
    device: str
    precision: str
    compile: bool
    parallel: str
    accumulation_steps: int
    gradient_checkpointing: bool
    num_threads: int
    resume: str
    reasons: tuple[str, ...]

    def training_args(self) -> dict[str, Any]:
        """What a checkpoint says of the run: plain types, no path and no token."""
        return {
            "data": self.data_path.name,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "max_steps": self.max_steps,
            "max_minutes": self.max_minutes,
            "patience": self.patience,
            "eval_interval": self.eval_interval,
            "log_interval": self.log_interval,
            "seed": self.seed,
            "device": self.device,
            "precision": self.precision,
            "compile": self.compile,
            "parallel": self.parallel,
            "accumulation_steps": self.accumulation_steps,
            "gradient_checkpointing": self.gradient_checkpointing,
            "num_threads": self.num_threads,
            **self.model,
        }

    def model_config(self, vocab_size: int) -> dict[str, Any]:
        """All keyword arguments of `Transformer`."""
        return {"vocab_size": vocab_size, **self.model, "bigram": vocab_size <= LARGEST_BIGRAM_VOCABULARY}


def resolve_settings(args: argparse.Namespace, data_path: Path) -> Settings:
    """Complete the arguments by the defaults for the device found.

    Args:
        args: of train_transformer.py, checked; None where nothing was asked for.
        data_path: the text to train on.

    Raises:
        SuiteError: a device or precision was asked for that this machine does not have, or the model's sizes do not
            fit together; all of it at once.
    """
    import torch

    problems: list[str] = []
    device, device_reason = _noting(problems, choose_device, args.device)
    precision, precision_reason = _noting(problems, choose_precision, args.precision, device)
    size = args.size or ("tiny" if device == "cpu" else "base")
    defaults = SIZES[size] | (_CPU_DEFAULTS if device == "cpu" else _GPU_DEFAULTS)
    chosen = {name: default if (asked := getattr(args, name)) is None else asked for name, default in defaults.items()}
    problems += _size_problems(chosen)
    join_problems(problems)
    if args.max_steps is not None and args.max_minutes is None:
        chosen["max_minutes"] = None  # whoever counts steps does not want a clock
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    asked_for = [name for name in MODEL_SIZES if getattr(args, name) is not None]
    size_reason = f"size {size}: " + (
        "asked for" if args.size else f"default for a {'CPU' if device == 'cpu' else 'GPU'}"
    )
    if asked_for:
        size_reason += ", but for " + ", ".join(f"--{name}" for name in asked_for)
    return Settings(
        data_path=data_path,
        model_path=args.model_path,
        model={name: chosen[name] for name in MODEL_SIZES},
        max_steps=args.max_steps,
        max_minutes=chosen["max_minutes"],
        patience=args.patience,
        batch_size=chosen["batch_size"],
        learning_rate=chosen["learning_rate"],
        weight_decay=args.weight_decay,
        seed=args.seed,
        eval_interval=args.eval_interval,
        log_interval=args.log_interval,
        device=device,
        precision=precision,
        compile=args.compile,
        parallel=args.parallel,
        accumulation_steps=args.accumulation_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        num_threads=torch.get_num_threads(),
        resume=args.resume,
        reasons=(device_reason, precision_reason, size_reason),
    )


def _noting(problems: list[str], choose: Any, *asked: str) -> tuple[str, str]:
    """What `choose` chooses; where it refuses, the refusal is noted and the CPU's safe choice stands in for it."""
    try:
        chosen: tuple[str, str] = choose(*asked)
    except SuiteError as error:
        problems.append(str(error))
        return ("cpu", "") if choose is choose_device else ("fp32", "")
    return chosen


def _size_problems(chosen: dict[str, Any]) -> list[str]:
    d_model, num_heads = chosen["d_model"], chosen["num_heads"]
    source_length, target_length = chosen["source_length"], chosen["target_length"]
    longest = LARGEST_TABLE * num_heads // d_model
    problems = []
    if source_length + target_length > longest:
        problems.append(
            f"--source_length {source_length:,} and --target_length {target_length:,} are together more than "
            f"{longest:,}, the most that a model file may have with this --d_model; choose shorter ones or more heads."
        )
    if d_model % num_heads or d_model // num_heads % 2:
        problems.append(
            f"--d_model {d_model} cannot be divided into --num_heads {num_heads} heads of an even size; "
            f"choose --d_model {2 * num_heads * max(1, round(d_model / num_heads / 2))}, say."
        )
    return problems
