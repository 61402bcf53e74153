"""Publish a trained model: checkpoint -> repository folder -> Hugging Face Hub.

    python push_to_huggingface.py --repo_name my-shakespeare-transformer --username me     # token from HF_TOKEN
    python push_to_huggingface.py --check                                                 # may I?
    python push_to_huggingface.py --dry_run --output_dir folder                           # what would be pushed?

The result (the model's address, a plan, or JSON) goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from charseq2seq.console import log, run, write_result
from charseq2seq.publishing.request import DEFAULT_REPO_NAME, MAIN, Outcome, PublishRequest


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, push, and say where the model lives."""
    args = parse_arguments(argv)
    request = PublishRequest(
        repo_name=args.repo_name,
        username=args.username,
        token=args.token,
        token_file=args.token_file,
        private=args.private,
        commit_message=args.commit_message,
        revision=args.revision,
        create_pr=args.create_pr,
        tag=args.tag,
        overwrite=args.overwrite,
        only_if_better=args.only_if_better,
        verify=not args.no_verify,
        timeout=args.timeout,
        deadline=args.deadline,
    )
    # Not before the arguments are known to be right: these imports take a second.
    from charseq2seq.errors import SuiteError
    from charseq2seq.publishing.failures import PublishError, failure_as_json

    try:
        outcome = act(args, request)
    except SuiteError as error:
        if args.json:
            write_result(failure_as_json(error) + "\n")
        if not isinstance(error, PublishError):
            raise
        log(str(error))
        return error.exit_code
    write_result(outcome.as_json() + "\n" if args.json else show(outcome))
    return 0


def act(args: argparse.Namespace, request: PublishRequest) -> Outcome:
    """Check, plan or publish."""
    from charseq2seq.publishing.publish import plan_push, preflight, publish

    if args.check:
        standing = preflight(request)
        return Outcome("checked", standing.url, standing.repo_id)
    do = plan_push if args.dry_run else publish
    return do(args.model_path, request, from_dir=args.from_dir, output_dir=args.output_dir)


def show(outcome: Outcome) -> str:
    """The result as a person reads it."""
    log(f"{outcome.state}: {outcome.url}")
    if outcome.state == "planned":
        from charseq2seq.publishing.plan import describe_plan

        return describe_plan(list(outcome.plan))
    return outcome.url + "\n"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description="Publish a trained model on the Hugging Face Hub: one commit, verified, or a clear reason why not.",
        epilog="The token is taken from --token, --token_file, HF_TOKEN or `hf auth login`, in this order. "
        "HF_ENDPOINT names another Hub.",
    )
    what = parser.add_argument_group("what")
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--model_path", type=Path, default=Path("transformer_model.pth"), help="model file (default: %(default)s)"
    )
    source.add_argument("--from_dir", type=Path, help="a repository folder built before, instead of a model file")
    what.add_argument("--output_dir", type=Path, help="build the repository folder here and leave it")
    what.add_argument(
        "--only_if_better",
        type=margin,
        nargs="?",
        const=0.0,
        metavar="MARGIN",
        help="push only if the loss is lower than the published one, by more than MARGIN nats per character (0)",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--repo_name", default=DEFAULT_REPO_NAME, help="repository name (default: %(default)s)")
    where.add_argument("--username", help="owner, a user or organisation (default: HF_USERNAME, else the token's user)")
    where.add_argument("--private", action="store_true", help="create a private repository")
    where.add_argument("--revision", default=MAIN, help="branch to push to, made if needed (default: %(default)s)")
    where.add_argument("--create_pr", action="store_true", help="propose the push as a pull request")
    where.add_argument("--tag", help="name the commit, e.g. v1.0")
    where.add_argument("--commit_message", help="commit message (default: loss and steps)")
    where.add_argument("--overwrite", action="store_true", help="push over a repository that this suite did not make")
    who = parser.add_argument_group("who").add_mutually_exclusive_group()
    who.add_argument("--token", help="Hugging Face token; others on this machine can see it, HF_TOKEN is safer")
    who.add_argument("--token_file", type=Path, help="file that holds the token")
    how = parser.add_argument_group("how")
    mode = how.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="only find out whether a push could work")
    mode.add_argument("--dry_run", action="store_true", help="do everything but send, and print the plan")
    how.add_argument("--no_verify", action="store_true", help="do not download and run what was pushed")
    how.add_argument(
        "--timeout", type=seconds, default=60.0, help="seconds to wait for one answer (default: %(default)g)"
    )
    how.add_argument(
        "--deadline", type=seconds, default=3600.0, help="seconds that everything may take (default: %(default)g)"
    )
    how.add_argument("--json", action="store_true", help="print the result, or what went wrong, as one line of JSON")
    args = parser.parse_args(argv)
    if args.from_dir and args.output_dir:
        parser.error("--output_dir is where a folder is built, --from_dir is one: leave out either")
    if args.create_pr and (args.tag or args.revision != MAIN):
        parser.error("--create_pr proposes to main and tags nothing: leave out --tag and --revision")
    return args


def seconds(text: str) -> float:
    """A duration above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, not {text}")
    return value


def margin(text: str) -> float:
    """A margin of at least 0 nats per character."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(run(main))
