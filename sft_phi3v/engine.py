"""Where the work is done: in processes of this machine, or as tasks on a Ray cluster. The work knows of neither.

A function over tasks is all there is to it. A process that does a task tells how its rows went ([`progress`]) and asks
whether it should go on ([`stopped`]).
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from sft_phi3v.recipe import PrepareArguments

Run = Callable[..., Iterator[tuple[int, Any]]]  # what `engine` gives


def _silent(reason: str) -> None:
    """What a process does with the outcome of a row where nobody shows a progress bar."""


# Set once when a worker process starts; a task cannot carry them.
_progress: Callable[[str], None] = _silent
_stopped: Callable[[], bool] = bool


def progress(reason: str) -> None:
    """Tells whoever waits that a row is done, and why it is dropped (empty: it is not)."""
    _progress(reason)


def stopped() -> bool:
    """Whether this process should leave off: the one that started it says so, or is gone."""
    return _stopped()


def count_workers(settings: PrepareArguments, *, remote: bool) -> int:
    """How many processes; where they fetch, no more than may fetch at once from one host."""
    count = settings.workers
    if count is None and settings.engine == "ray":
        count = max(1, int(_ray().cluster_resources().get("CPU", 1)))
    elif count is None:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, settings.fetch_connections, settings.fetch_per_host) if remote else count


@contextlib.contextmanager
def engine(settings: PrepareArguments, workers: int) -> Iterator[Run]:
    """
    What runs a function over tasks in so many processes, and gives each task's number and result when it is done. Its
    third argument is told the outcome of each row, where the engine can.
    """
    if settings.engine == "ray":
        yield partial(_run_on_ray, workers)
        return
    context = multiprocessing.get_context("spawn")
    queue, stop, over = context.SimpleQueue(), context.Event(), threading.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (queue, stop))

    def run(
        function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], one_more: Callable[[str], None] = _silent
    ) -> Iterator[tuple[int, Any]]:
        over.clear()

        def listen() -> None:
            while not (over.is_set() and queue.empty()):
                if queue.empty():
                    time.sleep(0.05)
                else:
                    one_more(queue.get())

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            with _without_ctrl_c():  # a task that is put in may start a process
                futures = {pool.submit(function, *task): index for index, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            over.set()
            listener.join(timeout=2)  # a worker that was killed while it wrote leaves half a word

    with pool:
        try:
            yield run
        except BrokenProcessPool:
            raise ValueError(
                "A process that prepares was killed, most likely for want of memory. Nothing is lost: type the command "
                "again, with fewer `workers` or a smaller `max_pixels`."
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(queue: Any, stop: Any) -> None:
    """Connects a worker process to the progress bar, and to the fate of the process that started it."""
    global _progress, _stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and `stop` says it
    parent = multiprocessing.parent_process()
    _progress = queue.put

    def over() -> bool:
        return bool(stop.is_set()) or (parent is not None and not parent.is_alive())

    _stopped = over


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started in here never see Ctrl-C, which a terminal sends to all at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run_on_ray(
    workers: int,
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    one_more: Callable[[str], None] = _silent,
) -> Iterator[tuple[int, Any]]:
    ray = _ray()
    remote = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(function)
    queued, running = list(enumerate(tasks))[::-1], dict[Any, int]()
    while queued or running:
        while queued and len(running) < workers:  # the bounds on connections are shared among so many
            index, task = queued.pop()
            running[remote.remote(*task)] = index
        done, _ = ray.wait(list(running))
        for future in done:
            yield running.pop(future), ray.get(future)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
    except ImportError:
        raise ValueError("`engine: ray` needs Ray: pip install -c constraints.txt -e .[cluster]") from None
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise ValueError(f"`engine: ray`: this machine belongs to no running Ray cluster ({error}).") from None
    return ray
