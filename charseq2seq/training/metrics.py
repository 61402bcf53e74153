"""The course of a run in figures: a row an evaluation, as lines of JSON beside the model and as TensorBoard's events.

The rows are the history in the resume state. A session begins with those of the state that it continues and appends its
own, so a run that was stopped or killed, wherever it was, has each row once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from charseq2seq.console import log
from charseq2seq.files import atomic_write_text, write_error

Row = Mapping[str, float]


class Metrics:
    """Writes the rows of a run as they come, over those of an earlier run; a SuiteError if it cannot begin.

    `events` is TensorBoard's folder.
    """

    def __init__(self, path: Path, rows: Sequence[Row], events: Path | None = None) -> None:
        self._path, self._events = path, None
        atomic_write_text(path, "".join(map(_line, rows)))
        if events is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            # What a session that was killed has written of later steps is not shown.
            next_step = int(rows[-1]["step"]) + 1 if rows else 0
            self._events = SummaryWriter(str(events), purge_step=next_step)
        except OSError as error:
            raise write_error(events, error) from error

    def add(self, row: Row) -> None:
        """Append a row; if that fails, the log says so and the run goes on, because it does not need the row."""
        try:
            with self._path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(_line(row))
            if self._events is not None:
                for name in row.keys() - {"step"}:
                    self._events.add_scalar(name, row[name], int(row["step"]))
                self._events.flush()
        except OSError as error:
            log(f"note: {write_error(self._path, error)} The run goes on.")

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def _line(row: Row) -> str:
    # NaN is no JSON; a loss that was not measured may also be None.
    known = {name: figure for name, figure in row.items() if figure is not None and math.isfinite(figure)}
    return json.dumps(dict.fromkeys(row) | known) + "\n"
