"""Train a small encoder-decoder Transformer on a text, measure it, generate text.

Train (about five minutes on two CPU cores):
    python train_transformer.py
    python train_transformer.py --data_path "texts/*.txt" --max_minutes 60
Evaluate:
    python train_transformer.py --mode evaluate
    python train_transformer.py --mode evaluate --data_path other.txt
Generate:
    python train_transformer.py --mode generate --prompt "ROMEO:"
    python train_transformer.py --mode generate --interactive --temperature 1
Write on a page in the browser:
    python train_transformer.py --mode demo
Arguments from a file:
    python train_transformer.py @nightly.args

Results (text, figures, the model's address) go to stdout, everything else to
stderr. docs/automation.md has the fields of the JSON and the exit codes.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from charseq2seq.console import input_waits, log, log_errors_only, log_to_file, run_with_report, write_result
from charseq2seq.device import choose_device, choose_precision, choose_threads, device_problems, use_threads
from charseq2seq.errors import SuiteError, refuse_wrong_arguments
from charseq2seq.files import resume_path
from charseq2seq.options import PushOptions, Settings, read_settings, resolve_settings
from charseq2seq.training.processes import is_rank_0

if TYPE_CHECKING:
    from charseq2seq.training.trainer import Outcome

PUSH_LATER = "push_to_huggingface.py pushes the model later (--hf_repo_name is --repo_name there, and so on)"


def main(argv: Sequence[str] | None = None, report: dict[str, Any] | None = None) -> int:
    """Do what the command line says; the report, if anything is put into it, becomes the last line of stdout."""
    args = read_settings(argv, __doc__)
    report = {} if report is None else report
    if args.mode == "train" or args.json:
        report["outcome"] = "failed"  # until more is known
    if not is_rank_0():  # of several processes rank 0 alone logs and prints
        log_errors_only()
    elif args.log_file is not None:
        log_to_file(args.log_file)
    modes = {"train": train_and_publish, "evaluate": evaluate, "generate": generate, "demo": demo}
    return modes[args.mode](args, report) or 0


def train_and_publish(args: Settings, report: dict[str, Any]) -> int:
    """Check everything, train, show what was learned, and publish it if asked to; returns the exit code."""
    from data.prepare import DEFAULT_CORPUS, prepare

    settings = resolve_settings(args, args.data_path or DEFAULT_CORPUS)
    use_threads(settings.num_threads)
    from charseq2seq.training.run import train

    if not is_rank_0():
        return train(settings).stopped_by or 0
    names = ("repo_name", "username", "token", "token_file", "private")
    request = PushOptions(args.model_path, **{name: getattr(args, f"hf_{name}") for name in names}, json=args.json)
    if args.push_to_hf:  # what cannot be pushed is refused before training
        from charseq2seq.publishing.failures import flags_of_training
        from charseq2seq.publishing.preflight import preflight

        with flags_of_training():
            preflight(request)
    if args.data_path is None:
        prepare()
    outcome = train(settings)
    report_outcome(args, outcome, report)
    if args.push_to_hf and outcome.stopped_by is None:
        push(request, report)
    return outcome.stopped_by or 0


def report_outcome(args: Settings, outcome: Outcome, report: dict[str, Any]) -> None:
    """Print a sample and how good the model is; tell how the run ended and what to do next."""
    ending = "finished" if outcome.stopped_by is None else "stopped"
    report |= {"outcome": ending, "steps": outcome.steps, "training_seconds": round(outcome.seconds, 1)}
    if outcome.evaluation is not None:
        facts = outcome.evaluation.facts()
        report |= {"model_path": str(args.model_path), "best_step": outcome.best_step, **facts}
        if outcome.stopped_by is None:  # whoever stopped it does not wait for more
            sample: dict[str, Any] = {}
            generate(Settings(model_path=args.model_path, prompt=outcome.beginning, json=args.json), sample)
            report |= {"sample": sample["texts"][0]} if args.json else {}
        loss = f"{facts['nats_per_char']:.4f} nats per character ({facts['bits_per_char']:.4f} bits)"
        best = f"best of {outcome.steps:,} steps at {outcome.best_step:,}"
        log("\n".join([f"validation: {loss}, {best}", *outcome.advice, f"model: {args.model_path}"]))
    if outcome.stopped_by is not None:
        log(f"stopped: everything is saved; {what_is_left(args, outcome)}.")
    elif not args.push_to_hf:
        path = shlex.quote(str(args.model_path))
        log(f"next: python train_transformer.py --mode generate --model_path {path}")
        log(f"      python push_to_huggingface.py --model_path {path} --dry_run")


def what_is_left(args: Settings, outcome: Outcome) -> str:
    """How to go on after a stop, in words."""
    if outcome.complete:
        return f"the run itself was complete{f'; {PUSH_LATER}' * args.push_to_hf}"
    left = f"the same command{', with --resume auto,' * (args.resume != 'auto')} continues this run"
    if outcome.evaluation is None and outcome.steps:
        model = args.model_path.with_stem(args.model_path.stem + "_stopped")
        words = ["--resume", resume_path(args.model_path), "--max_steps", outcome.steps, "--model_path", model]
        left += f"; to use what it has learnt so far, the same command with {shlex.join(map(str, words))}"
        left += f"{' and without --push_to_hf' * args.push_to_hf} writes a model of it"
    return left


def push(request: PushOptions, report: dict[str, Any]) -> None:
    """Publish the finished model; it stays where it is if that fails."""
    from charseq2seq.publishing.failures import flags_of_training
    from charseq2seq.publishing.publish import publish

    report["outcome"] = "finished, not pushed"
    try:
        with flags_of_training():
            pushed = publish(request)
    except SuiteError:
        log(f"the model is safe in {request.model_path}; {PUSH_LATER}.")
        raise
    report |= {"outcome": pushed.state, "url": pushed.url, "commit": pushed.commit}
    if not request.json:
        write_result(pushed.url + "\n")


def evaluate(args: Settings, report: dict[str, Any]) -> None:
    """Print the model's loss on a text as JSON on stdout and in words on stderr."""
    use_threads(choose_threads(args.num_threads)[0])
    from charseq2seq.checkpoint import load_checkpoint
    from charseq2seq.training.evaluation import evaluate_file, find_own_text

    checkpoint = load_checkpoint(args.model_path)
    device, _ = choose_device(args.device)
    # With auto, a model that was trained in fp32 is also measured in fp32.
    as_trained = args.precision == "auto" and checkpoint.training_args.get("precision") == "fp32"
    precision, _ = choose_precision("fp32" if as_trained else args.precision, device)
    refuse_wrong_arguments(device_problems(device, precision))
    path = args.data_path or find_own_text(checkpoint.corpus, args.model_path.parent)
    facts = evaluate_file(checkpoint, path, device, precision, args.unknown or "skip", args.encoding)
    loss = f"{facts['nats_per_char']:.4f} nats per character ({facts['bits_per_char']:.4f} bits)"
    log(f"{loss} on {facts['characters']:,} characters of {path.name} ({facts['split']})")
    if args.json:
        report |= {"outcome": "evaluated", **facts}
    else:
        write_result(json.dumps(facts) + "\n")


def generate(args: Settings, report: dict[str, Any]) -> None:
    """Print text that the model generates, character by character; with --json the report has it."""
    from charseq2seq.checkpoint import load_checkpoint
    from charseq2seq.generation import Sampling, TextGenerator, is_small, known_prompt, read_prompt

    use_threads(args.num_threads or 1)  # a token is too little work to split: a second thread only waits (LOG.md)
    prompt = read_prompt(args.prompt_file, args.encoding) if args.prompt_file else args.prompt
    if not (prompt or args.interactive) and input_waits():
        log("note: what comes on stdin is not read; --prompt_file - makes it the prompt.")
    device, _ = choose_device(args.device)
    refuse_wrong_arguments(device_problems(device))
    checkpoint = load_checkpoint(args.model_path)
    vocabulary = checkpoint.vocabulary()
    prompt = known_prompt(vocabulary, prompt, args.unknown or "error")
    model = checkpoint.build_model()
    on_cpu = args.device == "auto" and args.num_samples == 1 and is_small(model)
    generator = TextGenerator(model if on_cpu else model.to(device), vocabulary)
    if args.interactive:
        from charseq2seq.interactive import Conversation

        Conversation(args, generator).run(prompt)
        return
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    texts: Iterable[Iterable[str]] = [generator.stream(prompt, args.num_chars, sampling)]
    if args.num_samples > 1:
        texts = generator.samples(prompt, args.num_chars, sampling, args.num_samples)
    if args.json:
        written = [prompt + "".join(text) for text in texts]
        report |= {"outcome": "generated", "model_path": str(args.model_path), "seed": args.seed, "texts": written}
        return
    for number, text in enumerate(texts):
        write_result(f"\n{'-' * 40}\n" * (number > 0) + prompt)
        for character in text:
            write_result(character)
    write_result("\n")


def demo(args: Settings, report: dict[str, Any]) -> None:
    """Serve a page on which the model writes."""
    from charseq2seq.demo import serve_demo

    serve_demo(args.model_path)


if __name__ == "__main__":
    sys.exit(run_with_report(main))
