"""SIGTERM and SIGINT end a run at the next safe point, on all processes at once: preemption costs no work.

In training the step is finished and saved; elsewhere there is nothing to finish, and what evaluation has written so far
is kept in its journal. A second Ctrl-C does not wait. Schedulers read the exit code: 75 is the BSD convention for "try
again" (EX_TEMPFAIL), and the same command then goes on where this one stopped.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

import torch
from accelerate import PartialState

EXIT_CODE = 75
PR_SET_PDEATHSIG = 1


class Interrupted(Exception):
    """The run was asked to stop, and all processes know."""


class Halted(Exception):
    """The run cannot go on, for a reason that a person can act on; what it had learned is saved as far as it says."""


class Interruption:
    """
    Whether the run was asked to stop.

    Attributes:
        asked (`str`, *optional*): The name of the signal that this process got.
        waiting (`bool`): Whether somebody will look at `asked`; else a signal ends the process at once.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.waiting = False
        self._process, self._since = 0, 0.0

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Takes signals; within [`Interruption.awaited`] they wait for a safe point."""
        self.asked, self._process = None, os.getpid()
        handlers = {one: signal.signal(one, self._take) for one in (signal.SIGTERM, signal.SIGINT)}
        _follow_launcher()
        try:
            yield
        finally:
            for one, handler in handlers.items():
                signal.signal(one, handler)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """The part of a run that asks [`Interruption.agreed`] again and again."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def agreed(self) -> bool:
        """Whether any process was asked to stop. All of them have to call, and get the same answer."""
        state = PartialState()
        asked = torch.tensor(int(self.asked is not None), device=state.device)
        if state.num_processes > 1:
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process and self.waiting and number == signal.SIGINT:
            return  # Ctrl-C reaches the workers that load pictures as well: the step needs what they are at
        # torchrun passes on the Ctrl-C that the terminal has sent to everybody: that is no second one.
        again = self.asked == "SIGINT" and number == signal.SIGINT and time.monotonic() - self._since > 1
        self.asked, self._since = signal.Signals(number).name, time.monotonic()
        if again or not self.waiting or os.getpid() != self._process:
            raise SystemExit(EXIT_CODE)
        if PartialState().is_main_process:
            hint = " (Ctrl-C again: stop now)" if number == signal.SIGINT else ""
            # Not by print, which must not be called again while it is at work.
            os.write(sys.__stdout__.fileno() if sys.__stdout__ else 1, f"\n{self.asked}: stopping{hint}\n".encode())


def _follow_launcher() -> None:
    """
    Has the kernel send SIGTERM when `accelerate launch` dies: it does not pass SIGTERM on to its one process, which
    would train on, unseen, on a GPU that is given to somebody else.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


INTERRUPTION = Interruption()  # signals are of the process, and so is what was asked
