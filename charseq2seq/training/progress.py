"""What a run tells and hears: a bar on a terminal or plain lines; signals that ask it to stop; how long it has run."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from charseq2seq.console import STOP_SIGNALS, is_terminal, log
from charseq2seq.errors import ExitCode

# Seconds after a signal until a step or an evaluation is given up, so that the run ends within ten.
_PATIENCE = 5.0 if hasattr(signal, "setitimer") else None

# Seconds between two looks at the clock. Where there were more, the process was stopped or the machine asleep.
_TICK, _LONGEST_TICK = 0.5, 2.0


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
        shape = "{desc} {bar} {percentage:3.0f}%{postfix}"
        self._bar = tqdm(total=100, bar_format=shape, leave=False, dynamic_ncols=True, disable=not is_terminal())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()

    def show(self, step: int, loss: float, speed: float, spent: float, fraction: float) -> None:
        """Show how far the run is: steps, loss (NaN: not known yet), speed, seconds and the fraction of the budget."""
        if self._bar.disable and step % self._log_interval:
            return
        left = format_duration(spent * (1 / fraction - 1)) if fraction > 0.001 else "?"
        figures = f"loss {loss:.4f} nats/char, " * (not math.isnan(loss)) + f"{speed:,.0f} chars/s"
        if self._bar.disable:
            log(f"step {step:,} ({fraction:.0%}): {figures}, {format_duration(spent)} spent, {left} left")
            return
        self._bar.n = min(100.0, 100 * fraction)
        self._bar.set_description_str(f"step {step:,}", refresh=False)
        self._bar.set_postfix_str(f"{figures}, {left} left", refresh=False)
        with contextlib.suppress(OSError):  # the terminal was closed: the run has to save yet
            self._bar.refresh()

    def write(self, message: str) -> None:
        """A line of the log that does not break the bar."""
        with contextlib.suppress(OSError):
            self._bar.clear()
            log(message)
            self._bar.refresh()


class OverdueError(BaseException):
    """Somebody asked the run to stop, and what it was doing took too long. No `except Exception` may swallow this."""


class StopRequest:
    """Whether somebody asked the run to stop, and how; after `patience` seconds, if any, `OverdueError` is raised."""

    def __init__(self, patience: float | None = None) -> None:
        self.signal: signal.Signals | None = None  # that asked
        self._patience = patience
        self._overdue = self._held = False
        self._earlier_alarm = signal.getsignal(signal.SIGALRM) if patience else None

    @property
    def exit_code(self) -> ExitCode | None:
        """The status to end with after saving; None where nobody asked."""
        if self.signal is None:
            return None
        return ExitCode.INTERRUPTED if self.signal == signal.SIGINT else ExitCode.TERMINATED

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None and self._patience:
            signal.setitimer(signal.ITIMER_REAL, self._patience)
        self.signal = signal.Signals(number)
        log(f"{self.signal.name}: finishing this step and saving; Ctrl-C again leaves at once.")

    def handle_alarm(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:  # a signal came while a module was imported, and its handler waits for that to end
            if callable(self._earlier_alarm):
                self._earlier_alarm(number, frame)
            return
        self._overdue = True
        if not self._held:
            self.release()

    def hold(self) -> None:
        """From now on weights or files change: not to be interrupted until `release`."""
        self._held = True

    def release(self) -> None:
        """The end of what `hold` began; if the time was over before, OverdueError is raised now."""
        self._held = False
        if self._overdue:
            self._overdue = False
            raise OverdueError


@contextlib.contextmanager
def stop_signals(gives_up: bool) -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request that the loop sees, until the block ends.

    `gives_up`: a step that takes too long after a signal is not waited for.
    """
    patience = _PATIENCE if gives_up else None
    request = StopRequest(patience)
    handlers = dict.fromkeys(STOP_SIGNALS, request.handle)
    if patience:
        handlers[signal.SIGALRM] = request.handle_alarm
    earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield request
    finally:
        try:
            request.hold()
            if patience:
                signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # the timer may have rung just before
            for number, handler in earlier.items():
                signal.signal(number, handler)


class Stopwatch:
    """Seconds of training, without those in which the process was stopped (Ctrl-Z, `docker pause`) or asleep."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._noted = seconds, time.perf_counter()
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_noting, daemon=True).start()

    def _keep_noting(self) -> None:
        while not self._closed.wait(_TICK):
            self.seconds()

    def seconds(self) -> float:
        """How long the run has taken by now."""
        with self._lock:
            now = time.perf_counter()
            passed, self._noted = now - self._noted, now
            self._seconds += passed if passed < _LONGEST_TICK else 0.0
            return self._seconds

    def close(self) -> None:
        self._closed.set()
