"""Run a function over many items in child processes, each with a limit on its memory and on the time of one
item.

A decoder that meets a hostile or damaged file may hang, ask for all memory, crash, or do as the file tells
it. So it runs in a process that has no open file of ours, no terminal and no secret in its environment, and
may be killed at any moment; the item it had in hand is then answered with a code, and no other item notices.

The parent says what to do in JSON, and believes nothing: an answer is JSON and the raw bytes of arrays, whose
types, shapes and sizes are checked before memory is given to them. It is never unpickled, because unpickling
obeys the sender. What an answer *means* is for the caller to check.

The child is a fresh interpreter: a fork would copy a process that has torch's and gRPC's threads and a
hospital's key in it, and `multiprocessing` would import the caller's `__main__` again. It imports the module
of the function and what that needs, nothing else.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import heapq
import importlib
import itertools
import json
import math
import os
import re
import resource
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from common.errors import ImagingError, InternalError, RunError
from common.processes import die_with_parent

WORKER_CODES: dict[str, str] = {
    "too-slow": "takes longer to read than any image should",
    "out-of-memory": "needs more memory to read than any image should",
    "decoder-crashed": "the decoder process crashed twice on this file",
}
Function = Callable[[Any], tuple[Any, Sequence[np.ndarray]]]

SECONDS_PER_ITEM = 10.0
MEMORY_BYTES = 1 << 30
MAX_CHILDREN = 8  # each may use its memory limit, and reading is bound by the disk long before

_QUEUED = 2  # items sent ahead to a child, so that it never waits for us
_AHEAD = 8  # answers per child that may wait for an earlier one
# of such answers, above which only the earliest item is handed out: the memory of the parent stays flat
_HELD_BYTES = 256 << 20
_MAX_ANSWER_BYTES = 512 << 20  # arrays of one answer
_START_S = 120.0  # for a child to import its modules, from a cold disk shared by many
_MAX_WAITS = 60  # times the limit of an item that waiting for a processor may add to it
_WORTH_A_CHILD_S = 0.3  # what one more child costs to start; a small folder is done before that
_TRIES = 2  # an item that is in hand when a child crashes may be the victim of the one before it
_MAX_JSON_BYTES = 16 << 20
_MAX_DIMENSIONS = 8
_FILES = 64  # that a child may have open
_DTYPES = frozenset({"|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"})
_CODE = re.compile(r"[a-z][a-z0-9-]{0,31}")
_LENGTH = struct.Struct(">I")
_PR_SET_DUMPABLE = 4
_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from client.dicom.workers import serve; serve()"
_NOT_HERE = ("requests", "PIL")
_ENVIRONMENT = frozenset(
    {
        "PATH",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "PYTHONHOME",
        "PYTHONUTF8",
        "PYTHONPYCACHEPREFIX",
    }
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# for glibc: use the memory of the last image again; fresh pages from the kernel took a fifth of the time
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one item: what the function gave, or a failure. Of `value`, only that it is JSON is
    known.
    """

    value: Any = None
    arrays: tuple[np.ndarray, ...] = ()
    failure: str = (
        ""  # "", a code of `WORKER_CODES`, or the code of the ImagingError that the function raised
    )


class Workers:
    """Child processes that each run `function` over one item after the other.

    Args:
        function: of a module, not of `__main__`; takes one JSON-able item, gives a JSON-able value and arrays
            of integers or floats. An ImagingError answers with its code, a MemoryError with `out-of-memory`,
            any other exception with `unreadable`. What it prints is thrown away, and it cannot write files.
        count: the most children at a time; by default one for each processor this process may use, at most
            `MAX_CHILDREN`.
        seconds_per_item: after which the child is killed, and the item is `too-slow`. Counts only while `map`
            is being asked for answers, and on Linux not while the child is ready and other processes have the
            processors: on a busy machine no file is at fault.
        memory_bytes: address space beyond what Python and numpy take. Linux; other systems may not enforce
            it.
        linger: leave idle children for the next Workers with the same settings in this process (about 50 MiB
            each), which saves their start. They end with the process. What a hostile item did to a child
            would then meet the items of the next user.

    To be used as a context manager, by one thread (on Linux a child ends with the thread that started it),
    for one `map` at a time.
    """

    def __init__(
        self,
        function: Function,
        *,
        count: int | None = None,
        seconds_per_item: float = SECONDS_PER_ITEM,
        memory_bytes: int = MEMORY_BYTES,
        linger: bool = False,
    ) -> None:
        module, name = function.__module__, function.__qualname__
        if module == "__main__" or "<" in name:
            raise InternalError(
                f"{module}.{name}: a child cannot import it", hint="give a function of a module"
            )
        settings = {
            "module": module,
            "function": name,
            "seconds": seconds_per_item,
            "memory_bytes": memory_bytes,
            "parent": os.getpid(),
        }
        self._settings = json.dumps(settings)
        self._seconds, self._linger = seconds_per_item, linger
        self._count = count or min(_processors(), MAX_CHILDREN)
        self._children: list[_Child] = []
        self._grown_at = 0.0

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the children, or leave them for the next to come."""
        if self._linger:
            lingering = _LINGERING[self._settings]
            idle = [child for child in self._children if child.ready and not child.numbers][
                : max(self._count - len(lingering), 0)
            ]
            self._children = [child for child in self._children if child not in idle]
            lingering += idle
        self._end()

    def pids(self) -> list[int]:
        """The children that exist now."""
        return [child.pid for child in self._children]

    def map(self, items: Iterable[Any]) -> Iterator[Outcome]:
        """The outcome of each item, in the order of the items, which are taken only a few ahead of what was
        asked for.

        Closing the iterator early, or an exception while it waits, ends the children at once. No item, no
        child.
        Raises:
            RunError: `worker-failed`, a child cannot be started.
        """
        source = enumerate(items)
        asked: dict[int, bytes] = {}  # taken from `items` and not answered
        waiting: list[int] = []  # those of them that no child has, a heap
        tries: Counter[int] = Counter()
        done: dict[int, Outcome] = {}  # answered, and waiting for an earlier one
        wanted = taken = 0
        self._grown_at = time.monotonic()
        finished = False
        try:
            while True:
                for number, item in itertools.islice(source, wanted + _AHEAD * self._count - taken):
                    asked[number] = json.dumps(item).encode()
                    heapq.heappush(waiting, number)
                    taken += 1
                if wanted == taken:
                    break
                held = sum(array.nbytes for outcome in done.values() for array in outcome.arrays)
                self._hand_out(waiting, asked, only=wanted if held > _HELD_BYTES else None)
                if wanted in done:
                    wanted += 1
                    yield done.pop(wanted - 1)
                else:
                    for number, outcome in self._listen(waiting, tries):
                        done[number] = outcome
                        del asked[number]
            finished = True
        finally:
            if not finished:
                self._end()

    def _hand_out(self, waiting: list[int], asked: dict[int, bytes], only: int | None) -> None:
        """Give waiting items to the children that have room, the earliest first; start more children when
        that pays.
        """
        while waiting and only in {None, waiting[0]}:
            free = min(self._children, key=lambda child: len(child.numbers), default=None)
            if free is None or len(free.numbers) >= _QUEUED:
                if not self._may_grow():
                    return
                free = self._start()
            number = heapq.heappop(waiting)
            free.take(number, asked[number])

    def _may_grow(self) -> bool:
        """The first child starts at once. As many again may start when those there are have worked for as
        long as a start takes.
        """
        ready = sum(child.ready for child in self._children)
        if not self._children or len(self._children) >= self._count:
            return not self._children
        return len(self._children) < 2 * ready and time.monotonic() - self._grown_at >= _WORTH_A_CHILD_S

    def _start(self) -> _Child:
        lingering = _LINGERING[self._settings]
        while lingering:
            child = lingering.pop()
            if child.is_alive():
                self._children.append(child)
                return child
            child.end()
        try:
            child = _Child(self._settings, seconds=self._seconds)
        except OSError as error:
            raise _cannot_start(type(error).__name__) from None
        self._children.append(child)
        return child

    def _listen(self, waiting: list[int], tries: Counter[int]) -> Iterator[tuple[int, Outcome]]:
        """Wait until a child has something to say or is out of time; the items answered by that."""
        busy = [child for child in self._children if child.numbers]
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                child.register(selector)
            timeout_s = min(child.left_s for child in busy)
            if waiting and len(self._children) < self._count:
                timeout_s = min(timeout_s, _WORTH_A_CHILD_S)
            before = time.monotonic()
            events = selector.select(max(timeout_s, 0.0))
        # The clock runs only while we listen: a caller that is slow to ask does not make an item slow.
        listened = time.monotonic() - before
        for child in busy:
            child.left_s -= listened
        for child in {key.data for key, _ in events}:
            was_ready = child.ready
            try:
                yield from child.talk()
            except _GoneError:
                yield from self._bury(child, waiting, tries)
            if child.ready and not was_ready:
                self._grown_at = time.monotonic()
        for child in busy:
            if child.numbers and child.left_s <= 0 and child in self._children and not child.has_waited():
                yield from self._bury(child, waiting, tries, failure="too-slow")

    def _bury(
        self, child: _Child, waiting: list[int], tries: Counter[int], failure: str = ""
    ) -> Iterator[tuple[int, Outcome]]:
        """End a child. The item it had in hand is to blame, or gets another try; those behind it go to
        another child.
        """
        self._children.remove(child)
        status = child.end()
        if not child.ready:
            raise _cannot_start(child.why or ("takes too long" if failure else f"status {status}"))
        left, child.numbers = list(child.numbers), deque()
        if left:
            tries[left[0]] += 1
            failure = failure or ("too-slow" if status == -signal.SIGALRM else "")
            if failure or tries[left[0]] >= _TRIES:
                yield left.pop(0), Outcome(failure=failure or "decoder-crashed")
        for number in left:
            heapq.heappush(waiting, number)

    def _end(self) -> None:
        children, self._children = self._children, []
        for child in children:
            child.end()


class _GoneError(Exception):
    """The child ended, or said what it cannot mean."""


class _Child:
    """One child process, as its parent sees it. Raises OSError where it cannot be started."""

    def __init__(self, settings: str, *, seconds: float) -> None:
        paths = [str(Path(__file__).parents[2]), *(os.path.abspath(path) for path in sys.path if path)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, *paths],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders print what stands in a file
            env={name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
            | _ONE_THREAD
            | _KEEP_MEMORY,
            # Ctrl-C reaches the parent alone; and what the child may have started is killed with it
            process_group=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        _widen(self._from)
        self.pid = self._process.pid
        self.ready = False
        self.why = ""  # of a child that could not start: the kind of exception
        self.numbers: deque[int] = deque()  # items it was given and did not answer; it works on the first
        self.left_s = _START_S  # until it has to have started, or answered
        self._seconds = seconds
        self._waited_s = self._credit_s = 0.0
        self._waits: int | None = None  # what the system says of its waiting, open
        with suppress(OSError):
            self._waits = os.open(f"/proc/{self.pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self._outgoing = bytearray(_framed(settings.encode()))
        self._heard: list[tuple[int, Outcome]] = []
        self._buffers = self._wanted_buffers()
        self._empty = next(self._buffers)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def register(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._from, selectors.EVENT_READ, self)
        if self._outgoing:
            selector.register(self._to, selectors.EVENT_WRITE, self)

    def take(self, number: int, item: bytes) -> None:
        if self.ready and not self.numbers:
            self._begin()
        self.numbers.append(number)
        self._outgoing += _framed(str(number).encode() + b" " + item)
        self._send()

    def talk(self) -> list[tuple[int, Outcome]]:
        """Send and receive what can be without waiting; the answers that are complete now.

        Raises:
            _GoneError: after the last answer that was complete, which is kept for the next call.
        """
        gone = False
        self._send()
        try:
            self._receive()
        except _GoneError:
            gone = True
        heard, self._heard = self._heard, []
        if gone and not heard:
            raise _GoneError
        return heard

    def end(self) -> int:
        """Kill it, whatever it does, with everything it started; its exit status."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if self._waits is not None:
            os.close(self._waits)
            self._waits = None
        return status

    def _send(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._to, self._outgoing)]
        except BlockingIOError:
            pass
        except OSError:  # it ended; what it said before is still to be read, and the end of that tells
            self._outgoing.clear()

    def _receive(self) -> None:
        """Fill the buffer that is wanted, then the next one, until there is nothing to read."""
        try:
            while True:
                count = os.readv(self._from, [self._empty])
                if not count:
                    raise _GoneError
                self._empty = self._empty[count:]
                if not self._empty.nbytes:
                    self._empty = next(self._buffers)
        except BlockingIOError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
            raise _GoneError from None  # it ended, or its answer is not one

    def _wanted_buffers(self) -> Iterator[memoryview]:
        """The memory that the next bytes belong into, one buffer after the other. What cannot be an answer
        raises an error of any kind.
        """
        while True:
            yield memoryview(length := bytearray(_LENGTH.size))
            if not 0 < (count := _LENGTH.unpack(length)[0]) <= _MAX_JSON_BYTES:
                raise ValueError
            yield memoryview(text := bytearray(count))
            answer = json.loads(text)
            if not self.ready:
                self.why = answer.get("cannot_start", "")[:64]
                if self.why or answer != {"ready": True}:
                    raise ValueError
                self.ready = True
            else:
                if answer["item"] != self.numbers[0]:
                    raise ValueError
                if "failure" in answer:
                    if not _CODE.fullmatch(answer["failure"]):
                        raise ValueError
                    outcome = Outcome(failure=answer["failure"])
                else:
                    arrays = _arrays(answer["arrays"])
                    for array in arrays:
                        if array.nbytes:
                            yield array.reshape(-1).view(np.uint8).data
                    outcome = Outcome(value=answer["value"], arrays=tuple(arrays))
                self._heard.append((self.numbers.popleft(), outcome))
            self._begin()

    def _begin(self) -> None:
        """The time of the next item begins."""
        self.left_s, self._credit_s, self._waited_s = self._seconds, 0.0, self._wait_s()

    def has_waited(self) -> bool:
        """Whether the item waited for a processor since its time began: it gets that time again."""
        waited = self._wait_s()
        again = min(waited - self._waited_s, _MAX_WAITS * self._seconds - self._credit_s)
        if not self.ready or again < 0.01 * self._seconds:
            return False
        self._waited_s, self._credit_s = waited, self._credit_s + again
        self.left_s += again
        return self.left_s > 0

    def _wait_s(self) -> float:
        """How long the child was ready to run and did not, since its start; 0 where the system does not say.

        Reference: Linux, Documentation/scheduler/sched-stats.rst, /proc/PID/schedstat.
        """
        if self._waits is None:
            return 0.0
        try:
            return int(os.pread(self._waits, 128, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0


# idle children, by their settings, which name this process
_LINGERING: dict[str, list[_Child]] = defaultdict(list)


@atexit.register
def _end_lingering() -> None:
    for settings, children in _LINGERING.items():
        while children and json.loads(settings)["parent"] == os.getpid():  # a fork has no say over them
            children.pop().end()


def _cannot_start(why: str) -> RunError:
    hint = "is there memory for another process, and does `fedqc --version` work?"
    return RunError(
        f"a worker process for reading images cannot start ({why})", code="worker-failed", hint=hint
    )


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _widen(descriptor: int) -> None:
    """Room for an image in the pipe, so that the child can go on to the next. Linux, and only while this user
    has pipe space left.
    """
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 1 << 20)


def _framed(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content


def _arrays(described: list[list[Any]]) -> list[np.ndarray]:
    """Arrays to fill, of what an answer says they are: `[[dtype, [side, ...]], ...]`, within
    `_MAX_ANSWER_BYTES` together.

    Raises:
        ValueError, TypeError: no such array.
    """
    arrays: list[np.ndarray] = []
    left = _MAX_ANSWER_BYTES
    for dtype, shape in described:
        if (
            dtype not in _DTYPES
            or len(shape) > _MAX_DIMENSIONS
            or not all(type(side) is int and side >= 0 for side in shape)
        ):
            raise ValueError
        left -= math.prod(shape) * np.dtype(dtype).itemsize
        if left < 0 or max(shape, default=0) > _MAX_ANSWER_BYTES:
            raise ValueError
        arrays.append(np.empty(shape, dtype))
    return arrays


def serve() -> None:
    """The life of a child: read a setting and then items from standard input, write answers to what was
    standard output.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    incoming, outgoing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what a decoder prints must not stand between two answers
        os.dup2(null, descriptor)
    os.close(null)
    settings = json.loads(_next_frame(incoming) or b"{}")
    if not settings:
        return
    _limit(settings["memory_bytes"])
    if sys.platform == "linux":
        die_with_parent()
        # no core file, which would hold images, not even through a crash reporter
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.getppid() != settings["parent"]:  # it ended before its end could be ours
        return
    # pydicom would load them, for its downloads and for decoders that nothing here asks
    sys.modules.update(dict.fromkeys(_NOT_HERE))  # type: ignore[arg-type]
    try:
        # Not a plug-in: the name of a function that the parent holds in its hand, see `Workers`.
        function = attrgetter(settings["function"])(importlib.import_module(settings["module"]))
    except BaseException as error:
        _write(outgoing, _framed(json.dumps({"cannot_start": type(error).__name__}).encode()))
        return
    # only now: Python may have had compiled modules to write
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _write(outgoing, _framed(b'{"ready": true}'))
    while (frame := _next_frame(incoming)) is not None:
        number, _, item = frame.partition(b" ")
        _answer(function, int(number), item, outgoing, settings["seconds"])


def _answer(function: Function, number: int, item: bytes, outgoing: int, seconds: float) -> None:
    """One item. Nothing of it is left when this returns."""
    # The parent keeps the time. Should it be gone, and with it whoever could kill us, this ends us, also in
    # a library that never returns.
    signal.setitimer(signal.ITIMER_REAL, (2 + _MAX_WAITS) * seconds + 1)
    arrays: list[np.ndarray] = []
    try:
        value, given = function(json.loads(item))
        arrays = [_plain(array) for array in given]
        described = [[array.dtype.str, array.shape] for array in arrays]
        header = json.dumps({"item": number, "value": value, "arrays": described}).encode()
        if len(header) > _MAX_JSON_BYTES or sum(array.nbytes for array in arrays) > _MAX_ANSWER_BYTES:
            raise ImagingError("more than one answer may hold", code="too-large")
    except BaseException as error:  # SystemExit too: a library has no business to end us
        header, arrays = json.dumps({"item": number, "failure": failure_of(error)}).encode(), []
    signal.setitimer(signal.ITIMER_REAL, 0)
    _write(outgoing, _framed(header))
    for array in arrays:
        if array.nbytes:
            _write(outgoing, array.reshape(-1).view(np.uint8).data)


def _plain(array: np.ndarray) -> np.ndarray:
    """The same numbers as they travel: in one piece, little-endian."""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
    if plain.dtype.str not in _DTYPES:
        raise TypeError
    return plain


def failure_of(error: BaseException) -> str:
    """The code of what a function raised. Only a code goes out: the text of an exception may quote a
    header.
    """
    if isinstance(error, ImagingError):
        return error.code
    return "out-of-memory" if isinstance(error, MemoryError) else "unreadable"


def _limit(memory_bytes: int) -> None:
    """What this process may use from now on. Python with numpy takes about 100 MiB of address space, which
    does not count.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, _FILES)
    try:
        occupied = (
            int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        )
    except OSError:
        occupied = 512 << 20
    _lower(resource.RLIMIT_AS, occupied + memory_bytes)


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(OSError, ValueError):  # macOS has the name RLIMIT_AS, and no such limit
        resource.setrlimit(limit, (value, value))


def _next_frame(incoming: int) -> bytes | None:
    """The next message of the parent; None when there will be no more."""
    length = _read(incoming, _LENGTH.size)
    return None if length is None else _read(incoming, _LENGTH.unpack(length)[0])


def _read(incoming: int, count: int) -> bytes | None:
    content = bytearray()
    while len(content) < count:
        block = os.read(incoming, count - len(content))
        if not block:
            return None
        content += block
    return bytes(content)


def _write(outgoing: int, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest.nbytes:
        rest = rest[os.write(outgoing, rest) :]
