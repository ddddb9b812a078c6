"""Compute independent items in worker processes, beside the process that asks."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from common.errors import RunError
from common.processes import die_with_parent

Given = TypeVar("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items that a worker has in hand: it must not wait for this process, which looks between two of its own."""


class Workers(Generic[Given, Item, Result]):
    """`compute(given, item)` in `jobs` processes, this one included. A context: leaving it ends the others,
    in the middle of their work where there is some.

    A worker has one thread of torch. It starts as a new interpreter, which imports the module of `compute`: a
    copy of this process would have the locks of torch's threads without the threads. Until it has started,
    this process computes alone.

    Args:
        compute: a function of a module, whose result depends on its arguments alone.
        given: what every call gets; sent to each worker once.
        jobs: with 1 there is no worker.
    """

    def __init__(self, compute: Callable[[Given, Item], Result], given: Given, *, jobs: int) -> None:
        self._compute, self._given = compute, given
        self._processes: dict[Connection, BaseProcess] = {}
        self._in_hand: dict[Connection, int] = {}  # of the workers that have started
        context = multiprocessing.get_context("spawn")
        if jobs > 1:
            resource_tracker.ensure_running()  # by `start`, it would let SIGINT through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process
        try:
            for _ in range(jobs - 1):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, compute), daemon=True)
                process.start()
                theirs.close()
                self._processes[ours] = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> Workers[Given, Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.kill()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()

    def map(self, items: Sequence[Item], *, tell: Callable[[int], None]) -> list[Result]:
        """The result of each item, in their order. They are begun in this order too: the longest should be
        first. After an exception there is no other call.

        Args:
            tell: called now and then with the number of results so far.
        Raises:
            RunError: a worker ended by itself (code `worker-ended`).
            Exception: as `compute`, whichever process it was in.
        """
        waiting = deque(enumerate(items))
        results: dict[int, Result] = {}
        while len(results) < len(items):
            told = wait(list(self._processes), 0 if waiting else None)
            for pipe in self._processes:
                if pipe in told:
                    self._take(pipe, results)
            for pipe, count in self._in_hand.items():
                for _ in range(min(AHEAD - count, len(waiting))):
                    self._send(pipe, waiting.popleft())
                    self._in_hand[pipe] += 1
            if waiting:
                place, item = waiting.popleft()
                results[place] = self._compute(self._given, item)
            tell(len(results))
        return [results[place] for place in range(len(items))]

    def _take(self, pipe: Connection, results: dict[int, Result]) -> None:
        """Keep a worker's result; give it what every call gets where it says that it has started."""
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            raise self._ended(pipe) from None
        if answer is None:
            self._send(pipe, self._given)
            self._in_hand[pipe] = 0
            return
        place, found = answer
        if isinstance(found, Exception):
            raise found
        results[place] = found
        self._in_hand[pipe] -= 1

    def _send(self, pipe: Connection, what: object) -> None:
        try:
            pipe.send(what)
        except OSError:
            raise self._ended(pipe) from None

    def _ended(self, pipe: Connection) -> RunError:
        self._processes[pipe].join(1)
        return RunError(
            f"a worker process ended (status {self._processes[pipe].exitcode})",
            code="worker-ended",
            hint="out of memory? --jobs 1 of simulate or run tune needs less",
        )


def _serve(pipe: Connection, compute: Callable[[Any, Any], Any]) -> None:
    """Compute items until the other end of the pipe is closed."""
    die_with_parent()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        pipe.send(None)  # it has started
        given = pipe.recv()
        while True:
            place, item = pipe.recv()
            try:
                found = compute(given, item)
            except Exception as error:  # raised again where it was asked for
                found = error
            pipe.send((place, found))
