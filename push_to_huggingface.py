"""Publish a trained model: checkpoint -> repository folder -> Hugging Face Hub.

The result (the model's address, a plan, or JSON) goes to stdout, all else to
stderr. The token is taken from --token, --token_file, HF_TOKEN or `hf auth
login`, in this order. HF_ENDPOINT names another Hub.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq import __version__
from charseq2seq.arguments import CommandLine, number
from charseq2seq.console import log, run, write_result
from charseq2seq.errors import SuiteError
from charseq2seq.publishing.hub import MAIN
from charseq2seq.publishing.preflight import DEFAULT_REPO_NAME, PublishRequest, preflight

if TYPE_CHECKING:
    from charseq2seq.publishing.publish import Outcome

EXAMPLES = """examples:
  python push_to_huggingface.py --check                # may this push happen?
  python push_to_huggingface.py --repo_name my-transformer --username me
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, push, and say where the model lives."""
    args = parse_arguments(argv)
    try:
        outcome = act(args)
    except SuiteError as error:
        if args.json:
            facts = {"ok": False, "error": "refused", "message": str(error), **getattr(error, "facts", {})}
            write_result(json.dumps({**facts, "exit_code": int(error.exit_code)}) + "\n")
        raise
    log(f"{outcome.state}: {outcome.url}")
    if args.json:
        write_result(outcome.as_json() + "\n")
    else:
        write_result(outcome.describe_changes() if args.dry_run else outcome.url + "\n")
    return 0


def act(args: argparse.Namespace) -> Outcome:
    """Check, plan or publish."""
    from charseq2seq.publishing.publish import Outcome, State, plan_push, publish

    request = PublishRequest(**{field.name: getattr(args, field.name) for field in fields(PublishRequest)})
    if args.check:
        found = preflight(request)
        return Outcome(State.CHECKED, found.url, found.repo_id)
    return (plan_push if args.dry_run else publish)(args.model_path, request, args.output_dir)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with status 2 and all that is wrong with it."""
    parser = CommandLine(description=__doc__, epilog=EXAMPLES, usage="%(prog)s [options] [@file]")
    parser.add_argument("--version", action="version", version=f"charseq2seq {__version__}")

    def add(group: Any, flag: str, help_text: str, metavar: str | None = None, **options: Any) -> None:
        kind = {"metavar": metavar} if metavar else {"action": "store_true"}
        group.add_argument(flag, help=help_text, **(kind | options))

    what = parser.add_argument_group("what")
    model_path = Path("transformer_model.pth")
    add(what, "--model_path", "the model file (default: %(default)s)", "FILE", type=Path, default=model_path)
    add(what, "--output_dir", "build the repository folder here and leave it", "DIR", type=Path)
    better = "only if the loss is lower than the published one, by more than MARGIN nats per character (default: 0)"
    margin: dict[str, Any] = {"nargs": "?", "const": 0.0, "metavar": "MARGIN", "help": better}
    parser.add(what, "--only_if_better", number(0, math.inf), **margin)
    where = parser.add_argument_group("where")
    add(where, "--repo_name", "repository name (default: %(default)s)", "NAME", default=DEFAULT_REPO_NAME)
    add(where, "--username", "owner, a user or organisation (default: HF_USERNAME, else the token's user)", "NAME")
    add(where, "--private", "create a private repository")
    add(where, "--revision", "branch to push to, made if needed (default: %(default)s)", "BRANCH", default=MAIN)
    add(where, "--create_pr", "propose the push as a pull request")
    add(where, "--tag", "name the commit, e.g. v1.0", "TAG")
    add(where, "--commit_message", "commit message (default: loss, step and version)", "TEXT")
    add(where, "--overwrite", "push over a repository that this suite did not make")
    who = parser.add_argument_group("who")
    add(who, "--token", "Hugging Face token; others on this machine can see it, HF_TOKEN is safer", "TOKEN")
    add(who, "--token_file", "file that holds the token", "FILE", type=Path)
    how = parser.add_argument_group("how")
    add(how, "--check", "only find out whether a push could work")
    add(how, "--dry_run", "do everything but send, and print the plan")
    add(how, "--no_verify", "do not download and run what was pushed", action="store_false", dest="verify")
    seconds: dict[str, Any] = {"default": 60.0, "metavar": "SECONDS"}
    wait = "seconds to wait for one answer (default: %(default)g)"
    parser.add(how, "--timeout", number(0, math.inf, above=True), help=wait, **seconds)
    add(how, "--json", "print the result, or what went wrong, as one line of JSON")
    args = parser.parse_args(argv)
    parser.refuse(contradictions(args))
    return args


def contradictions(args: argparse.Namespace) -> list[str]:
    """What was asked for and cannot be had together."""
    named = args.tag or args.revision != MAIN
    pairs = {
        "--create_pr proposes to main and tags nothing; leave out --tag and --revision": args.create_pr and named,
        "--token and --token_file exclude each other": args.token and args.token_file,
        "--check and --dry_run exclude each other": args.check and args.dry_run,
    }
    return [problem for problem, found in pairs.items() if found]


if __name__ == "__main__":
    sys.exit(run(main))
