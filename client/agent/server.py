"""Run a site's agent: a gRPC server on a unix socket in run/, without a network, one job at a time.

    request   u32 length of the plan (little-endian), plan (JSON, UTF-8), envelope         one message
    answer    "P" + JSON [stage, done, total], any number of times, then "A" + envelope    a stream

gRPC does not identify the process at the other end of a unix socket, so access is by file permissions: run/
has mode 0750, the socket 0660. Tasks are authorized by signatures, which `client.agent.verification` checks.

An error reaches the other side as a status and a fixed word; the details go to state/site.log.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from client.agent.job import NoAnswer
from client.agent.site_log import append_site_log
from client.ipc.protocol import BUSY, FAILED, MAX_BYTES, MAX_SOCKET_PATH_BYTES, METHODS, SERVICE, STOPPING
from client.site.isolation import Isolation, as_first_thing, isolate_network, main
from common.errors import ConfigError
from common.files import locked, sweep, write_bytes
from common.processes import keep_memory_private
from common.terminal import print

if TYPE_CHECKING:
    import grpc

DESCRIBE_WAIT_S = 2.0
"""How long a short request waits for a job that is about to end."""
GRACE_S = 7.0
"""After SIGTERM: how long the current job may take to stop."""
_AWAY = b"N"
"""Ends a call as if no agent were there."""
_CALLERS = 8  # threads: the job's, health's, and those that are told that the agent is busy

Progress = Callable[[str, int, int], None]


class Answer(Protocol):
    """What does the work: `Guard.answer`, see there."""

    def __call__(
        self, method: str, plan_json: str, envelope: bytes, *, progress: Progress, cancelled: threading.Event
    ) -> bytes: ...


def run_agent(
    site: Path,
    *,
    require_isolation: bool,
    isolate: bool = True,
    guard: Callable[[Path], Answer] | None = None,
) -> int:
    """Give up the network, then answer on SITE/run/agent.sock until SIGTERM or Ctrl-C.

    If run/stop-after-round exists the current job is finished and no other is started. run/busy exists while
    there is a job. run/agent.json holds {"pid", "started", "isolation", "holds"}.

    Args:
        site: the site's folder.
        require_isolation: refuse to start where the network cannot be given up; otherwise that is only
            reported.
        isolate: False leaves the network alone, for tests.
        guard: makes the function that does the work, once; default the site's `client.agent.verification`.
    Returns:
        exit status: 2 refused (isolation), 128 + number of the signal.
    Raises:
        ConfigError: `no-such-site`, `agent-running`, `socket-path`, `not-writable`, `no-such-device`.
    """
    if isolate and guard is None:
        as_first_thing("client.agent.server", site, require_isolation=require_isolation)
    isolation = isolate_network() if isolate else Isolation(holds=False, how="network isolation is off")
    if isolate:  # after the namespace: who is not dumpable may not map its user
        keep_memory_private()
    print(f"agent: {isolation.how}", file=sys.stderr, flush=True)
    if require_isolation and not isolation.holds:
        raise ConfigError(
            f"the agent can reach a network: {isolation.how}", code="not-isolated", hint=isolation.hint
        )
    site = site.absolute()
    service = _Service(site / "run", _state_folder(site) if guard is None else site / "state")
    with service.opened(isolation):
        return service.serve((guard or _guard)(site))


def _state_folder(site: Path) -> Path:
    from client.site.config import read_site

    config, folder = read_site(site)
    return folder / config.state


def _guard(site: Path) -> Answer:
    # torch is loaded now: if memory ran out while it loads later, it would stay broken
    import client.agent.tasks  # noqa: F401
    from client.agent.verification import guard_for
    from client.site.config import read_site
    from common.devices import describe, use_device

    print(
        f"agent: computes on {describe(use_device(read_site(site)[0].device))}", file=sys.stderr, flush=True
    )
    return guard_for(str(site)).answer


class _Service:
    """One agent: its socket, its only job."""

    def __init__(self, run: Path, state: Path) -> None:
        self._run, self._state = run, state
        self._slot = threading.Lock()  # held while there is a job, until it has really ended
        self._cancelled = threading.Event()  # of the present job
        self._stop = threading.Event()
        self._signal = 0

    @property
    def socket(self) -> Path:
        return self._run / "agent.sock"

    @contextmanager
    def opened(self, isolation: Isolation) -> Iterator[None]:
        """Make the folder ready, write who serves it, and stay the only agent of the site until the end."""
        site = self._run.parent
        if not site.is_dir():
            raise ConfigError(
                f"{site}: no such folder", code="no-such-site", hint="fedqc site init makes one"
            )
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH_BYTES:
            hint = (
                "the path of a unix socket is limited: choose a site folder with a shorter path, or use a "
                "symbolic link to it"
            )
            raise ConfigError(
                f"{self.socket}: longer than {MAX_SOCKET_PATH_BYTES} bytes", code="socket-path", hint=hint
            )
        try:
            for folder, mode in ((self._run, 0o750), (self._state, 0o700)):
                folder.mkdir(mode=mode, exist_ok=True)
            if self._run.stat().st_uid == os.geteuid():
                self._run.chmod(0o750)
            held = ExitStack()
            held.enter_context(locked(self._state / "agent.lock", busy=lambda: _running(site)))
        except OSError as error:
            raise ConfigError(f"{site}: cannot be written ({error.strerror})", code="not-writable") from None
        with held:
            for stale in (self.socket, self._run / "busy"):
                stale.unlink(missing_ok=True)
            sweep(self._state, self._state / "outbox", self._state / "models")
            started = datetime.now().astimezone().isoformat(timespec="seconds")
            who = {"pid": os.getpid(), "started": started}
            note = who | {"isolation": isolation.how, "holds": isolation.holds}
            write_bytes(self._run / "agent.json", (json.dumps(note) + "\n").encode(), mode=0o640)
            yield

    def serve(self, work: Answer) -> int:
        import grpc
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc

        pool, self._worker = (_started(count, name) for count, name in ((_CALLERS, "caller"), (1, "job")))
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_BYTES),
            ("grpc.max_send_message_length", MAX_BYTES),
        ]
        server = grpc.server(pool, options=options)
        handlers = {
            method: grpc.unary_stream_rpc_method_handler(self._handler(method, work)) for method in METHODS
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        healthy = health.HealthServicer(experimental_non_blocking=True)
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        before = os.umask(0o117)
        try:
            server.add_insecure_port(f"unix:{self.socket}")
            self.socket.chmod(0o660)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{self.socket}: cannot be opened ({error})", code="not-writable") from None
        finally:
            os.umask(before)
        earlier = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            server.start()
            healthy.set("", health_pb2.HealthCheckResponse.SERVING)
            print(f"agent: answers on {self.socket}", file=sys.stderr, flush=True)
            while not self._stop.wait(1.0):
                # a signal that another thread took (after SIGSTOP) is heard by Python only when this one
                # wakes
                pass
            print("agent: stops", file=sys.stderr, flush=True)
            healthy.enter_graceful_shutdown()
            self._cancelled.set()
            ended = server.stop(GRACE_S)
            if not self._slot.acquire(timeout=GRACE_S):
                self._log("the current job did not end in time; killed")
                self._leave()
                os._exit(128 + self._signal)
            ended.wait()
        finally:
            self._leave()
            for number, handler in earlier.items():
                signal.signal(number, handler)
        return 128 + self._signal

    def _leave(self) -> None:
        for file in (self.socket, self._run / "busy", self._run / "agent.json"):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._stop.set()

    def _handler(self, method: str, work: Answer) -> Callable[[bytes, grpc.ServicerContext], Iterator[bytes]]:
        def handle(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            import grpc

            if self._stop.is_set() or (self._run / "stop-after-round").exists():
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, STOPPING)
            plan_json, envelope = _parsed(request, context)
            if not self._slot.acquire(timeout=DESCRIBE_WAIT_S if method == "Describe" else 0):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, BUSY)
            cancelled = self._cancelled = threading.Event()
            frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

            def nobody_waits() -> None:  # also called at the good end of a call, when it makes no difference
                cancelled.set()
                frames.put(None)

            def do(progress: Progress) -> bytes:
                return work(method, plan_json, envelope, progress=progress, cancelled=cancelled)

            self._worker.submit(self._job, method, do, frames.put)
            if not context.add_callback(nobody_waits):
                nobody_waits()
            while (frame := frames.get()) is not None:
                if frame == b"":
                    context.abort(grpc.StatusCode.INTERNAL, FAILED)
                if frame == _AWAY:
                    context.abort(grpc.StatusCode.UNAVAILABLE, FAILED)
                yield frame
                if frame[:1] == b"A":
                    return

        return handle

    def _job(self, method: str, do: Callable[[Progress], bytes], put: Callable[[bytes], None]) -> None:
        """Runs in a thread of its own and outlives a caller who has gone: only its end makes room for the
        next.
        """

        def progress(stage: str, done: int, total: int) -> None:
            put(b"P" + json.dumps([stage, done, total]).encode())

        last = b""
        try:
            with suppress(OSError):
                (self._run / "busy").touch(mode=0o640)
            last = b"A" + do(progress)
        except NoAnswer:
            last = _AWAY
        except BaseException:
            with suppress(Exception):  # without memory there is no log either
                self._log(f"{method} failed\n{traceback.format_exc()}")
        finally:
            with suppress(Exception):
                (self._run / "busy").unlink(missing_ok=True)
            self._slot.release()
            put(last)

    def _log(self, text: str) -> None:
        append_site_log(self._state, f"agent: {text}")


def _running(site: Path) -> ConfigError:
    return ConfigError(f"{site}: an agent is running already", code="agent-running", hint="fedqc site stop")


def _started(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are all there: one that cannot be started later, for lack of memory, would leave a
    call without an end.
    """
    pool, met = ThreadPoolExecutor(threads, thread_name_prefix=name), threading.Barrier(threads)
    for started in [pool.submit(met.wait) for _ in range(threads)]:
        started.result()
    return pool


def _parsed(request: bytes, context: Any) -> tuple[str, bytes]:
    """The plan and the envelope of a request."""
    import grpc

    try:
        (length,) = struct.unpack_from("<I", request)
        if length > len(request) - 4:
            raise ValueError
        return request[4 : 4 + length].decode("utf-8"), request[4 + length :]
    except (struct.error, ValueError):
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, FAILED)
        raise  # abort does not return


if __name__ == "__main__":
    sys.exit(main(run_agent))
