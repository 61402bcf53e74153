"""What a run tells and hears: a bar on a terminal or plain lines; Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from types import FrameType

from charseq2seq.console import is_terminal, log
from charseq2seq.errors import ExitCode


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

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def show(self, step: int, loss: float, speed: float, spent: float, fraction: float) -> None:
        """Show how far the run is: steps, loss (NaN: not known yet), speed, seconds and the fraction of the budget."""
        if self._bar is None and step % self._log_interval:
            return
        left = format_duration(spent * (1 / fraction - 1)) if fraction > 0.001 else "?"
        figures = f"loss {loss:.4f} nats/char, " * (not math.isnan(loss)) + f"{speed:,.0f} chars/s"
        if self._bar is None:
            log(f"step {step:,} ({fraction:.0%}): {figures}, {format_duration(spent)} spent, {left} left")
        else:
            self._bar.n = min(100.0, 100 * fraction)
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


class StopRequest:
    """Whether somebody asked the run to stop, and how."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # that asked

    @property
    def exit_code(self) -> ExitCode | None:
        """The status to end with after saving; None where nobody asked."""
        if self.signal is None:
            return None
        return ExitCode.TERMINATED if self.signal == signal.SIGTERM else ExitCode.INTERRUPTED

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        log(f"{self.signal.name}: finishing this step and saving; Ctrl-C again leaves at once.")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop sees, until the block ends."""
    request = StopRequest()
    earlier = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
