"""Publish a trained model: checkpoint -> repository folder -> Hugging Face Hub.

    python push_to_huggingface.py --repo_name my-shakespeare-transformer --username me     # token from HF_TOKEN
    python push_to_huggingface.py --check                                                 # may I?
    python push_to_huggingface.py --dry_run --output_dir folder                           # what would be pushed?

The result (the model's address, a plan, or JSON) goes to stdout, everything else to stderr. The token is taken from
--token, --token_file, HF_TOKEN or `hf auth login`, in this order. HF_ENDPOINT names another Hub.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from charseq2seq.arguments import CommandLine, number
from charseq2seq.console import log, run, write_result
from charseq2seq.errors import SuiteError
from charseq2seq.publishing.request import DEFAULT_REPO_NAME, MAIN, Outcome, PublishRequest

DEFAULT_MODEL_PATH = Path("transformer_model.pth")


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
    # Not before the arguments are known to be right: these imports take a while.
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
    from charseq2seq.publishing.libraries import require_libraries

    require_libraries()  # before the imports that need them
    from charseq2seq.publishing.publish import plan_push, preflight, publish

    if args.check:
        standing = preflight(request)
        return Outcome("checked", standing.url, standing.repo_id)
    do = plan_push if args.dry_run else publish
    model_path = args.model_path or DEFAULT_MODEL_PATH
    return do(model_path, request, from_dir=args.from_dir, output_dir=args.output_dir)


def show(outcome: Outcome) -> str:
    """The result as a person reads it."""
    log(f"{outcome.state}: {outcome.url}")
    if outcome.state == "planned":
        from charseq2seq.publishing.plan import describe_plan

        return describe_plan(list(outcome.plan))
    return outcome.url + "\n"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with status 2 and all that is wrong with it."""
    parser = CommandLine(description=__doc__, usage="%(prog)s [options] [@file]")
    what = parser.add_argument_group("what")
    what.add_argument("--model_path", type=Path, metavar="FILE", help=f"the model file (default: {DEFAULT_MODEL_PATH})")
    what.add_argument("--from_dir", type=Path, metavar="DIR", help="a folder built before, instead of a model file")
    what.add_argument("--output_dir", type=Path, metavar="DIR", help="build the repository folder here and leave it")
    parser.add(
        what,
        "--only_if_better",
        number(0, math.inf),
        nargs="?",
        const=0.0,
        metavar="MARGIN",
        help="push only if the loss is lower than the published one, by more than MARGIN nats per character (0)",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--repo_name", default=DEFAULT_REPO_NAME, metavar="NAME", help="repository name (default: %(default)s)"
    )
    where.add_argument(
        "--username", metavar="NAME", help="owner, a user or organisation (default: HF_USERNAME, else the token's user)"
    )
    where.add_argument("--private", action="store_true", help="create a private repository")
    where.add_argument(
        "--revision", default=MAIN, metavar="BRANCH", help="branch to push to, made if needed (default: %(default)s)"
    )
    where.add_argument("--create_pr", action="store_true", help="propose the push as a pull request")
    where.add_argument("--tag", metavar="TAG", help="name the commit, e.g. v1.0")
    where.add_argument("--commit_message", metavar="TEXT", help="commit message (default: loss, steps and version)")
    where.add_argument("--overwrite", action="store_true", help="push over a repository that this suite did not make")
    who = parser.add_argument_group("who")
    who.add_argument(
        "--token", metavar="TOKEN", help="Hugging Face token; others on this machine can see it, HF_TOKEN is safer"
    )
    who.add_argument("--token_file", type=Path, metavar="FILE", help="file that holds the token")
    how = parser.add_argument_group("how")
    how.add_argument("--check", action="store_true", help="only find out whether a push could work")
    how.add_argument("--dry_run", action="store_true", help="do everything but send, and print the plan")
    how.add_argument("--no_verify", action="store_true", help="do not download and run what was pushed")
    for flag, default, text in (
        ("--timeout", 60.0, "to wait for one answer"),
        ("--deadline", 3600.0, "that everything may take"),
    ):
        seconds = number(0, math.inf, above=True)
        help_text = f"seconds {text} (default: %(default)g)"
        parser.add(how, flag, seconds, default=default, metavar="SECONDS", help=help_text)
    how.add_argument("--json", action="store_true", help="print the result, or what went wrong, as one line of JSON")
    args = parser.parse_args(argv)
    parser.refuse(contradictions(args))
    return args


def contradictions(args: argparse.Namespace) -> list[str]:
    """What was asked for and cannot be had together."""
    pairs = {
        "--model_path is what a folder is built from, --from_dir is one": args.model_path and args.from_dir,
        "--output_dir is where a folder is built, --from_dir is one": args.output_dir and args.from_dir,
        "--create_pr proposes to main and tags nothing, so neither --tag nor --revision goes with it": args.create_pr
        and (args.tag or args.revision != MAIN),
        "--token and --token_file exclude each other": args.token and args.token_file,
        "--check and --dry_run exclude each other": args.check and args.dry_run,
    }
    return [problem for problem, found in pairs.items() if found]


if __name__ == "__main__":
    sys.exit(run(main))
