"""Publish a trained model: checkpoint -> repository folder -> Hugging Face Hub.

Find out whether a push could work:
    python push_to_huggingface.py --check
    python push_to_huggingface.py --dry_run --output_dir folder
Push, with the token from HF_TOKEN:
    python push_to_huggingface.py --repo_name my-transformer --username me
    python push_to_huggingface.py --only_if_better --tag v2.0

The result (the model's address, a plan, or JSON) goes to stdout, all else to
stderr. The token is taken from --token, --token_file, keyless sign-in
(HF_OIDC_RESOURCE), HF_TOKEN or `hf auth login`, in this order. HF_ENDPOINT
names another Hub.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from charseq2seq.console import log, run_with_report, write_result
from charseq2seq.options import read_push_options


def main(argv: Sequence[str] | None, report: dict[str, Any]) -> int:
    """Parse, push, and say where the model lives; with --json the report becomes the last line of stdout."""
    options = read_push_options(argv, __doc__)
    # Not before the options are known to be right: this import takes a while.
    from charseq2seq.publishing.publish import publish

    if options.json:
        report["ok"] = False  # until more is known
    outcome = publish(options)
    log(f"{outcome.state}: {outcome.url}")
    if options.json:
        report |= outcome.facts()
    else:
        write_result(outcome.describe_changes() if options.dry_run else outcome.url + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_with_report(main))
