"""Continuing a run exactly where it stood.

The resume state lies beside the model. `--resume auto` continues an unfinished run of the same text, architecture and
arguments; one that differs is set aside, never overwritten; after a finished run a new one starts.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq.checkpoint import history_problem, load_resume_state
from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import resume_path, write_error

if TYPE_CHECKING:
    from charseq2seq.corpus import Corpus
    from charseq2seq.options import Settings

# What may differ when a finished run is extended by --resume PATH.
_BUDGET = ("max_steps ", "max_minutes ", "patience ")


def find_resume_state(resume: str, model_path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state to continue from, or None for a new run.

    Args:
        resume: "auto", "never" or the path of a resume state.
        model_path: where the run's model goes.
        identity: what makes a run this run: text, architecture and the arguments that decide the weights.

    Raises:
        SuiteError: the state named by a path cannot be used, or belongs to a different run.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return _unfinished_state(resume_path(model_path), identity)
    if not os.path.exists(resume):  # noqa: PTH110 (no error where the path cannot be)
        raise SuiteError(f"{resume} does not exist; --resume takes auto, never or a resume state.", ExitCode.NO_INPUT)
    state = load_resume_state(Path(resume))
    different = [line for line in differences(_identity(state), identity) if not line.startswith(_BUDGET)]
    if different:
        raise SuiteError(
            f"{resume} belongs to a different run: {'; '.join(different)}. Give the same text and arguments, "
            "or start anew with --resume never.",
            ExitCode.USAGE,
        )
    own = resume_path(model_path)
    if own.exists() and not own.samefile(resume) and not _is_finished(own):
        _set_aside(own, "an unfinished run lies where this one goes.")
    return state


def _is_finished(path: Path) -> bool:
    try:
        return bool(load_resume_state(path).get("finished"))
    except SuiteError:  # damaged, but not ours to throw away
        return False


def _unfinished_state(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state = load_resume_state(path)
    except SuiteError as error:
        _set_aside(path, f"{error} Starting a new run.")
        return None
    if state.get("finished"):
        log("resume: the last run here finished; starting a new one.")
        return None
    different = differences(_identity(state), identity)
    if different:
        _set_aside(path, f"the unfinished run here is a different one: {'; '.join(different)}. Starting a new run.")
        return None
    return state


def check_figures(state: dict[str, Any]) -> None:
    """Refuse figures that no run has left: its model would be refused too, when it is done.

    Raises:
        ValueError, KeyError, TypeError: saying which, or what is missing.
    """
    sampler = state["sampler"]
    counts = [state["step"], state["best_step"], state["stale_evaluations"], sampler["epoch"], sampler["position"]]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("its counters are not whole numbers")
    figures = [state[name] for name in ("seconds", "train_loss", "best_loss", "learning_rate_scale")]
    if not all(type(figure) in (int, float) for figure in figures) or not 0 <= state["seconds"] < math.inf:
        raise ValueError("its seconds or losses are not numbers")
    if problem := history_problem(state["history"]):
        raise ValueError(problem)


def run_identity(settings: Settings, corpus: Corpus) -> dict[str, Any]:
    """Text, architecture and the arguments that decide the weights of a run."""
    return {"corpus_sha256": corpus.sha256, **settings.identity()}


def _identity(state: dict[str, Any]) -> dict[str, Any]:
    identity = state.get("identity")
    return identity if isinstance(identity, dict) else {}


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two identities differ in, in words: `batch_size was 16, is 32`."""
    names = sorted(earlier.keys() | now.keys())
    return [
        f"{name} was {earlier.get(name)}, is {now.get(name)}" for name in names if earlier.get(name) != now.get(name)
    ]


def _set_aside(path: Path, reason: str) -> None:
    """Keep a resume state that does not fit under a name of its own, so that nothing is lost and cron goes on."""
    numbers = itertools.chain([""], itertools.count(2))
    names = (path.with_suffix(f".earlier{number}{path.suffix}") for number in numbers)
    kept = next(name for name in names if not name.exists())
    try:
        path.replace(kept)
    except OSError as error:
        raise write_error(kept, error) from error
    log(f"resume: {reason} What lay there is kept as {kept}; continue it with --resume {kept}.")


def seed_random_states(seed: int) -> None:
    """Seed every random generator that a run may draw from."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of every device


def random_states() -> dict[str, Any]:
    """The states of every random generator a run may draw from: Python's, numpy's, torch's and this process's GPU's."""
    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        # Of this process's GPU only: a run may go on where there are fewer.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set every random generator as `random_states` found it."""
    import numpy as np
    import torch

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
