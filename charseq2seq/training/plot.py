"""Draw the course of one or more training runs.

python -m charseq2seq.training.plot transformer_model.metrics.jsonl
python -m charseq2seq.training.plot a.metrics.jsonl b.metrics.jsonl --output both.png
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from charseq2seq.console import log, run
from charseq2seq.errors import ExitCode, SuiteError, require_packages
from charseq2seq.files import atomic_write

# Okabe and Ito's colours, which colour-blind readers can tell apart; runs beyond them begin again.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_PANELS = [
    ("characters", "nats_per_char", "characters read in training", "loss, nats per character"),
    ("seconds", "nats_per_char", "seconds of training", "loss, nats per character"),
    ("characters", "learning_rate", "characters read in training", "learning rate"),
    ("characters", "gradient_norm", "characters read in training", "norm of the gradient"),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m charseq2seq.training.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("metrics", nargs="+", type=Path, help="what a run wrote beside its model: NAME.metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("training.png"), help="the picture (default: training.png)")
    args = parser.parse_args(argv)
    draw({str(path): read_rows(path) for path in args.metrics}, args.output)
    log(f"drawn: {args.output}")
    return 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that a run wrote; a SuiteError if the file cannot be read or has none."""
    problem, code = "holds no rows of a training run (they come with its first evaluation)", ExitCode.BAD_DATA
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # without the part of a line that a killed run left
        # Rows of a run that an earlier version began have fewer figures.
        needed = {name for panel in _PANELS for name in panel[:2]}
        if rows := [row for row in map(json.loads, lines) if needed <= row.keys()]:
            return rows
    except OSError as error:
        problem, code = f"cannot be read ({error.strerror})", ExitCode.NO_INPUT
    except (ValueError, AttributeError):  # not lines of JSON, or not objects
        pass
    raise SuiteError(f"{path} {problem}; name the .metrics.jsonl file beside a model.", code)


def draw(runs: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Draw the rows of runs, name -> rows, as PNG: solid on the validation split, dotted on the training split."""
    require_packages("the picture", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    def column(rows: list[dict[str, Any]], name: str) -> list[float]:
        return [math.nan if row.get(name) is None else row[name] for row in rows]

    with rc_context({"font.size": 12}):
        figure = Figure(figsize=(9.6, 7.2), dpi=120, layout="constrained")
        for axes, (across, up, x_label, y_label) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
            for number, (name, rows) in enumerate(runs.items()):
                x, style = column(rows, across), {"color": _COLOURS[number % len(_COLOURS)], "lw": 2}
                axes.plot(x, column(rows, up), "o-", ms=3, label=name.replace("$", r"\$"), **style)
                if up == "nats_per_char":
                    axes.plot(x, column(rows, "train_nats_per_char"), ":", **style)
            axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None))
            axes.xaxis.set_major_formatter(EngFormatter())  # 200 k, 4 M
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle("solid: validation text, dotted: training text (running mean)", fontsize=12)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False)
        with atomic_write(output) as file:
            figure.savefig(file, format="png")


if __name__ == "__main__":
    sys.exit(run(main))
