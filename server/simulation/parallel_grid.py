"""A Flower grid whose nodes live in worker processes, so that sites train side by side.

Each node has its place in one process for the whole run: what its agent keeps between rounds stays warm, and
no two processes work for one site at a time. At most `jobs` messages are answered at once, each on the same
number of threads however many there are, so that a model has the same bits for any number of jobs.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Condition
from types import TracebackType

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from common.devices import use_device
from common.errors import RunError
from common.learning import set_threads
from common.processes import die_with_parent
from server.simulation.local_grid import LocalGrid, named, stamp

PLACES = 2
"""Processes for each job: while the nodes of one wait for the others of their round, another has work."""
WAIT_S = 10.0  # after which the caller may look at its deadline


class ParallelGrid(LocalGrid):
    """Deliver messages to one ClientApp in each of several processes. A context: leaving it ends them.

    Args:
        app: the ClientApp, as "module:name"; imported once, before the processes part.
        sites, run_config: as `LocalGrid`.
        jobs: messages that are answered at once.
        threads: of torch, in each process.
        device: where each computes (common/devices.py); `auto` spreads them over all GPUs.
        load: what each node will have to compute, in any unit; heavy ones get a process for themselves.
        preload: other modules that every process needs.
    """

    def __init__(
        self,
        app: str,
        sites: Mapping[int, Mapping[str, str]],
        run_config: Mapping[str, str],
        *,
        jobs: int,
        threads: int,
        load: Mapping[int, float],
        device: str = "cpu",
        preload: Sequence[str] = (),
    ) -> None:
        super().__init__(_no_app, sites, run_config)
        self._slots = _Slots(jobs)
        self._answers: dict[str, Future[Message]] = {}
        self._seconds: dict[int, float] = {}  # CPU of each worker, as it last said
        self._place = places(load, min(len(sites), PLACES * jobs))
        # forkserver: torch is imported once, in a process that has no thread yet
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([app.partition(":")[0], *preload])
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._posts: list[ThreadPoolExecutor] = []
        for place in sorted(set(self._place.values())):
            ours, theirs = context.Pipe()
            nodes = {node: dict(config) for node, config in sites.items() if self._place[node] == place}
            process = context.Process(
                target=_serve,
                args=(theirs, app, nodes, dict(run_config), threads, device, place),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            self._posts.append(ThreadPoolExecutor(1, f"place-{place}"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, in the middle of their work where there is some."""
        for process in self._processes:
            process.terminate()
        for post in self._posts:
            post.shutdown(wait=False)  # what still waits there fails at once
        for process in self._processes:
            process.join()

    def cpu_seconds(self) -> float:
        """What the processes have used so far, their last answers included."""
        return sum(self._seconds.values())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(messages)
        for message_id in ids:
            message = self._waiting.pop(message_id)
            place = self._place[message.metadata.dst_node_id]
            self._answers[message_id] = self._posts[place].submit(self._ask, place, message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there; waits a while for the first.

        Raises:
            RunError: a process ended by itself (code `worker-ended`).
        """
        asked = {self._answers[number]: number for number in message_ids if number in self._answers}
        done, _ = wait(asked, WAIT_S, FIRST_COMPLETED)
        for one in done:
            del self._answers[asked[one]]
        return [one.result() for one in done]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._answers.pop(number).result(timeout) for number in self.push_messages(messages)]

    def _ask(self, place: int, message: Message) -> Message:
        if message.metadata.dst_node_id in self.down:
            return self.deliver(message)
        with self._slots:
            try:
                self._pipes[place].send_bytes(message_to_proto(message).SerializeToString())
                self._seconds[place] = float(self._pipes[place].recv())
                answer = message_from_proto(ProtoMessage.FromString(self._pipes[place].recv_bytes()))
            except (EOFError, OSError):
                self._processes[place].join(1)
                raise RunError(
                    f"a process of the simulation ended (status {self._processes[place].exitcode})",
                    code="worker-ended",
                    hint="out of memory? fewer side by side need less: fedqc run resume RUN --jobs 1",
                ) from None
        stamp(answer)
        return answer


class _Slots:
    """So many may be inside at once, in the order in which they came: else a site may wait for ever."""

    def __init__(self, count: int) -> None:
        self._free, self._came = count, 0  # the first tickets that may enter; tickets given
        self._changed = Condition()

    def __enter__(self) -> None:
        with self._changed:
            ticket, self._came = self._came, self._came + 1
            self._changed.wait_for(lambda: ticket < self._free)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()


def places(load: Mapping[int, float], count: int) -> dict[int, int]:
    """Node -> its place, 0..count-1: the heaviest first, each where least is to be done (Graham, SIAM J.
    Appl. Math. 17, 1969).
    """
    filled = [0.0] * count
    place: dict[int, int] = {}
    for node in sorted(load, key=lambda node: (-load[node], node)):
        place[node] = filled.index(min(filled))
        filled[place[node]] += max(load[node], 1e-9)
    return place


def _serve(
    pipe: Connection,
    app: str,
    nodes: Mapping[int, Mapping[str, str]],
    run_config: Mapping[str, str],
    threads: int,
    device: str,
    place: int,
) -> None:
    """Answer messages until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that conducts the run
    die_with_parent()
    set_threads(threads)
    use_device(device, spread=place)
    grid = LocalGrid(named(app), nodes, run_config)
    with suppress(EOFError, OSError):
        while True:
            message = message_from_proto(ProtoMessage.FromString(pipe.recv_bytes()))
            answer = grid.deliver(message)
            used = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(used.ru_utime + used.ru_stime)
            pipe.send_bytes(message_to_proto(answer).SerializeToString())


def _no_app(message: Message, context: object) -> Message:
    raise AssertionError("every message goes to a process")
