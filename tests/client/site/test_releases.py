"""One release a question, whatever is killed, lost or asked at the same time."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.site.answer_store import AnswerKey, Outbox
from client.site.ledger import Ledger
from client.site.ledger_rows import LedgerError
from client.site.releases import release, released
from common.errors import FedqcError, RefusedError
from common.privacy import GaussianSteps, gdp_epsilon, gdp_mu
from tests.helpers.release_loop import KEY, ROUNDS, STEPS, opened, question, reserve

DELTA = 1e-5


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with opened(tmp_path) as found:
        yield found


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


def asked(outbox: Outbox, ledger: Ledger, number: int = 1) -> bytes | None:
    key, request, part = question("run", number)
    return released(outbox, ledger, key, request=request, part=part, steps_done=1)


def answer(outbox: Outbox, ledger: Ledger, payload: bytes, number: int = 1) -> bytes:
    key, request, part = question("run", number)
    reservation = reserve(ledger, request)
    return release(outbox, ledger, key, payload, reservation=reservation, part=part, steps_done=1)


def test_asking_again_gives_the_same_bytes(outbox: Outbox, ledger: Ledger) -> None:
    assert asked(outbox, ledger) is None
    assert answer(outbox, ledger, b"first") == b"first"
    assert asked(outbox, ledger) == b"first"
    assert answer(outbox, ledger, b"second") == b"first"
    assert asked(outbox, ledger, 2) is None


def test_a_reservation_without_an_answer_may_still_be_answered(outbox: Outbox, ledger: Ledger) -> None:
    reserve(ledger, question("run", 1)[1])
    assert asked(outbox, ledger) is None


def test_what_was_stored_and_not_committed_is_committed_and_sent(outbox: Outbox, ledger: Ledger) -> None:
    key, request, part = question("run", 1)
    reserve(ledger, request)
    outbox.put(key, b"stored")
    assert ledger.committed(request, part) is None
    assert asked(outbox, ledger) == b"stored"
    committed = ledger.committed(request, part)
    assert committed is not None
    assert committed.digest == hashlib.sha256(b"stored").hexdigest()


def test_a_lost_answer_is_refused_and_never_computed_again(
    tmp_path: Path, outbox: Outbox, ledger: Ledger
) -> None:
    answer(outbox, ledger, b"first")
    shutil.rmtree(tmp_path / "outbox")
    for _ in range(2):
        with pytest.raises(RefusedError) as caught:
            asked(Outbox(tmp_path / "outbox"), ledger)
        assert caught.value.code == "answer-missing"
    assert asked(Outbox(tmp_path / "outbox"), ledger, 2) is None, "other rounds go on"


def test_another_answer_in_its_place_is_refused(outbox: Outbox, ledger: Ledger, tmp_path: Path) -> None:
    answer(outbox, ledger, b"first")
    shutil.rmtree(tmp_path / "outbox")
    other = Outbox(tmp_path / "outbox")
    other.put(question("run", 1)[0], b"second")
    with pytest.raises(RefusedError) as caught:
        asked(other, ledger)
    assert caught.value.code == "answer-missing"


def test_an_answer_without_a_charge_does_not_leave(outbox: Outbox, ledger: Ledger) -> None:
    key: AnswerKey = question("run", 1)[0]
    outbox.put(key, b"from where?")
    with pytest.raises(LedgerError) as caught:
        asked(outbox, ledger)
    assert caught.value.code == "unknown-reservation"


# ---- killed, cut off, together


def started(folder: Path, name: str, *options: str, preload: Path | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if preload is not None:
        environment |= {"LD_PRELOAD": str(preload), "SYNCED": str(folder / "synced")}
        (folder / "synced").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.helpers.release_loop", str(folder), name, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def killed(process: subprocess.Popen[str], after_s: float) -> dict[int, str]:
    """Kill a process at some point after its first answer; what it acknowledged: number -> digest."""
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    lines = [first, *process.stdout.readlines()]
    process.wait()
    complete = [line.split() for line in lines if line.endswith("\n")]
    return {int(number): digest for number, digest in complete}


def missing(folder: Path, acknowledged: dict[str, dict[int, str]]) -> list[str]:
    """What was acknowledged, and is not in the ledger and the store as it was; the reason where the ledger
    cannot be opened.
    """
    found = []
    try:
        with opened(folder) as ledger:
            outbox, rows = Outbox(folder / "outbox"), ledger.rows()
            commits = {(row.request, row.part): row.digest for row in rows if row.kind == "commit"}
            reserved = {row.request for row in rows if row.kind == "reserve"}
            for name, answers in acknowledged.items():
                for number, digest in answers.items():
                    key, request, part = question(name, number)
                    stored = outbox.get(key)
                    if (
                        request not in reserved
                        or commits.get((request, part)) != digest
                        or stored is None
                        or hashlib.sha256(stored).hexdigest() != digest
                    ):
                        found.append(f"{request} {part}")
            requests = {question(name, n)[1] for name, answers in acknowledged.items() for n in answers}
            truth = gdp_epsilon(gdp_mu([STEPS] * len(requests)), DELTA) if requests else 0.0
            if ledger.accounts(max_epsilon=1000.0, max_delta=DELTA)[0].spent < truth:
                found.append("the ledger says less than was spent")
    except FedqcError as error:
        found.append(error.code)
    return found


@pytest.mark.slow
def test_200_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A process in the middle of reserve, store and commit is killed 200 times; it then goes on with the same
    ledger and store, and finds its earlier answers."""
    rng = random.Random(5)
    acknowledged: dict[str, dict[int, str]] = {}
    for kill in range(200):
        name = f"run{kill // 10}"
        answers = killed(started(tmp_path, name), rng.uniform(0, 0.3))
        before = acknowledged.setdefault(name, {})
        assert all(before[number] == answers[number] for number in before.keys() & answers.keys())
        before |= answers
        assert missing(tmp_path, acknowledged) == []
    assert sum(len(answers) for answers in acknowledged.values()) > 100


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* What a disk holds after a power cut: of each file of the ledger what it was at its last fsync. */
static void keep(int fd) {
    char link[64], path[4096], out[8300], draft[8304], buffer[65536];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    const char *name = strrchr(path, '/') + 1;
    if (strncmp(name, "ledger.sqlite3", 14) != 0) return;
    snprintf(out, sizeof out, "%s/%s", getenv("SYNCED"), name);
    snprintf(draft, sizeof draft, "%s.new", out);
    int copy = open(draft, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    off_t at = 0;
    for (ssize_t got; (got = pread(fd, buffer, sizeof buffer, at)) > 0; at += got)
        if (write(copy, buffer, got) != got) abort();
    close(copy);
    if (rename(draft, out) != 0) abort(); /* the copy is whole, whenever the process is killed */
}
int fsync(int fd) { keep(fd); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int fdatasync(int fd) { keep(fd); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True
    )
    return folder / "shim.so"


def cut_off(folder: Path, shim: Path, *options: str) -> list[str]:
    """Kill a process, drop every write of the ledger that was not synced, and look for what is missing."""
    acknowledged = {"run": killed(started(folder, "run", *options, preload=shim), 0.02)}
    assert acknowledged["run"]
    for name in ("ledger.sqlite3", "ledger.sqlite3-wal", "ledger.sqlite3-shm"):
        (folder / name).unlink(missing_ok=True)
        if (folder / "synced" / name).exists():
            shutil.copy(folder / "synced" / name, folder / name)
    return missing(folder, acknowledged)


@pytest.mark.slow
def test_a_power_cut_loses_nothing_and_without_synchronous_writes_it_would(
    tmp_path: Path, shim: Path
) -> None:
    for cut in range(10):
        folder = tmp_path / str(cut)
        folder.mkdir()
        assert cut_off(folder, shim) == []
    control = tmp_path / "control"
    control.mkdir()
    assert cut_off(control, shim, "synchronous=OFF") != []


@pytest.mark.slow
def test_two_processes_of_50_rounds_are_as_one_after_the_other(tmp_path: Path) -> None:
    found = []
    for folder, together in ((tmp_path / "together", True), (tmp_path / "alone", False)):
        folder.mkdir()
        opened(folder).close()
        processes = []
        for name in ("one", "two"):
            processes.append(started(folder, name, f"rounds={ROUNDS}"))
            if not together:
                processes[-1].communicate(timeout=120)
        for process in processes:
            process.wait(timeout=120)
        assert [process.returncode for process in processes] == [0, 0]
        with opened(folder) as ledger:
            rows = ledger.rows()
            account = ledger.accounts(max_epsilon=1000.0, max_delta=DELTA)[0]
            found.append(
                (sorted((row.kind, row.request, row.part, row.steps) for row in rows), account.spent)
            )
    assert found[0] == found[1]
    assert len(found[0][0]) == 2 + 2 * (1 + 50)


def test_the_loop_uses_the_key_of_these_tests() -> None:
    assert len(KEY) >= 16
    assert GaussianSteps(noise_multiplier=100.0, sample_rate=1.0, steps=ROUNDS) == STEPS
