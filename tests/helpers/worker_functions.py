"""What a decoder may do to the process it runs in. Run by the children of test_workers.py, which import this
by name.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ImagingError

Answer = tuple[Any, list[np.ndarray]]


def act(item: dict[str, Any]) -> Answer:
    """Do what the item's one word says."""
    ((word, value),) = item.items()
    return _DEEDS[word](value)


def give(value: Any) -> Answer:
    return value, []


def sleep(seconds: float) -> Answer:
    time.sleep(seconds)
    return seconds, []


def hang(path: str) -> Answer:
    if path:
        Path(path).touch()
    while True:
        signal.pause()


def spin(seconds: float) -> Answer:
    """Work for so long a processor's time, however long that takes."""
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass
    return "done", []


def stuck(_: None) -> Answer:
    """In foreign code that holds Python's lock: no thread and no Python signal handler of this process will
    run.
    """
    pause = ctypes.PyDLL(None).pause
    while True:
        pause()


def segfault(_: None) -> Answer:
    ctypes.string_at(0)
    return None, []


def segfault_once(path: str) -> Answer:
    if not Path(path).exists():
        Path(path).touch()
        ctypes.string_at(0)
    return "second", []


def hoard(count: int) -> Answer:
    return None, [np.zeros(count, np.uint8)]


def leave(status: int) -> Answer:
    sys.exit(status)


def vanish(status: int) -> Answer:
    os._exit(status)


def refuse(code: str) -> Answer:
    raise ImagingError("PATIENT^NAME", code=code)


def fail(_: None) -> Answer:
    raise ValueError("PATIENT^NAME")


def chatter(text: str) -> Answer:
    """Print, from Python and from C, to every place that a library prints to."""
    print(text)
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    for descriptor in (0, 1, 2):
        os.write(descriptor, text.encode())
    ctypes.CDLL(None).puts(text.encode())
    return text, []


def arrays(_: None) -> Answer:
    rng = np.random.default_rng(3)
    return None, [
        rng.integers(-3000, 3000, (3, 5)).astype(">i2"),
        rng.random((4, 6), np.float32).T,
        np.empty((0, 7), np.uint8),
        np.array(2.5),
        np.arange(24, dtype=np.uint16).reshape(2, 3, 4)[:, ::2],
    ]


def big(side: int) -> Answer:
    return "x" * side, [np.full((side, side), 7, np.int16)]


def strange(_: None) -> Answer:
    return None, [np.array([object()])]


def surroundings(_: None) -> Answer:
    return {
        "environment": sorted(os.environ),
        "modules": sorted(sys.modules),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "files": sorted(int(name) for name in os.listdir("/proc/self/fd")) if sys.platform == "linux" else [],
        "main": sys.modules["__main__"].__dict__.get("__file__"),
        "pid": os.getpid(),
    }, []


def reader(names: list[str]) -> Answer:
    """Which of these modules reading DICOM loads."""
    importlib.import_module("client.dicom.reading")
    return [name for name in names if sys.modules.get(name)], []


def write(path: str) -> Answer:
    Path(path).write_bytes(b"pixels")
    return None, []


def start(_: None) -> Answer:
    """Start a program that does not end by itself."""
    return subprocess.Popen(["sleep", "1000"]).pid, []


def lie(frame: list[int]) -> Answer:
    """Write bytes of our own where the answers go: a decoder that does as a hostile file tells it."""
    for descriptor in range(3, 16):
        try:
            os.write(descriptor, bytes(frame))
        except OSError:
            continue
    return "honest", []


_DEEDS = {
    function.__name__: function
    for function in (
        give,
        sleep,
        hang,
        spin,
        stuck,
        segfault,
        segfault_once,
        hoard,
        leave,
        vanish,
        refuse,
        fail,
        chatter,
        arrays,
        big,
        strange,
        surroundings,
        reader,
        write,
        start,
        lie,
    )
}
