"""How long a push takes on loopback, and how much of that is ours.

    python benchmarks/push_time.py

Publishes a 3 M-parameter checkpoint to tests/hub/server.py with `push_to_huggingface.py`, without and with the proofs
in fresh processes, and beside it the bare client: whoami, create_repo and one create_commit of the same files. The
difference is the suite's own time. The aim is 3 s without the proofs and 8 s with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe_machine, markdown_table
from charseq2seq.checkpoint import Checkpoint
from tests.hub.server import WRITE, hub_with_people
from tests.push_client import Publisher, tiny_checkpoint
from tests.train_client import finish

BARE_CLIENT = """
import pathlib
from huggingface_hub import CommitOperationAdd as Add, HfApi
api = HfApi()
api.whoami()
api.create_repo(REPO)
files = sorted(pathlib.Path(FOLDER).iterdir())
api.create_commit(REPO, [Add(file.name, str(file)) for file in files], commit_message="bare")
"""
# Replaces the proofs, to see what the rest takes.
UNPROVED = """
import sys
sys.path.insert(0, sys.argv[1])
from charseq2seq.publishing import publish
publish.prove_folder = lambda folder: None
publish.publish(publish.PushOptions(repo_name=sys.argv[2], no_verify=True))
"""


def large_checkpoint() -> Checkpoint:
    """A checkpoint of about 3 M random weights."""
    from encoder_decoder_transformer import Transformer

    base = tiny_checkpoint()
    sizes = {"d_model": 256, "num_heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 3, "d_ff": 1024}
    config = {**base.config, **sizes, "source_length": 64, "target_length": 192}
    return dataclasses.replace(base, config=config, model_state_dict=Transformer(**config).state_dict())


def median_seconds(work: Callable[[int], None], repeats: int) -> float:
    """Median time of so many runs, each told its number."""
    times = []
    for number in range(repeats):
        start = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of everything (%(default)s)")
    repeats, machine = parser.parse_args().repeats, describe_machine()
    with tempfile.TemporaryDirectory() as home, hub_with_people() as hub:
        checkpoint = large_checkpoint()
        user = Publisher(hub, Path(home) / "user", checkpoint)
        root = str(Path(__file__).resolve().parents[1])
        folder = user.home / "out"

        def proved(number: int) -> None:
            assert finish(user.start("--repo_name", f"proved-{number}")).code == 0  # not `push`: that is warm

        def unproved(number: int) -> None:
            command = [sys.executable, "-c", UNPROVED, root, f"unproved-{number}"]
            environment = hub.environment(user.home, WRITE) | {"OMP_NUM_THREADS": "1"}  # as `Publisher` has it
            subprocess.run(command, cwd=user.home, env=environment, check=True, capture_output=True)

        def bare(number: int) -> None:
            script = BARE_CLIENT.replace("REPO", repr(f"alice/bare-{number}")).replace("FOLDER", repr(str(folder)))
            command = [sys.executable, "-c", script]
            subprocess.run(command, env=hub.environment(user.home, WRITE), check=True, capture_output=True)

        assert user.push("--dry_run", "--output_dir", str(folder)).code == 0
        pushes = {"bare client": bare, "without proofs": unproved, "with proofs and verification": proved}
        seconds = {name: median_seconds(push, repeats) for name, push in pushes.items()}
    parameters = sum(tensor.numel() for tensor in checkpoint.model_state_dict.values())
    print(f"{parameters:,} parameters, median of {repeats}\n")
    cells = [(name, f"{taken:.2f}", f"{taken - seconds['bare client']:.2f}") for name, taken in seconds.items()]
    print(markdown_table(("push", "seconds", "beyond the bare client"), cells))
    print(f"\n{machine}")


if __name__ == "__main__":
    main()
