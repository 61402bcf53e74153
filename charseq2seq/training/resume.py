"""Continuing a run exactly where it stood.

The resume state lies beside the model. `--resume auto` continues an unfinished run of the same text, architecture and
arguments; one that differs is moved to another name, never overwritten; after a finished run a new one starts. A run
may be continued on another machine: what it had by default it keeps, and device and precision may change.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq.checkpoint import history_problem, load_resume_state
from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import flush_folder, resume_path, write_error
from charseq2seq.options import LIMITS, OPTIONS, SIZES, Settings

if TYPE_CHECKING:
    from torch import Tensor

_BUDGET = ("max_steps", "max_epochs", "max_minutes", "patience")  # may differ where --resume PATH extends a run
_MACHINE = ("device", "precision", "defaults")  # may differ always
_KEPT = 3  # of the resume states that were moved away


@dataclass
class State:
    """Everything that changes while a run goes on, field by field what a resume file holds."""

    identity: dict[str, Any]  # text, architecture and the options that decide the weights
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, over all sessions of this run
    train_loss: float = math.nan  # running mean over about the last 50 steps, nats per character
    learning_rate_scale: float = 1.0  # below 1 after a divergence
    learning_rate: float = 0.0  # of the last step
    gradient_norm: float = math.nan  # of the last step
    epoch: int = 0  # with `position` the sampler's
    position: int = 0
    best_loss: float = math.inf  # of the best evaluation so far
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stale_evaluations: int = 0  # since the best one
    history: list[dict[str, float]] = field(default_factory=list)  # step, seconds and losses of every evaluation
    finished: bool = False  # whether the run is complete
    weights: dict[str, Tensor] = field(default_factory=dict)  # this and what follows: filled only while saving
    optimizers: list[dict[Any, Any]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


def new_state(identity: dict[str, Any], saved: dict[str, Any] | None) -> State:
    """The state of a run that begins, or that a resume file's content continues; a SuiteError if that does not fit."""
    if saved is None:
        return State(identity)
    content = {name: value for name, value in saved.items() if name not in ("format", "format_version")}
    try:
        _check_content(content)
    except ValueError as error:
        raise does_not_fit(error) from error
    # The history is copied: a second try begins with the saved one again.
    return State(**content | {"identity": identity, "history": list(content["history"])})


def find_resume_state(settings: Settings, sha256: str) -> tuple[Settings, dict[str, Any] | None]:
    """The settings, with the defaults of the run to continue, and its state; None for a new run.

    A state that `--resume` names and that cannot be used, or is of a different run, is refused.
    """
    own, named = resume_path(settings.model_path), settings.resume not in ("auto", "never")
    path = Path(settings.resume) if named else own
    if not os.path.exists(path) and named:  # noqa: PTH110 (no error where the path cannot be)
        raise SuiteError(f"{path} does not exist; --resume takes auto, never or a resume state.", ExitCode.NO_INPUT)
    if settings.resume == "never" or not path.exists():
        return settings, None
    try:
        state = load_resume_state(path)
        new_state({}, state)
    except SuiteError as error:
        if named:
            raise
        _move_away(own, f"{error} Starting a new run.", path)
        return settings, None
    if state["finished"] and not named:
        log("resume: the last run here finished; starting a new one.")
        return settings, None
    adapted = _with_its_defaults(settings, state["identity"])
    different = _differences(state["identity"], run_identity(adapted, sha256), _BUDGET if named else ())
    lines = "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in different.items())
    if different and named:
        advice = f"Continue it with {_command(path, different)}, or start anew with --resume never."
        raise SuiteError(f"{path} belongs to a different run: {lines}. {advice}", ExitCode.USAGE)
    if different:
        reason = f"the unfinished run here is a different one: {lines}. Starting a new run."
        _move_away(own, reason, path, different)
        return settings, None
    if named and own.exists() and not own.samefile(path):
        _move_away(own, "another run lies where this one goes.", path)
    return adapted, state


def _with_its_defaults(settings: Settings, earlier: dict[str, Any]) -> Settings:
    """The settings, with the defaults that the run to continue had; here they may be others."""
    defaults = earlier.get("defaults")
    names = [name for name in _defaults_of(settings) if isinstance(defaults, list) and name in defaults]
    kept: dict[str, Any] = {name: earlier.get(name) for name in names if earlier.get(name) != getattr(settings, name)}
    try:
        if any(OPTIONS[name].kind.convert(str(value)) != value for name, value in kept.items()):
            return settings
    except ValueError:  # nothing that a run has left
        return settings
    reasons = [reason for reason in settings.reasons if not (kept.keys() & SIZES["tiny"] and reason.startswith("size"))]
    reasons += [f"kept from the run to continue: {', '.join(f'{n} {v}' for n, v in kept.items())}"] * bool(kept)
    for name in ("device", "precision"):
        if earlier.get(name) not in (None, getattr(settings, name)):
            reasons.append(f"the run to continue had {name} {earlier[name]}; rounding differs from now on")
    return replace(settings, **kept, reasons=tuple(reasons))


def _defaults_of(settings: Settings) -> list[str]:
    """The options that were not asked for and whose default depends on device or text."""
    names = settings.undecided & settings.identity().keys()
    if "size" not in settings.undecided:
        names -= SIZES["tiny"].keys()
    if not settings.undecided >= LIMITS:  # a limit that was asked for replaces all default ones
        names -= {*LIMITS, "patience"}
    return sorted(names)


def _check_content(content: dict[str, Any]) -> None:
    """Raise a ValueError for figures that no run has left: its model would be refused too, when it is done."""
    types = {name: type(value) for name, value in vars(State({})).items()}
    # States of before 2026-11-28 lack these two.
    if different := (content.keys() ^ types.keys()) - {"learning_rate", "gradient_norm"}:
        raise ValueError(f"it has or lacks {', '.join(sorted(different)):.200}")
    for name, value in content.items():
        if type(value) is not types[name] and (type(value), types[name]) != (int, float):
            raise ValueError(f"its {name} is not of type {types[name].__name__}")
    state = State(**content)
    counts = [state.step, state.best_step, state.stale_evaluations, state.epoch, state.position, state.seconds]
    losses = math.isinf(state.train_loss) or not state.best_loss > -math.inf
    if losses or not all(0 <= count < 2**63 for count in counts) or not 0 < state.learning_rate_scale <= 1:
        raise ValueError("its counters, losses or learning rate are not possible")
    if problem := history_problem(state.history):
        raise ValueError(problem)
    if not all(isinstance(row.get("seconds"), int | float) for row in state.history):
        raise ValueError("its history does not have the seconds of each evaluation")
    evaluated = bool(state.history)
    if not state.weights or evaluated != bool(state.best_weights) or evaluated == math.isinf(state.best_loss):
        raise ValueError("its weights are not complete")


def does_not_fit(error: Exception) -> SuiteError:
    """What to say of a resume file that another version wrote, or whose content was changed."""
    return SuiteError(
        f"the resume state does not fit this version of the suite ({error}); continue it with the version that wrote "
        "it, or start anew with --resume never.",
        ExitCode.BAD_DATA,
    )


def run_identity(settings: Settings, sha256: str) -> dict[str, Any]:
    """Text, architecture and the arguments that decide the weights of a run; and which of them are defaults."""
    return {"corpus_sha256": sha256, **settings.identity(), "defaults": _defaults_of(settings)}


def _differences(earlier: dict[str, Any], now: dict[str, Any], but: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """The options in which two runs differ, with both values; without those that may differ."""
    names = sorted((earlier.keys() | now.keys()) - {*but, *_MACHINE})
    return {name: (earlier.get(name), now.get(name)) for name in names if earlier.get(name) != now.get(name)}


def _command(path: Path, different: dict[str, tuple[Any, Any]]) -> str:
    """The changes to a command line that make it continue a state's run."""
    flags = [f"--{name} {was}" for name, (was, _) in different.items() if was is not None and name != "corpus_sha256"]
    changes = [" ".join([*flags, f"--resume {shlex.quote(str(path))}"])]
    changes += ["with its own text as --data_path"] * ("corpus_sha256" in different)
    return ", ".join([*changes, *(f"without --{name}" for name, (was, _) in different.items() if was is None)])


def _move_away(path: Path, reason: str, continued: Path, different: dict[str, tuple[Any, Any]] | None = None) -> None:
    """Rename the resume state at `path`, so that nothing is lost and cron goes on; `reason` says why it cannot stay.

    Args:
        continued: what the new run begins with, which stays however old it is.
        different: in what its run differs from this one; None if other options do not continue it.
    """
    names = [path.with_suffix(f".earlier{number}{path.suffix}") for number in ["", *range(2, 1000)]]
    kept = next(name for name in names if not name.exists())
    try:
        path.replace(kept)
        flush_folder(path.parent)  # or a power cut may keep the new state's name, and not this one's
    except OSError as error:
        raise write_error(kept, error) from error
    advice = "" if different is None else f"; continue it with {_command(kept, different)}"
    log(f"resume: {reason} What lay there is kept as {kept}{advice}.")
    needed = {kept.resolve(), continued.resolve()}
    others = [name for name in names if name.exists() and name.resolve() not in needed]
    for old in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True)[_KEPT - 1 :]:
        with contextlib.suppress(OSError):
            old.unlink()
            log(f"resume: {old} is removed: of such states the newest {_KEPT} stay.")
