"""Continuing a run exactly where it stood.

The resume state lies beside the model. `--resume auto` continues an unfinished run of the same text, architecture and
arguments; one that differs is moved to another name, never overwritten; after a finished run a new one starts.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq.checkpoint import history_problem, load_resume_state
from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import resume_path, write_error
from charseq2seq.options import Settings

if TYPE_CHECKING:
    from torch import Tensor

# What may differ when a finished run is extended by --resume PATH.
_BUDGET = ("max_steps", "max_epochs", "max_minutes", "patience")


@dataclass
class State:
    """Everything that changes while a run goes on, field by field what a resume file holds."""

    identity: dict[str, Any]  # text, architecture and the options that decide the weights
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, over all sessions of this run
    train_loss: float = math.nan  # running mean over about the last 50 steps, nats per character
    learning_rate_scale: float = 1.0  # below 1 after a divergence
    epoch: int = 0  # with `position` the sampler's
    position: int = 0
    best_loss: float = math.inf  # of the best evaluation so far
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stale_evaluations: int = 0  # since the best one
    history: list[dict[str, float]] = field(default_factory=list)  # step, seconds and losses of every evaluation
    finished: bool = False  # whether the run is complete
    weights: dict[str, Tensor] = field(default_factory=dict)  # with what follows, filled when it is saved
    optimizers: list[dict[Any, Any]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


def new_state(identity: dict[str, Any], saved: dict[str, Any] | None) -> State:
    """The state of a run that begins, or that a resume file's content continues.

    Raises:
        SuiteError: the content is that of another version, or none that a run has left.
    """
    new = State(identity)
    if saved is None:
        return new
    content = {name: value for name, value in saved.items() if name not in ("format", "format_version")}
    try:
        if different := content.keys() ^ vars(new).keys():
            raise ValueError(f"it has or lacks {', '.join(sorted(different)):.200}")
        state = State(**(content | {"identity": identity}))
        _check_figures(state, {name: type(value) for name, value in vars(new).items()})
        state.history = [dict(point) for point in state.history]  # a first try must not extend a second one's
    except ValueError as error:
        raise does_not_fit(error) from error
    return state


def find_resume_state(settings: Settings, sha256: str) -> tuple[Settings, dict[str, Any] | None]:
    """The state to continue from, or None for a new run; and the settings, which keep what that run had by default.

    Args:
        settings: with all defaults.
        sha256: of the text.

    Raises:
        SuiteError: the state named by a path cannot be used, or belongs to a different run.
    """
    own, named = resume_path(settings.model_path), settings.resume not in ("auto", "never")
    path = Path(settings.resume) if named else own
    if not os.path.exists(path) and named:  # noqa: PTH110 (no error where the path cannot be)
        raise SuiteError(f"{path} does not exist; --resume takes auto, never or a resume state.", ExitCode.NO_INPUT)
    if settings.resume == "never" or not path.exists():
        return settings, None
    state = _read(path)
    if isinstance(state, SuiteError):
        if named:
            raise state
        _move_away(own, f"{state} Starting a new run.")
        return settings, None
    if state.get("finished") and not named:
        log("resume: the last run here finished; starting a new one.")
        return settings, None
    adapted = _with_its_defaults(settings, state)
    different = _differences(_identity(state), run_identity(adapted, sha256), _BUDGET if named else ())
    if different and named:
        raise SuiteError(
            f"{path} belongs to a different run: {different}. Give the same text and arguments, or start anew with "
            "--resume never.",
            ExitCode.USAGE,
        )
    if different:
        _move_away(own, f"the unfinished run here is a different one: {different}. Starting a new run.")
        return settings, None
    if named and own.exists() and not own.samefile(path):
        theirs = _read(own)
        if isinstance(theirs, SuiteError) or not theirs.get("finished"):  # damaged, but not ours to throw away
            _move_away(own, "an unfinished run lies where this one goes.")
    return adapted, state


def _read(path: Path) -> dict[str, Any] | SuiteError:
    """A resume state, or why it cannot be used."""
    try:
        return load_resume_state(path)
    except SuiteError as error:
        return error


def _with_its_defaults(settings: Settings, state: dict[str, Any]) -> Settings:
    """The settings, with the dropout of a run to continue: its default depends on the budget, which may be another."""
    dropout = _identity(state).get("dropout")
    if "dropout" in settings.undecided and type(dropout) is float and 0 <= dropout < 1:
        return replace(settings, dropout=dropout)
    return settings


def _check_figures(state: State, types: dict[str, type]) -> None:
    """Refuse figures that no run has left: its model would be refused too, when it is done.

    Raises:
        ValueError: saying which.
    """
    for name, value in vars(state).items():
        if type(value) is not types[name] and (type(value), types[name]) != (int, float):
            raise ValueError(f"its {name} is not of type {types[name].__name__}")
    counts = [state.step, state.best_step, state.stale_evaluations, state.epoch, state.position]
    if not all(0 <= count < 2**63 for count in counts):
        raise ValueError("its counters are not what a run counts to")
    losses = math.isinf(state.train_loss) or not state.best_loss > -math.inf
    if losses or not 0 <= state.seconds < math.inf or not 0 < state.learning_rate_scale <= 1:
        raise ValueError("its seconds, losses or learning rate are not possible")
    if problem := history_problem(state.history):
        raise ValueError(problem)
    evaluated = bool(state.history)
    if not state.weights or evaluated != bool(state.best_weights) or evaluated == math.isinf(state.best_loss):
        raise ValueError("its weights are not complete")
    if not all(type(figure) in (int, float) for figure in state.scaler.values()):
        raise ValueError("its loss scaling is not in numbers")


def does_not_fit(error: Exception) -> SuiteError:
    """What to say of a resume file that another version wrote, or whose content was changed."""
    return SuiteError(
        f"the resume state does not fit this version of the suite ({error}); start anew with --resume never.",
        ExitCode.BAD_DATA,
    )


def run_identity(settings: Settings, sha256: str) -> dict[str, Any]:
    """Text, architecture and the arguments that decide the weights of a run."""
    return {"corpus_sha256": sha256, **settings.identity()}


def _identity(state: dict[str, Any]) -> dict[str, Any]:
    identity = state.get("identity")
    return identity if isinstance(identity, dict) else {}


def _differences(earlier: dict[str, Any], now: dict[str, Any], but: tuple[str, ...]) -> str:
    """What two identities differ in, in words, without what may differ: `batch_size was 16, is 32`."""
    names = [name for name in sorted(earlier.keys() | now.keys()) if name not in but]
    different = [name for name in names if earlier.get(name) != now.get(name)]
    return "; ".join(f"{name} was {earlier.get(name)}, is {now.get(name)}" for name in different)


def _move_away(path: Path, reason: str) -> None:
    """Keep a resume state that does not fit under a name of its own, so that nothing is lost and cron goes on."""
    numbers = itertools.chain([""], itertools.count(2))
    names = (path.with_suffix(f".earlier{number}{path.suffix}") for number in numbers)
    kept = next(name for name in names if not name.exists())
    try:
        path.replace(kept)
    except OSError as error:
        raise write_error(kept, error) from error
    log(f"resume: {reason} What lay there is kept as {kept}; continue it with --resume {kept}.")
