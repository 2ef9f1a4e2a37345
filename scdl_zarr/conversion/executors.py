"""Who does the tasks of a conversion: threads, local processes, or the workers of a Dask cluster.

Each gives the same bytes, because a task depends on nothing but itself, and each runs the tasks through Dask::

    threads      dask's threaded scheduler ──► pool ──► run_task (a task that waits for the disk leaves its place to another)
    processes    dask's threaded scheduler ──► pool ──► pipe ──► run_task in a fresh interpreter (one for each place in the pool)
    cluster      dask.distributed ──► scheduler ──► run_task in a worker, as many at once as its memory allows

Tasks are small and so are their results: what is large is read and written where the task runs.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scdl_zarr.conversion.fetched import leave_folder
from scdl_zarr.conversion.places import Places
from scdl_zarr.conversion.plan import Task
from scdl_zarr.conversion.remote_building import run_task
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.stopping import StoppedError, interruptible_pool, refuse_if_stopped
from scdl_zarr.errors import MissingDependencyError, OptionError, ScdlZarrError

__all__ = ["Cluster", "Crew", "Executor", "Processes", "Threads", "connected", "serve_tasks", "threads_of_workers"]

SECONDS_TO_CONNECT = 30
TRIES = 3  # of a task whose process dies under it
Report = Callable[[ShardResult], object]
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """How many work: ``processes`` with ``threads`` tasks at a time in each."""

    kind: str  # "threads", "processes" or "cluster"
    processes: int
    threads: int
    waiting: int = 0  # tasks in each process beside those: they are done but for the disk

    def __str__(self) -> str:
        if self.kind == "threads":
            return f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        each = f" of {self.threads} threads" if self.threads > 1 else ""
        where = " on a cluster" if self.kind == "cluster" else ""
        return f"{self.processes} {'process' if self.processes == 1 else 'processes'}{each}{where}"


class Executor(Protocol):
    """Runs tasks."""

    crew: Crew

    def run(self, tasks: Sequence[Task], report: Report, say: Say) -> list[ShardResult]:
        """Do all tasks; their results, in their order.

        `report` hears of each as it is done, from any thread.  The first error ends it: tasks that have begun are waited for, the
        others are not begun.  Ctrl-C gives up those that have begun.
        """

    def leave(self, root: str) -> None:
        """Nothing more is done in that folder: let whoever is on another machine know."""


@dataclass(slots=True)
class Threads:
    """In threads of this process."""

    crew: Crew

    def run(self, tasks: Sequence[Task], report: Report, say: Say) -> list[ShardResult]:
        places = Places(self.crew.threads)
        return _run_in_pool(tasks, self.crew.threads + self.crew.waiting, run_task, report, say, places)

    def leave(self, root: str) -> None:
        pass


class NotBegunError(Exception):
    """What becomes of a task that had not begun when another one failed."""


def _run_in_pool(
    tasks: Sequence[Task],
    threads: int,
    do: Callable[[Task], ShardResult],
    report: Report,
    say: Say,
    places: Places | None = None,
) -> list[ShardResult]:
    """Do tasks in threads, or in as many of them at a time as there are `places`."""
    from dask.threaded import get

    failed: list[BaseException] = []

    def done(task: Task) -> ShardResult:
        with places.taken() if places is not None else contextlib.nullcontext():
            if failed:
                raise NotBegunError(task.name)
            try:
                return do(task)
            except BaseException as error:
                failed.append(error)  # before the place is given to another one
                raise

    def reported(task: Task) -> ShardResult:  # not by a callback of dask's: those hear of every computation in the process
        result = done(task)
        report(result)
        return result

    # said as a graph: dask.compute would first look for a cluster, which takes longer than a small conversion
    left = range(len(tasks), 0, -1)  # of tasks that do not wait for one another dask begins with the last name
    graph = {f"{k:09d} {task.name}": (functools.partial(reported, task),) for k, task in zip(left, tasks, strict=True)}
    # a pool of our own: leaving it waits for tasks that still run after another one failed
    with interruptible_pool(threads, say) as pool:
        try:
            return list(get(graph, list(graph), pool=pool, num_workers=threads))
        except NotBegunError:  # heard of before the error that it is due to
            raise failed[0] from failed[0].__cause__  # which says whether it may pass


# ---- local processes


class Processes:
    """In fresh interpreters of this machine, which know nothing of the script that asked.

    A process whose parent is gone ends at once.  One that dies under a task (out of memory) is replaced, and the task done again.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self._idle: list[_Child] = []
        self._children: list[_Child] = []
        self._lock = threading.Lock()
        self._closed = False

    def run(self, tasks: Sequence[Task], report: Report, say: Say) -> list[ShardResult]:
        places = self.crew.processes * self.crew.threads

        def stop(line: str) -> None:
            say(line)
            self.close()  # what they are at is given up, rather than waited for

        try:
            return _run_in_pool(tasks, min(places, max(len(tasks), 1)), self._do, report, stop)
        except (KeyboardInterrupt, StoppedError):
            self.close()
            raise

    def _do(self, task: Task) -> ShardResult:
        for _ in range(TRIES):
            refuse_if_stopped(task.root)
            child = self._take()
            try:
                result = child.call(task)
            except _LostError as error:
                lost = error
                child.end()
                continue
            except BaseException:
                self._give(child)
                raise
            self._give(child)
            return result
        refuse_if_stopped(task.root)
        raise RuntimeError(f"{task.name}: the process that worked on it ended {TRIES} times ({lost}); is there enough memory?")

    def _take(self) -> _Child:
        with self._lock:
            if self._closed:
                raise StoppedError("its processes have ended")
            if self._idle:
                return self._idle.pop()
            child = _Child()
            self._children.append(child)
            return child

    def _give(self, child: _Child) -> None:
        with self._lock:
            self._idle.append(child)

    def leave(self, root: str) -> None:
        pass

    def close(self) -> None:
        with self._lock:
            self._closed = True  # no others are added
        for child in self._children:  # again where a second Ctrl-C struck here the first time
            child.end()


class _LostError(Exception):
    """A process ended instead of answering."""


class _Child:
    """A fresh interpreter that does tasks, one after the other."""

    def __init__(self) -> None:
        code = "import sys; sys.path[:] = {!r}; from scdl_zarr.conversion.executors import serve_tasks; serve_tasks()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code.format(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which tells the others
        )

    def call(self, task: Task) -> ShardResult:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            kind, answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self.end()
            raise _LostError(f"exit code {self._process.returncode}") from error
        if kind == "error":
            assert isinstance(answer, BaseException)
            raise answer
        assert isinstance(answer, ShardResult)
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def serve_tasks() -> None:
    """In a child: do the tasks that come in, until nobody is there to send any; then end at once, whatever is being done."""
    import os
    import queue

    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what tasks print is no answer
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                tasks.put(pickle.load(incoming))
            except Exception:  # the parent is gone
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        answer: tuple[str, Any]
        try:
            answer = ("result", run_task(tasks.get()))
        except Exception as error:
            answer = ("error", _portable(error))
        pickle.dump(answer, outgoing)
        outgoing.flush()


def _portable(error: Exception) -> Exception:
    """The error as something that another process can be told."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    kind = type(error) if isinstance(error, ScdlZarrError) else RuntimeError
    return kind(str(error)) if kind is not RuntimeError else RuntimeError(f"{type(error).__name__}: {error}")


# ---- a cluster


@dataclass(slots=True)
class Cluster:
    """On the workers of a ``dask.distributed`` cluster, which see the same files under the same paths.

    A task of a worker that is lost is done by another one; its result is the same.  Twice as many tasks as there are places are
    handed out: the scheduler has always one at hand.  When one fails its worker begins no other, and the others do not from the
    moment on that they are told.
    """

    crew: Crew
    client: Any

    def run(self, tasks: Sequence[Task], report: Report, say: Say) -> list[ShardResult]:
        import distributed

        waiting = list(enumerate(tasks))[::-1]
        not_begun: list[tuple[int, Task]] = []
        run = secrets.token_hex(8)
        places: dict[Any, int] = {}
        results: dict[int, ShardResult] = {}
        failed: BaseException | None = None
        done: Any = distributed.as_completed([], loop=self.client.loop)  # type: ignore[no-untyped-call]
        try:
            while waiting or places or (not_begun and failed is None):
                if not waiting and not places:  # the task that failed was done by another worker, as its own was lost
                    run, waiting, not_begun = secrets.token_hex(8), not_begun[::-1], []
                while waiting and failed is None and len(places) < 2 * self.crew.processes * self.crew.threads:
                    at, task = waiting.pop()
                    future = self._submit(task, run)
                    places[future] = at
                    done.add(future)
                if not places:
                    break
                future = next(done)
                at = places.pop(future)
                error = future.exception()
                if error is None:
                    results[at] = future.result()
                    report(results[at])
                elif isinstance(error, NotBegunError):
                    not_begun.append((at, tasks[at]))
                elif failed is None:
                    failed = error
                    with contextlib.suppress(Exception):  # some of them may be lost, which is no matter now
                        self.client.run(end_run, run, on_error="ignore")
        except KeyboardInterrupt:
            say("stopping; run the same conversion again to go on with the shards that are not finished")
            self.client.cancel(list(places))
            with contextlib.suppress(Exception):
                self.client.run(end_run, run, on_error="ignore", wait=False)
            raise
        if failed is not None:
            raise failed
        return [results[at] for at in range(len(tasks))]

    def leave(self, root: str) -> None:
        import distributed

        with contextlib.suppress(Exception):  # of a cluster that is lost: its workers find out themselves
            for address in self.client.nthreads():
                key = f"leave-{secrets.token_hex(4)}"
                left = self.client.submit(leave_folder, root, workers=[address], allow_other_workers=True, key=key, pure=False)
                distributed.fire_and_forget(left)  # type: ignore[no-untyped-call]

    def _submit(self, task: Task, run: str) -> Any:
        # what the dashboard shows; no result is taken for that of another task
        key = f"convert-{task.name}-{task.dtype}-{secrets.token_hex(4)}"
        return self.client.submit(run_on_worker, task, self.crew.threads, run, key=key, pure=False)


@contextlib.contextmanager
def connected(client: Any) -> Iterator[Any]:
    """The client that was given, or one of the scheduler at an address.

    Raises
    ------
    MissingDependencyError, OptionError
        There is no dask.distributed, or no scheduler at that address, or it has no workers.
    """
    try:
        import distributed
    except ImportError:
        raise MissingDependencyError("a Dask cluster needs distributed: pip install 'scdl-zarr[cluster]'") from None
    if isinstance(client, distributed.Client):
        yield client
        return
    if not isinstance(client, str):
        raise OptionError(f"client={client!r}; expected a dask.distributed.Client or the address of a scheduler (--scheduler)")
    try:
        distributed.comm.addressing.resolve_address(client)  # a client that was never connected goes only after a minute
        made = distributed.Client(client, timeout=SECONDS_TO_CONNECT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise OptionError(f"client={client!r} (--scheduler): no scheduler answers there: {error}") from error
    with made:
        yield made


def threads_of_workers(client: Any) -> list[int]:
    """How many threads each worker of a cluster has."""
    try:
        client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
    except TimeoutError as error:
        raise OptionError(f"{client!r} has no workers; start some with `dask worker`") from error
    return [int(threads) for threads in client.nthreads().values()]


_places: dict[int, threading.BoundedSemaphore] = {}
_making = threading.Lock()
_ended: set[str] = set()  # runs of which a task failed


def end_run(run: str) -> None:
    """Let no other task of that run begin in this process."""
    _ended.add(run)


def run_on_worker(task: Task, at_once: int, run: str) -> ShardResult:
    """Do a task on a worker that does `at_once` of them at a time, however many threads it has: so much memory was planned."""
    with _making:
        places = _places.setdefault(at_once, threading.BoundedSemaphore(at_once))
    with places:
        if run in _ended:
            raise NotBegunError(task.name)
        try:
            return run_task(task)
        except BaseException:
            end_run(run)
            raise
