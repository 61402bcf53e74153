"""A training run as a picture and as TensorBoard's events: the same bytes for the same history."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from charseq2seq.publishing.secrets import strangers_environment

_TRAINING, _VALIDATION = "#8aa9d6", "#b5402a"


def draw_training_curve(metrics: Mapping[str, Any], vocab_size: int) -> bytes | None:
    """Draw the losses of a run, and where the published model stands, as PNG; None for fewer than two points.

    Args:
        metrics: of a checkpoint; in its `history` a missing loss leaves a gap.
        vocab_size: of the model, which begins by guessing: its first logits are all zero.
    """
    history = metrics.get("history") or []
    if len(history) < 2:
        return None
    names, guessing = ("train_nats_per_char", "nats_per_char"), math.log(vocab_size)
    history = [{"step": 0, **dict.fromkeys(names, guessing)}, *history]
    with strangers_environment():  # matplotlib's first import starts a program that lists the fonts
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    steps = [point["step"] for point in history]
    training, validation = (
        [math.nan if point.get(name) is None else point[name] for point in history] for name in names
    )
    step, loss = metrics.get("step"), metrics.get("nats_per_char")
    picture = io.BytesIO()
    with rc_context({"font.family": "DejaVu Sans", "font.size": 13}):  # comes with matplotlib: alike everywhere
        figure = Figure(figsize=(7.4, 4.2), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, training, color=_TRAINING, lw=2, label="training text, running mean")
        axes.plot(steps, validation, "o-", color=_VALIDATION, lw=2, ms=3.5, label="validation text, a part of it")
        if step is not None and loss is not None:
            label = f"the published model, all of it: {loss:.4f}"
            axes.plot([step], [loss], "*", color=_VALIDATION, ms=15, mec="white", label=label)
        axes.set(xlabel="optimizer steps", ylabel="nats per character", title="Loss while training", xlim=(0, None))
        axes.locator_params("x", integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def write_events(metrics: Mapping[str, Any]) -> bytes | None:
    """The rows of a run as an event file, which the Hub shows as a tab; None where there are no rows.

    Not torch's own writer, whose file tells of the machine and the hour.
    """
    history = metrics.get("history") or []
    if not history:
        return None
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    writer = RecordWriter(file)
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    for row in history:
        numbers = {name: row[name] for name in sorted(row.keys() - {"step"}) if isinstance(row[name], (int, float))}
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        event = Event(wall_time=numbers.get("seconds", 0), step=row["step"], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return file.getvalue()
