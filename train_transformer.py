"""Train a small encoder-decoder Transformer on a text, measure it, and let it write.

    python train_transformer.py --mode train                                   # about five minutes on two CPU cores
    python train_transformer.py --mode evaluate                                # one JSON object
    python train_transformer.py --mode generate --prompt "ROMEO:" --num_chars 1000
    python train_transformer.py @nightly.args                                  # arguments from a file

Results (text, figures, the model's address) go to stdout, everything else to stderr. The README has the exit codes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq.arguments import CommandLine, number, one_of, whole
from charseq2seq.console import (
    leave_speaking_to_another,
    log,
    log_error,
    log_to_file,
    run,
    stopped_by,
    write_result,
)
from charseq2seq.device import use_threads
from charseq2seq.errors import SuiteError, as_refusal
from charseq2seq.files import lock_path, resume_path
from charseq2seq.training.parallel import is_follower, started_by_torchrun

if TYPE_CHECKING:
    from charseq2seq.publishing.preflight import PublishRequest
    from charseq2seq.training.loop import Outcome

SAMPLE_PROMPT, SAMPLE_CHARACTERS = "ROMEO:", 500
LATE_ENOUGH = 0.8  # share of a run: weights that were best before that tell of too long a run


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    args = parse_arguments(argv)
    return {"train": train, "evaluate": evaluate, "generate": generate}[args.mode](args)


def train(args: argparse.Namespace) -> int:
    """Train, and publish if asked to; stdout ends with one line of JSON, however that went."""
    started = time.monotonic()
    report: dict[str, Any] = {"outcome": "failed"}
    try:
        code = train_and_publish(args, report)
    except (SuiteError, MemoryError, RuntimeError) as error:
        refusal = as_refusal(error)
        log_error(refusal)
        report["message"] = str(refusal)
        code = refusal.exit_code
    except KeyboardInterrupt as stop:  # while reading, preparing, writing the sample or pushing
        code = stopped_by(stop)
        report["outcome"] = "stopped"
    report |= {"duration_seconds": round(time.monotonic() - started, 1), "exit_code": int(code)}
    write_result(json.dumps(report) + "\n")
    return code


def train_and_publish(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Check everything, prepare the text, train, show what was learnt, and publish it.

    Args:
        args: the command line.
        report: filled in with what happened.

    Returns:
        The exit code.
    """
    if is_follower():  # of several processes one speaks, writes and pushes
        leave_speaking_to_another()
    else:
        open_log_file(args)
    from charseq2seq.training.run import train as train_model
    from charseq2seq.training.settings import resolve_settings
    from data.prepare import DEFAULT_CORPUS, prepare

    settings = resolve_settings(args, args.data_path or DEFAULT_CORPUS)
    if is_follower():
        return train_model(settings).stopped_by or 0
    request = publish_request(args) if args.push_to_hf else None
    if request is not None:
        from charseq2seq.publishing.preflight import preflight

        preflight(request)
    if args.data_path is None:
        prepare()
    outcome = train_model(settings)
    report |= {"outcome": "finished", "steps": outcome.steps, "training_seconds": round(outcome.seconds, 1)}
    if outcome.evaluation is not None:
        report |= {"model_path": str(args.model_path), "best_step": outcome.best_step, **outcome.evaluation.facts()}
        show_outcome(args.model_path, outcome)
    if outcome.stopped_by is not None:
        report["outcome"] = "stopped"
        log(f"stopped: everything is saved; {what_is_left(args, outcome)}.")
        return outcome.stopped_by
    if request is None:
        log(f"next: python train_transformer.py --mode generate --model_path {args.model_path}")
        log(f"      python push_to_huggingface.py --model_path {args.model_path} --dry_run")
        return 0
    return push(args.model_path, request, report)


def what_is_left(args: argparse.Namespace, outcome: Outcome) -> str:
    """How to go on after a stop, in words."""
    if not outcome.complete:
        with_resume = "" if args.resume == "auto" else ", with --resume auto,"
        return f"the same command{with_resume} continues this run"
    if not args.push_to_hf:
        return "the run itself was complete"
    push = ["python", "push_to_huggingface.py", "--model_path", str(args.model_path)]
    for name in ("repo_name", "username", "token_file"):  # but not the token
        value = getattr(args, f"hf_{name}")
        push += [f"--{name}", str(value)] if value else []
    push += ["--private"] * args.hf_private
    return f"the run itself was complete, but the model is not pushed yet: {shlex.join(push)}"


def show_outcome(model_path: Path, outcome: Outcome) -> None:
    """Print a sample of what the model writes, and how good it is."""
    from charseq2seq.checkpoint import load_checkpoint
    from charseq2seq.generation import Sampling, fastest_writer, known_prompt, stream_text

    assert outcome.evaluation is not None
    use_threads(1)  # as --mode generate; numpy, which is imported by now, keeps as many as it has
    checkpoint = load_checkpoint(model_path)
    vocabulary = checkpoint.vocabulary()
    prompt = known_prompt(vocabulary, SAMPLE_PROMPT, "skip")
    write_result(prompt)
    writer = fastest_writer(checkpoint.build_model())
    for text in stream_text(writer, vocabulary, prompt, SAMPLE_CHARACTERS, Sampling()):
        write_result(text)
    write_result("\n")
    facts = outcome.evaluation.facts()
    log(
        f"validation: {facts['nats_per_char']:.4f} nats per character ({facts['bits_per_char']:.4f} bits), "
        f"best of {outcome.steps:,} steps at {outcome.best_step:,}"
    )
    if outcome.complete and outcome.best_step < LATE_ENOUGH * outcome.steps:
        log(
            "after that step it grew: most likely the model was learning its text by heart. A shorter run "
            f"(--max_steps {outcome.best_step}) should end better, and so may --dropout 0.2 or more text."
        )
    log(f"model: {model_path}")


def push(model_path: Path, request: PublishRequest, report: dict[str, Any]) -> int:
    """Publish the finished model; it stays where it is if that fails."""
    from charseq2seq.publishing.publish import publish

    report["outcome"] = "finished, not pushed"
    try:
        pushed = publish(model_path, request)
    except SuiteError:
        log(f"the model is safe in {model_path}; push it later with push_to_huggingface.py.")
        raise
    report |= {"outcome": pushed.state, "url": pushed.url, "commit": pushed.commit}
    write_result(pushed.url + "\n")
    return 0


def publish_request(args: argparse.Namespace) -> PublishRequest:
    """The publishing flags, as the push understands them."""
    from charseq2seq.publishing.preflight import DEFAULT_REPO_NAME, PublishRequest

    return PublishRequest(
        repo_name=args.hf_repo_name or DEFAULT_REPO_NAME,
        username=args.hf_username,
        token=args.hf_token,
        token_file=args.hf_token_file,
        private=args.hf_private,
    )


def evaluate(args: argparse.Namespace) -> int:
    """Print the model's loss on a text as JSON on stdout and in words on stderr."""
    open_log_file(args)
    from charseq2seq.checkpoint import load_checkpoint
    from charseq2seq.device import choose_device, choose_precision
    from charseq2seq.training.evaluation import evaluate_file
    from data.prepare import prepare

    use_threads(args.num_threads)
    checkpoint = load_checkpoint(args.model_path)
    device, _ = choose_device(args.device)
    # As it was trained; bf16 only where the device is fast in it.
    as_trained = args.precision == "auto" and checkpoint.training_args.get("precision") == "fp32"
    precision, _ = choose_precision("fp32" if as_trained else args.precision, device)
    path = args.data_path or prepare()
    facts = evaluate_file(checkpoint, path, device, precision, args.unknown or "skip")
    log(
        f"{facts['nats_per_char']:.4f} nats per character ({facts['bits_per_char']:.4f} bits, perplexity "
        f"{facts['perplexity']:.3f}) on {facts['characters']:,} characters of {path.name} ({facts['split']})"
    )
    write_result(json.dumps(facts) + "\n")
    return 0


def generate(args: argparse.Namespace) -> int:
    """Print text that the model writes, as it is written."""
    open_log_file(args)
    # One row is too little to share: with a second thread it waits whenever anything else uses a core (LOG.md).
    threads = args.num_threads or 1
    if args.num_threads or "OPENBLAS_NUM_THREADS" not in os.environ:
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)  # which numpy reads when it is imported, below
    from charseq2seq.checkpoint import load_checkpoint
    from charseq2seq.device import choose_device
    from charseq2seq.generation import Sampling, fastest_writer, is_small, known_prompt, read_prompt, stream_text

    use_threads(threads)
    prompt = read_prompt(args.prompt_file) if args.prompt_file else args.prompt
    device, _ = choose_device(args.device)
    checkpoint = load_checkpoint(args.model_path)
    vocabulary = checkpoint.vocabulary()
    prompt = known_prompt(vocabulary, prompt, args.unknown or "error")
    model = checkpoint.build_model()
    writer = fastest_writer(model if args.device == "auto" and is_small(model) else model.to(device))
    for sample in range(args.num_samples):
        if sample:
            write_result(f"\n{'-' * 40}\n")
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed + sample)
        write_result(prompt)
        for text in stream_text(writer, vocabulary, prompt, args.num_chars, sampling):
            write_result(text)
    write_result("\n")
    return 0


def open_log_file(args: argparse.Namespace) -> None:
    """Write the log to --log_file too."""
    if args.log_file is not None:
        log_to_file(args.log_file)


# --- the command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with status 2 and all that is wrong with it."""
    parser = CommandLine(description=__doc__, usage="%(prog)s [--mode MODE] [options] [@file]")
    of_mode = {
        "evaluate": add_shared_arguments(parser),
        "train": add_training_arguments(parser) + add_device_arguments(parser) + add_publishing_arguments(parser),
        "generate": add_generation_arguments(parser),
    }
    args = parser.parse_args(argv)
    used = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    problems = [
        f"--{name} belongs to --mode {mode}, not --mode {args.mode}"
        for mode in ("train", "generate")
        if args.mode not in (mode, None)  # None: mistyped, which is a problem of its own
        for name in of_mode[mode]
        if name in used
    ]
    if args.mode == "train":
        problems += [f"--{name} needs --push_to_hf" for name in sorted(used) if name.startswith("hf_")] * (
            not args.push_to_hf
        )
        problems += ["--unknown belongs to --mode evaluate and generate"] if "unknown" in used else []
    if args.mode == "generate":
        problems += [f"--{n} belongs to --mode train and evaluate" for n in ("data_path", "precision") if n in used]
    if args.d_model and args.num_heads and (args.d_model % args.num_heads or args.d_model // args.num_heads % 2):
        problems.append(f"--d_model {args.d_model} cannot be divided into {args.num_heads} heads of an even size")
    problems += same_files(args)
    if args.prompt_file and args.prompt:
        problems.append("--prompt and --prompt_file exclude each other")
    if args.hf_token and args.hf_token_file:
        problems.append("--hf_token and --hf_token_file exclude each other")
    parser.refuse(problems)
    return args


def same_files(args: argparse.Namespace) -> list[str]:
    """A problem for each two arguments by which one file would be written over another."""
    names = ["log_file", "model_path", "data_path", "prompt_file", "hf_token_file"]
    given = [(f"--{name}", path) for name in names if (path := getattr(args, name)) is not None]
    if impossible := [f"{name} holds a NUL character" for name, path in given if "\0" in str(path)]:
        return impossible
    paths = [(name, os.path.realpath(path)) for name, path in given]
    if args.mode == "train" and args.model_path.name:
        beside = {"resume state": resume_path(args.model_path), "lock": lock_path(args.model_path)}
        paths += [(f"the {name} of --model_path", os.path.realpath(path)) for name, path in beside.items()]
    return [
        f"{one} and {other} name the same file, {path}; choose another for one of them"
        for (one, path), (other, same) in itertools.combinations(paths, 2)
        if path == same
    ]


def add_shared_arguments(parser: CommandLine) -> list[str]:
    """Arguments that more than one mode understands; returns their names."""
    group = parser.add_argument_group("what to do")
    parser.add(
        group,
        "--mode",
        one_of("train", "evaluate", "generate"),
        default="train",
        help="train, evaluate or generate (default: %(default)s)",
    )
    group.add_argument(
        "--model_path",
        type=Path,
        default=Path("transformer_model.pth"),
        metavar="FILE",
        help="the model file: written by train, read by the others (default: %(default)s)",
    )
    group.add_argument(
        "--data_path",
        type=Path,
        metavar="PATH",
        help="a UTF-8 text: a file, a folder of *.txt or a quoted pattern, plain or .gz, .bz2, .xz (default: "
        "Shakespeare's plays, prepared on first use). evaluate scores the validation split of the text that the model "
        "was trained on, and all of any other",
    )
    parser.add(
        group,
        "--device",
        one_of("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto, cpu, cuda or mps (default: %(default)s: a GPU if there is one, but for small models that generate, "
        "which the CPU does faster)",
    )
    parser.add(
        group,
        "--precision",
        one_of("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the arithmetic: auto, fp32, bf16 or fp16 (default: %(default)s: what the device is fast in)",
    )
    parser.add(
        group,
        "--num_threads",
        whole(1, 4 * (os.cpu_count() or 1)),
        metavar="N",
        help="CPU threads (default: all that PyTorch finds, generate 1)",
    )
    parser.add(
        group,
        "--seed",
        whole(0),
        default=1337,
        metavar="N",
        help="of weights, batches and samples: the same seed gives the same result (default: %(default)s)",
    )
    group.add_argument("--log_file", type=Path, metavar="FILE", help="write the log there too (10 MB, 3 old ones kept)")
    parser.add(
        group,
        "--unknown",
        one_of("error", "skip"),
        metavar="POLICY",
        help="characters that the model never saw: error or skip (default: generate error, evaluate skip)",
    )
    return ["mode", "model_path", "data_path", "device", "precision", "num_threads", "seed", "log_file", "unknown"]


def add_training_arguments(parser: CommandLine) -> list[str]:
    """Arguments of --mode train; returns their names."""
    model = parser.add_argument_group("model (train; defaults depend on the device and are printed)")
    run_group = parser.add_argument_group("run (train)")
    flags: list[tuple[Any, str, Any, str]] = [
        (model, "d_model", whole(2, 65_536), "features per position"),
        (model, "num_heads", whole(1, 1024), "attention heads; d_model / num_heads must be even"),
        (model, "num_encoder_layers", whole(1, 1024), "layers that read the source"),
        (model, "num_decoder_layers", whole(1, 1024), "layers that write the target"),
        (model, "d_ff", whole(1, 1_048_576), "features inside a feed-forward block"),
        (
            model,
            "dropout",
            number(0, 1, below=True),
            "share of features dropped in training (default: 0)",
        ),
        (model, "source_length", whole(1, 16_384), "characters that the encoder reads"),
        (model, "target_length", whole(1, 16_384), "characters that the decoder writes"),
        (run_group, "max_steps", whole(1), "end after so many optimizer steps (default: no limit)"),
        (
            run_group,
            "max_minutes",
            number(0, math.inf, above=True),
            "end after so many minutes of training (default: 4.5 on a CPU, 10 on a GPU, none with --max_steps)",
        ),
        (run_group, "patience", whole(1), "end after so many evaluations without improvement (default: never)"),
        (run_group, "batch_size", whole(1, 1_048_576), "windows a step, of all processes (16 on a CPU, 128 on a GPU)"),
        (run_group, "learning_rate", number(0, 1e36, above=True), "of Muon, at its highest (default: 0.04)"),
        (run_group, "eval_interval", whole(1), "steps between evaluations (default: twenty evaluations a run)"),
    ]
    parser.add(
        model,
        "--size",
        one_of("tiny", "small", "base", "large"),
        metavar="SIZE",
        help="tiny (2 million parameters), small (12), base (27) or large (212); weights, gradients and optimizer take "
        "0.1, 0.4, 1 or 7 GiB in training, and activations come on top (default: tiny on a CPU, base on a GPU). The "
        "flags below change parts of it",
    )
    for group, name, convert, text in flags:
        parser.add(group, f"--{name}", convert, metavar="N", help=text)
    parser.add(
        run_group,
        "--weight_decay",
        number(0, math.inf),
        metavar="X",
        help="share of the hidden matrices that a step takes off, per unit of learning rate (default: what leaves a "
        "quarter of a weight after a pass over the text)",
    )
    parser.add(
        run_group,
        "--log_interval",
        whole(1),
        default=100,
        metavar="N",
        help="steps between lines of a log that is not a terminal (default: %(default)s)",
    )
    run_group.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|FILE",
        help="auto continues an unfinished run of the same text and arguments; FILE extends a finished one",
    )
    return [name for _, name, _, _ in flags] + ["size", "weight_decay", "log_interval", "resume"]


def add_device_arguments(parser: CommandLine) -> list[str]:
    """Arguments for models and batches that are large for a device; returns their names."""
    group = parser.add_argument_group("memory and processes (train)")
    parser.add(
        group,
        "--parallel",
        one_of("ddp", "fsdp"),
        default="ddp",
        help="what processes started by torchrun do: ddp, each has the whole model, or fsdp, each has a part, so that "
        "a model may be larger than a device (default: %(default)s)",
    )
    parser.add(
        group,
        "--accumulation_steps",
        whole(1, 1_048_576),
        default=1,
        metavar="N",
        help="pieces in which each process computes its share of a batch, to save memory (default: %(default)s)",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="compute activations a second time instead of keeping them: a third more time, a fraction of the memory",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model: slow start, faster steps")
    return ["parallel", "accumulation_steps", "gradient_checkpointing", "compile"]


def add_publishing_arguments(parser: CommandLine) -> list[str]:
    """The guide's arguments for pushing after training; returns their names."""
    group = parser.add_argument_group("publishing (train)")
    group.add_argument("--push_to_hf", action="store_true", help="push to the Hugging Face Hub when training has ended")
    group.add_argument("--hf_repo_name", metavar="NAME", help="repository name (default: shakespeare-transformer)")
    group.add_argument("--hf_username", metavar="NAME", help="owner (default: HF_USERNAME, else the token's user)")
    group.add_argument("--hf_token", metavar="TOKEN", help="Hugging Face token; others can see it, HF_TOKEN is safer")
    group.add_argument("--hf_token_file", type=Path, metavar="FILE", help="file that holds the token")
    group.add_argument("--hf_private", action="store_true", help="create a private repository")
    return ["push_to_hf", "hf_repo_name", "hf_username", "hf_token", "hf_token_file", "hf_private"]


def add_generation_arguments(parser: CommandLine) -> list[str]:
    """Arguments of --mode generate; returns their names."""
    group = parser.add_argument_group("text (generate)")
    group.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="text to continue (default: none); --prompt=@... if it begins with @",
    )
    group.add_argument("--prompt_file", type=Path, metavar="FILE", help="a UTF-8 file to continue")
    parser.add(group, "--num_chars", whole(0), default=500, metavar="N", help="characters to write (%(default)s)")
    parser.add(group, "--num_samples", whole(1), default=1, metavar="N", help="texts to write (%(default)s)")
    parser.add(
        group,
        "--temperature",
        number(0, math.inf),
        default=0.8,
        metavar="X",
        help="0 takes the likeliest character, 1 samples from the model as it is (default: %(default)s)",
    )
    parser.add(group, "--top_k", whole(1), metavar="N", help="choose among the N likeliest characters (default: all)")
    parser.add(
        group,
        "--top_p",
        number(0, 1, above=True),
        metavar="X",
        help="choose among the fewest characters with this total probability (default: 1, all)",
    )
    return ["prompt", "prompt_file", "num_chars", "num_samples", "temperature", "top_k", "top_p"]


if __name__ == "__main__":
    code = run(main)
    if code == 0 and started_by_torchrun():
        os._exit(code)  # the group's threads outlive it, and one that needs Python while it ends aborts the process
    sys.exit(code)
