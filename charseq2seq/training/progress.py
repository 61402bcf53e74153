"""How a run tells where it stands: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

from charseq2seq.console import is_terminal, log


def format_duration(seconds: float) -> str:
    """Seconds as a person says them: 47s, 4m 30s, 2h 05m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """Shows loss (nats per character), speed (target characters per second) and time left."""

    def __init__(self, log_interval: int) -> None:
        from tqdm import tqdm

        self._log_interval = log_interval
        self._bar = (
            tqdm(total=100, bar_format="{desc} {bar} {percentage:3.0f}%{postfix}", leave=False, dynamic_ncols=True)
            if is_terminal()
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, step: int, loss: float, speed: float, spent: float, share: float) -> None:
        """Tell where the run stands after a step.

        Args:
            step: steps done.
            loss: smoothed training loss, nats per character; not a number where none is known yet.
            speed: target characters per second.
            spent: seconds of training.
            share: how much of the budget is spent, 0 to 1.
        """
        if self._bar is None and step % self._log_interval:
            return
        left = format_duration(spent * (1 / share - 1)) if share > 0.001 else "?"
        figures = f"loss {loss:.4f} nats/char, " * (not math.isnan(loss)) + f"{speed:,.0f} chars/s"
        if self._bar is None:
            log(f"step {step:,} ({share:.0%}): {figures}, {format_duration(spent)} spent, {left} left")
        else:
            self._bar.n = min(100.0, 100 * share)
            self._bar.set_description_str(f"step {step:,}", refresh=False)
            self._bar.set_postfix_str(f"{figures}, {left} left", refresh=False)
            self._bar.refresh()

    def write(self, message: str) -> None:
        """A line of the log that does not break the bar."""
        if self._bar is not None:
            self._bar.clear()
        log(message)
        if self._bar is not None:
            self._bar.refresh()
