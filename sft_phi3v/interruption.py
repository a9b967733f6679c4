"""SIGTERM and SIGINT end a run at the next safe point, on all processes at once: preemption costs no work.

In training the step is finished and saved; elsewhere there is nothing to finish, and what evaluation has written so far
is kept in its journal. A second Ctrl-C does not wait. Schedulers read the exit code: 75 is the BSD convention for "try
again" (EX_TEMPFAIL), and the same command then goes on where this one stopped.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

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
        self.leaving: Any = multiprocessing.Value(ctypes.c_bool, False, lock=False)  # shared with workers

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Takes signals; within [`Interruption.awaited`] they wait for a safe point."""
        self.asked, self._process, self.leaving.value = None, os.getpid(), False
        handlers = {one: signal.signal(one, self._take) for one in (signal.SIGTERM, signal.SIGINT)}
        _follow_launcher()
        try:
            yield
        finally:
            self.leaving.value = True
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
        # torchrun passes on the Ctrl-C that the terminal has sent to everybody: that is no second one.
        again = self.asked == "SIGINT" and number == signal.SIGINT and time.monotonic() - self._since > 1
        self.asked, self._since = signal.Signals(number).name, time.monotonic()
        own, at_once = os.getpid() == self._process, again or not self.waiting
        if own and PartialState().is_main_process:
            hint = "stopping (Ctrl-C again: at once)" if number == signal.SIGINT else "stopping"
            # Not by print, which must not be called again while it is at work.
            said = f"\n{self.asked}: {'stopped; the same command goes on, or starts again' if at_once else hint}\n"
            os.write(sys.__stdout__.fileno() if sys.__stdout__ else 1, said.encode())
        if at_once or not own:
            raise SystemExit(EXIT_CODE)


def undisturbed(then: Callable[[int], None] | None, leaving: Any, worker: int) -> None:
    """
    Begins a worker that loads pictures (`worker_init_fn`): signals to a whole group, which torchrun, `timeout` and
    terminals send, must not take from a step what it needs to be finished.

    Args:
        then (`Callable`, *optional*): The `worker_init_fn` that there was.
        leaving (`multiprocessing.Value`): Whether the process itself is leaving, which ends its workers by SIGTERM.
        worker (`int`): The worker's number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(leaving))
    if then is not None:
        then(worker)


def _leave(leaving: Any) -> None:
    if leaving.value:
        os._exit(0)


def _follow_launcher() -> None:
    """
    Has the kernel send SIGTERM when `accelerate launch` dies: it does not pass SIGTERM on to its one process, which
    would train on, unseen, on a GPU that is given to somebody else.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


INTERRUPTION = Interruption()  # signals are of the process, and so is what was asked
