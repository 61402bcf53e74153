"""The picture of a training run: loss over steps, as PNG, the same bytes for the same history."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def draw_training_curve(history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Draw the losses of a run.

    Args:
        history: points {"step", "train_nats_per_char", "nats_per_char"}; a missing loss leaves a gap.

    Returns:
        A PNG file, or None where there are fewer than two points to join.
    """
    if len(history) < 2:
        return None
    # The figure is drawn without pyplot: no window system, no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    steps = [point["step"] for point in history]
    with rc_context({"font.family": "DejaVu Sans", "font.size": 11}):  # comes with matplotlib: alike everywhere
        figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
        axes = figure.subplots()
        for name, label, color in (
            ("train_nats_per_char", "training text", "#8aa9d6"),
            ("nats_per_char", "validation text", "#b5402a"),
        ):
            losses = [float("nan") if point.get(name) is None else point[name] for point in history]
            axes.plot(steps, losses, label=label, color=color, linewidth=2, marker="o", markersize=3.5)
        axes.set(xlabel="optimizer steps", ylabel="nats per character", title="Loss while training")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
