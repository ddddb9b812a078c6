"""Faults and attacks on an enrolled hospital without a running federation: its agent and its programs as real
processes.

The agent is asked over its unix socket by somebody who holds the coordinator's key (a hostile coordinator),
or does not. Each refusal has its control: the honest question beside it is answered, and what was not to be
read is seen to be read then.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ipc.client import agent_health
from client.site.budget import budgets
from client.supervision.preflight import check, check_clock, contact
from common.artifacts import DEFAULT_LABELS
from common.enrolment import Request, write_request
from common.errors import NetworkError
from common.model_file import load_model
from common.models import build
from common.plan import Model
from common.signing import Statement, load_key, public_text
from common.weights import digest, encode_floats, encode_steps, manifest_of, resolve_initial
from common.wire import (
    DescribeTask,
    Envelope,
    EvaluateTask,
    Refusal,
    SiteReadiness,
    SiteUpdate,
    TrainTask,
    WireMessage,
)
from tests.helpers.consortium import settle
from tests.helpers.hospital import (
    OTHER,
    PAGE,
    PLAN,
    SITE,
    Authority,
    Hospital,
    Server,
    at_the_address_of,
    code_of,
    fill,
    memory_of,
    small_disk,
    wrong_servers,
)
from tests.helpers.rig import LIMIT_S, NGINX, Deployment, born, wait_until

POLICY = {
    "max_epsilon": 40.0,
    "max_epsilon_per_run": 8.0,
    "max_delta": 1e-5,
    "max_clip_norm": 1.0,
    "max_rounds": 100,
    "allow_non_private": False,
    "evaluation": "none",
    "require_approval": False,  # so that what is refused is refused for what it is
}
MANIFEST = manifest_of(build("small_cnn").state_dict())
BASE = load_model(resolve_initial(Model().initial, None), MANIFEST, DEFAULT_LABELS)
HEAD = MANIFEST.part("head.")


# ---- the rig: one enrolled site, its agent, and whoever asks it


def train(run: str, *, base: np.ndarray = BASE, **changes: Any) -> TrainTask:
    values: dict[str, Any] = {
        "run": run,
        "arm": "federated_dp",
        "round": 1,
        "private": True,
        "base_sha256": digest(base),
        "base": base,
    }
    return TrainTask(**(values | changes))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two enrolled hospitals; nothing runs. The first has its state on a small disk of its own where the
    system permits that.
    """
    made = Deployment(tmp_path_factory.mktemp("faults"), sites=2, running=False)
    made.make_data()
    with small_disk(made.site(SITE) / "state") as made.has_small_disk, made:  # type: ignore[attr-defined]
        made.init()
        made.enrol(SITE)
        settle(made.site(SITE), POLICY)
        yield made
    assert made.left_behind == []


@pytest.fixture(scope="module")
def hospital(deployment: Deployment) -> Hospital:
    found = Hospital(deployment)
    found.start_agent()
    return found


class Opened:
    """Which files under some folders anybody opens from now on (inotify)."""

    IN_ACCESS, IN_OPEN, IN_NONBLOCK = 0x1, 0x20, 0o4000

    def __init__(self, *paths: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(self.IN_NONBLOCK)
        assert self._descriptor >= 0
        self._paths: dict[int, Path] = {}
        for path in paths:
            for each in (
                [path, *(child for child in path.rglob("*") if child.is_dir())] if path.is_dir() else [path]
            ):
                watch = self._libc.inotify_add_watch(
                    self._descriptor, os.fsencode(each), self.IN_ACCESS | self.IN_OPEN
                )
                assert watch >= 0, each
                self._paths[watch] = each

    def now(self) -> set[str]:
        """What was opened since the last time this was asked."""
        found = set()
        with suppress(BlockingIOError):
            while content := os.read(self._descriptor, 1 << 16):
                while content:
                    watch, _, _, length = struct.unpack_from("iIII", content)
                    name = content[16 : 16 + length].rstrip(b"\0").decode()
                    found.add(str(self._paths[watch] / name) if name else str(self._paths[watch]))
                    content = content[16 + length :]
        return found

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def opened(hospital: Hospital) -> Iterator[Opened]:
    (hospital.state / "cache").mkdir(exist_ok=True)
    watched = Opened(hospital.folder / "images", hospital.folder / "labels.csv", hospital.state / "cache")
    yield watched
    watched.close()


# ---- F16: a hostile coordinator


def edited(path: str, literal: str) -> str:
    """The honest plan as JSON with this literal at `path`, also what no Python value stands for; numbers as
    the canonical form has them.
    """
    with suppress(ValueError):
        literal = json.dumps(float(literal)) if "e" in literal and not literal.startswith("[") else literal
    values = PLAN.model_dump(mode="json")
    *outer, last = path.split(".")
    at = values
    for step in outer:
        at = at[step]
    at[last] = "@@"
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).replace(
        '"@@"', literal
    )


HONEST = PLAN.canonical_json()
DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: dict[str, str] = {
    **{
        f"{path} = {literal if len(literal) < 40 else literal[:10] + '...'}": edited(path, literal)
        for path, literals in {
            "privacy.epsilon": (
                "NaN",
                "Infinity",
                "-Infinity",
                "1e308",
                "1e999",
                "0",
                "-1",
                '"8"',
                '"0"',
                "null",
                "true",
                "[8]",
                '{"a":8}',
            ),
            "privacy.delta": ("NaN", "0", "1", "-1e-5", '"1e-5"', "1e-4", "[1e-5]"),
            "privacy.clip_norm": ("NaN", "Infinity", "0", "-1", "1e308", "1.5", '"1"'),
            "privacy.sample_rate": ("0", "2", "NaN", "-0.5", "5e-324", "1e-300", '"0"'),
            "privacy.noise_multiplier": ("0", "-1", "NaN", "1e308", "1e-9", "0.01", '"0"', "false"),
            "privacy.learning_rate": ("NaN", "1e308", "-1"),
            "privacy.max_slices_per_patient": ("0", "1e9", "4.5", "true", '"0"'),
            "training.rounds": ("0", "-1", "101", "1e308", '"3"', "3.5"),
            "training.local_epochs": ("0", "1e308"),
            "training.batch_size": ("0", "4294967297"),
            "image_size": ("31", "100000", '"128"'),
            "split.train": ("NaN", "1e308"),
            "arms": ("[]", '["federated_dp","federated_dp"]', '["evil"]', '"federated_dp"', DEEP),
            "model.name": ("\"__import__('os')\"", '"../../x"'),
            "model.initial": ('"package:../../../../../../etc/passwd"', '"package:none.safetensors"'),
            "federation.codec": ('"pickle"',),
            "name": ('"../../../etc"', '"\\ud800"', '"a\\u0000b"', "1e999"),
        }.items()
        for literal in literals
    },
    "unknown key": HONEST[:-1] + ',"noise":0}',
    "unknown nested key": edited("privacy", '{"epsilon":1.0,"skip_noise":true}'),
    "duplicate key, stricter one first": HONEST[:-1] + ',"privacy":{"epsilon":8.0,"delta":1e-5}}',
    "duplicate nested key": HONEST.replace('"epsilon":1.0', '"epsilon":1.0,"epsilon":8.0'),
    "keys in another order": json.dumps(dict(reversed(json.loads(HONEST).items())), separators=(",", ":")),
    "spaces": json.dumps(json.loads(HONEST), sort_keys=True),
    "a byte order mark": "\ufeff" + HONEST,
    "two plans": HONEST + HONEST,
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "an empty mapping": "{}",
    "nested 100 000 deep": DEEP,
    "YAML": yaml.safe_dump(json.loads(HONEST)),
    "pickle": "cos\nsystem\n(S'touch /tmp/pwned'\ntR.",
    "six megabytes": HONEST[:-1] + ',"question":"' + "x" * (6 << 20) + '"}',
}


def test_f16_hostile_plans_are_refused_before_data_is_read(hospital: Hospital, opened: Opened) -> None:
    """Each is signed by the coordinator's own key, and asked for private training, a rehearsal and an
    evaluation.
    """
    before, logged = hospital.rows(), hospital.log()
    opened.now()
    codes: dict[str, str] = {}
    for name, plan in HOSTILE.items():
        codes[name] = code_of(hospital.ask(train(f"hostile-{len(codes)}"), plan))
        for task in (
            EvaluateTask(run="x", models=("m",), everyone=False, weights=BASE[None]),
            train("x", arm="federated", private=False),
        ):
            assert code_of(hospital.ask(task, plan)) not in ("SiteEvaluation", "SiteUpdate"), name
    print(
        f"\nF16: {len(codes)} hostile plans:",
        *(f"{code:24s} {name}" for name, code in sorted(codes.items(), key=lambda e: e[1])),
        sep="\n  ",
    )
    assert len(codes) >= 60
    assert not {"SiteUpdate", "site-failure"} & set(codes.values()), codes
    assert opened.now() == set()
    assert hospital.rows() == before
    assert "Traceback" not in hospital.log()[len(logged) :]
    for name in ("duplicate key, stricter one first", "privacy.noise_multiplier = 0.01"):
        said = hospital.ask(DescribeTask(rehearse=True), HOSTILE[name])
        assert isinstance(said, Refusal) or (
            isinstance(said, SiteReadiness) and said.arms["federated_dp"] != "accept"
        ), said
    # the control: the honest plan, asked in the same way, reads data and is charged
    other = PLAN.model_copy(update={"question": "the honest plan, in words new to this agent"})
    assert code_of(hospital.ask(train("honest"), other.canonical_json())) == "SiteUpdate"
    assert opened.now()
    assert len(hospital.rows()) == len(before) + 1


def _with(part: slice, value: float) -> np.ndarray:
    changed = BASE.copy()
    changed[part] = value
    return changed


def _imprint() -> np.ndarray:
    """One filter many times with different thresholds: rows that pick single images."""
    changed = BASE.copy()
    shape = MANIFEST.shapes[0]
    rows = changed[: int(np.prod(shape))].reshape(shape[0], -1)
    rows[:] = rows[0] * np.linspace(0.5, 1.5, len(rows))[:, None]
    return changed


def _header(shape: Sequence[int], kind: str = "F32") -> bytes:
    """A task whose array claims a size that it does not have."""
    text = json.dumps(
        {
            "__metadata__": {"json": json.loads(json.dumps(safetensors_text(train("huge"))))},
            "base": {"dtype": kind, "shape": list(shape), "data_offsets": [0, 4]},
        }
    ).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


def safetensors_text(task: WireMessage) -> str:
    data = task.to_bytes()
    text: str = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["json"]
    return text


NAN, INF = float("nan"), float("inf")
CRAFTED: dict[str, Callable[[], TrainTask]] = {
    "not a number": lambda: train("crafted", base=_with(slice(5, 6), NAN)),
    "infinite": lambda: train("crafted", base=_with(HEAD, INF)),
    "huge bias": lambda: train("crafted", base=_with(slice(HEAD.stop - 1, HEAD.stop), 1e30)),
    "trap weights in the backbone": lambda: train("crafted", base=_with(slice(0, 200), 40.0)),
    "backbone moved by a hair": lambda: train(
        "crafted", base=np.concatenate([BASE[: HEAD.start] + np.float32(1e-6), BASE[HEAD]])
    ),
    "imprint block": lambda: train("crafted", base=_imprint()),
    "all zero": lambda: train("crafted", base=np.zeros_like(BASE)),
    "one value short": lambda: train("crafted", base=BASE[:-1]),
    "one value": lambda: train("crafted", base=BASE[:1]),
    "another model than was signed": lambda: train("crafted", base_sha256="0" * 64),
    "two dimensions": lambda: train("crafted", base=BASE[None]),
    "frame of a NaN": lambda: train("crafted", base=encode_floats(_with(slice(5, 6), NAN)), base_sha256=""),
    "step from a model never sent": lambda: train(
        "crafted", base=encode_steps(np.zeros(HEAD.stop - HEAD.start, np.int64)), held_sha256="1" * 64
    ),
    "half a frame": lambda: train("crafted", base=encode_floats(BASE)[:100]),
    "noise of bytes": lambda: train("crafted", base=np.frombuffer(bytes(range(256)) * 4, np.uint8)),
    "another arm than the plan's": lambda: train("crafted", arm="local", private=False),
    "the private arm without noise": lambda: train("crafted", private=False),
    "a round beyond the plan": lambda: train("crafted", round=4),
}


def test_f16_crafted_models_are_refused_before_data_is_read(hospital: Hospital, opened: Opened) -> None:
    before = hospital.rows()
    opened.now()
    codes = {name: code_of(hospital.ask(make())) for name, make in CRAFTED.items()}
    for name, shape in (
        ("5e10 values", (50_000_000_000,)),
        ("negative", (-1,)),
        ("product overflows", (2**40, 2**40)),
    ):
        codes[f"header claims {name}"] = code_of(hospital.ask(train("crafted"), payload=_header(shape)))
    print(
        f"\nF16: {len(codes)} crafted models:",
        *(f"{code:24s} {name}" for name, code in codes.items()),
        sep="\n  ",
    )
    assert not {"SiteUpdate", "site-failure"} & set(codes.values()), codes
    assert opened.now() == set()
    assert hospital.rows() == before
    other = PLAN.model_copy(
        update={"question": "a plan whose images this agent has not read yet"}
    ).canonical_json()
    assert code_of(hospital.ask(train("not-crafted"), other)) == "SiteUpdate"
    assert opened.now()


def test_f16_forged_replayed_and_swapped_questions(hospital: Hospital, opened: Opened) -> None:
    honest = hospital.question(task := train("captured"), HONEST)
    update = hospital.send("Train", HONEST, honest)
    assert isinstance(update, SiteUpdate)
    before, sent = hospital.rows(), Envelope.from_bytes(honest)
    opened.now()
    stranger = Ed25519PrivateKey.generate()
    other = PLAN.model_copy(update={"name": "swapped"}).canonical_json()

    def again(**changes: Any) -> bytes:
        return Envelope(
            **({"payload": sent.payload, "statement": sent.statement, "signature": sent.signature} | changes)
        ).to_bytes()

    edited_statement = json.dumps(
        json.loads(sent.statement) | {"nonce": secrets.token_hex(16)}, separators=(",", ":")
    )
    tries: dict[str, tuple[str, str, bytes]] = {
        "replayed": ("Train", HONEST, honest),
        "replayed as another method": ("Evaluate", HONEST, honest),
        "replayed with another plan": ("Train", other, honest),
        "replayed with another payload": (
            "Train",
            HONEST,
            again(payload=train("captured", round=2).to_bytes()),
        ),
        "replayed with a fresh nonce in the statement": ("Train", HONEST, again(statement=edited_statement)),
        "without signature": ("Train", HONEST, again(signature=b"")),
        "signature of zeros": ("Train", HONEST, again(signature=bytes(64))),
        "signed by somebody else": ("Train", HONEST, hospital.question(task, HONEST, key=stranger)),
        "signed by the site itself": (
            "Train",
            HONEST,
            hospital.question(task, HONEST, key=load_key(hospital.state / "signing.key")),
        ),
        "another plan than was signed": ("Train", other, hospital.question(train("fresh"), HONEST)),
        "signed for another site": ("Train", HONEST, _for_site(hospital, "hospital-b", train("fresh"))),
        "signed for everybody": ("Train", HONEST, _for_site(hospital, "", train("fresh"))),
        "statement of another round": ("Train", HONEST, _stated(hospital, train("fresh"), round=2)),
        "statement of another model": (
            "Train",
            HONEST,
            _stated(hospital, train("fresh"), base_sha256="0" * 64),
        ),
        "an empty nonce": ("Train", HONEST, _stated(hospital, train("fresh"), nonce="")),
        "a nonce of two lines": ("Train", HONEST, _stated(hospital, train("fresh"), nonce="ab\ncd")),
    }
    codes = {name: code_of(hospital.send(*words)) for name, words in tries.items()}
    for name, junk in (
        ("no envelope", b""),
        ("cut short", honest[:40]),
        ("zeros", bytes(200)),
        ("lengths that overflow", b"\xff" * 64),
    ):
        codes[name] = code_of(hospital.send("Train", HONEST, junk))
    print(
        f"\nF16: {len(codes)} forged questions:",
        *(f"{code:24s} {name}" for name, code in codes.items()),
        sep="\n  ",
    )
    assert set(codes.values()) <= {
        "replayed-task",
        "bad-signature",
        "unsigned-task",
        "wrong-plan",
        "wrong-site",
        "bad-message",
    }, codes
    assert codes["replayed"] == "replayed-task"
    assert opened.now() == set()
    assert hospital.rows() == before
    # the control: the coordinator asks anew, and gets the first answer's bytes
    again_asked = hospital.ask(task)
    assert isinstance(again_asked, SiteUpdate)
    assert again_asked.to_bytes() == update.to_bytes()


def _stated(hospital: Hospital, task: TrainTask, **changes: Any) -> bytes:
    """A task signed by the coordinator over a statement that is not quite its own."""
    statement = Statement.parse(Envelope.from_bytes(hospital.question(task, HONEST)).statement).model_copy(
        update=changes
    )
    text = statement.text()
    return Envelope(
        payload=task.to_bytes(),
        statement=text,
        signature=hospital.coordinator.sign(b"fedqc wire statement v1\0" + text.encode()),
    ).to_bytes()


def _for_site(hospital: Hospital, name: str, task: TrainTask) -> bytes:
    return _stated(hospital, task, site=name)


# ---- F6: the disk is full


PAGES = (0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 16, 32)


def test_f6_nothing_leaves_that_is_not_in_the_ledger(deployment: Deployment, hospital: Hospital) -> None:
    """With less and less room: either the whole work is done and on the disk, or nothing leaves but a code;
    later all is well again.
    """
    if not deployment.has_small_disk:  # type: ignore[attr-defined]
        pytest.skip("this system permits no mounts")
    cheap = PLAN.model_copy(
        update={"name": "full", "privacy": PLAN.privacy.model_copy(update={"epsilon": 0.5})}
    )
    plan = cheap.canonical_json()
    assert code_of(hospital.ask(train("room"), plan)) == "SiteUpdate"  # the control
    told: list[str] = []
    for pages in PAGES:
        run = f"full-{pages}"
        fill(hospital.state, leave_pages=pages)
        answer = hospital.ask(train(run), plan)
        stored = sum(run in entry["request"].split() for entry in _rows_of_a_copy(hospital))
        (hospital.state / "ballast").unlink()
        told.append(f"{pages * PAGE // 1024:4d} KiB left: {code_of(answer)}, in the ledger: {stored}")
        if isinstance(answer, SiteUpdate):
            assert stored == 1, "an update left without its ledger entry"
        else:
            assert code_of(answer) == "disk-full", answer
        again = hospital.ask(train(run), plan)
        assert isinstance(again, SiteUpdate), (pages, again)
        if isinstance(answer, SiteUpdate):
            assert again.to_bytes() == answer.to_bytes()
        assert sum(run in entry["request"].split() for entry in hospital.rows()) == 1, (
            "charged once, whatever happened in between"
        )
    print("\nF6:", *told, sep="\n  ")
    assert "disk-full" in told[0]
    assert "disk-full: free some space; nothing was sent" in hospital.log()
    assert born(hospital.pid)


def _rows_of_a_copy(hospital: Hospital) -> list[dict[str, Any]]:
    """What is in the ledger's files at this moment, read where there is room."""
    copy = hospital.deployment.folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in ("site.yaml", "policy.yaml", "cohort.yaml"):
        shutil.copy(hospital.folder / name, copy)
    shutil.copytree(
        hospital.state, copy / "state", ignore=shutil.ignore_patterns("ballast", "cache", "outbox")
    )
    (account,) = budgets(copy)
    entries: list[dict[str, Any]] = account["entries"]
    return entries


# ---- F15: no memory


def test_f15_an_agent_without_memory_answers_with_a_code_and_goes_on(hospital: Hospital) -> None:
    big = PLAN.model_copy(update={"name": "big", "image_size": 512})
    plan, before = big.canonical_json(), len(hospital.rows())
    told = []
    try:
        for mebibytes in (32, 16, 4, 1, 0):
            limit = memory_of(hospital.pid) + (mebibytes << 20)
            resource.prlimit(hospital.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            try:
                code = code_of(hospital.ask(train("big"), plan))
            except NetworkError as failure:
                code = failure.code
            told.append(f"{mebibytes:4d} MiB more than it had: {code}")
            assert code in ("site-failure", "agent-failed", "agent-busy"), told
            resource.prlimit(
                hospital.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            assert born(hospital.pid)
            wait_until(lambda: agent_health(hospital.socket), LIMIT_S, "healthy again")
    finally:
        resource.prlimit(hospital.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(
        "\nF15:",
        *told,
        *[line for line in hospital.log().splitlines() if "out-of-memory" in line][-1:],
        sep="\n  ",
    )
    assert "site-failure" in told[0]
    assert "out-of-memory: a batch size below 16, or a larger machine" in hospital.log()
    charged = len(hospital.rows()) - before
    assert code_of(hospital.ask(train("big"), plan)) == "SiteUpdate", (
        "the control: the same question with memory"
    )
    assert len(hospital.rows()) - before == 1
    assert charged == 1, "what was reserved before the memory ran out counts"


# ---- F9: one key, two sites


def test_f9_a_key_of_another_site_is_refused_at_approval(deployment: Deployment) -> None:
    """Somebody who has read hospital-a's public keys, or its whole folder, asks to be enrolled as
    hospital-b.
    """
    theirs = json.loads((deployment.fed / "sites" / f"{SITE}.json").read_text())["request"]
    own, node = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
    node_key = (
        node.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )
    of_a = load_key(deployment.site(SITE) / "state" / "signing.key")
    values = {"site": OTHER, "kind": "synthetic", "nominal_patients": 50, "version": theirs["version"]}
    tries = {
        "its node key": (values | {"node_key": theirs["node_key"], "signing_key": public_text(own)}, own),
        "its signing key": (values | {"node_key": node_key, "signing_key": theirs["signing_key"]}, of_a),
        "both": (values | {"node_key": theirs["node_key"], "signing_key": theirs["signing_key"]}, of_a),
        "new keys under its name": (
            values | {"site": SITE, "node_key": node_key, "signing_key": public_text(own)},
            own,
        ),
        "its own": (values | {"node_key": node_key, "signing_key": public_text(own)}, own),
    }
    before = sorted((deployment.fed / "sites").glob("*"))
    for number, (what, (request, key)) in enumerate(tries.items()):
        path, kit = deployment.folder / f"request-{number}.zip", deployment.folder / f"kit-{number}.zip"
        write_request(path, Request(**request), key)
        said = deployment.call(
            "federation", "approve", path, "--yes", "--out", kit, "--federation", deployment.fed
        )
        print(f"F9 {what}: status {said.returncode} {one_error(said.stderr)}")
        if what == "its own":  # the control
            assert (said.returncode, kit.exists()) == (0, True), said.stderr
            continue
        code = "site-exists" if "under its name" in what else "duplicate-key"
        assert (said.returncode, kit.exists()) == (2, False)
        assert f"error [{code}]" in said.stderr
        assert sorted((deployment.fed / "sites").glob("*")) == before


def one_error(text: str) -> str:
    """The error of a command that failed: one line, and no traceback."""
    assert "Traceback" not in text
    found = [line for line in text.splitlines() if line.startswith("fedqc: error")]
    assert len(found) <= 1
    return found[0] if found else ""


# ---- F11: TLS


def test_f11_a_wrong_server_ends_the_start_at_once_and_is_said(deployment: Deployment) -> None:
    site = deployment.site(SITE)
    for what, (code, server) in wrong_servers(deployment).items():
        with at_the_address_of(site, server):
            said = deployment.call("site", "start", "--site", site)
        print(f"F11 {what}: status {said.returncode}, {server.knocks} connection: {one_error(said.stderr)}")
        assert said.returncode == 3
        assert f"error [{code}]" in one_error(said.stderr) or (
            what == "another authority" and "[bad-certificate]" in said.stderr
        )
        assert server.knocks == 1
    good = Server(Authority(deployment).certificate())  # the control
    with at_the_address_of(site, good):
        assert contact(f"127.0.0.1:{good.port}", site / "node" / "ca.crt").status == 404


# ---- F13: the clock


@pytest.mark.parametrize(
    ("ahead_s", "is_ok"), [(0, True), (3, True), (8, False), (3600, False), (-290, True), (-600, False)]
)
def test_f13_site_check_says_how_far_the_clock_is_off_and_how_far_it_may_be(
    ahead_s: int, is_ok: bool, deployment: Deployment
) -> None:
    site = deployment.site(SITE)
    server = Server(Authority(deployment).certificate(), clock_s=-ahead_s)
    with at_the_address_of(site, server):
        (found,) = (each for each in check(site) if each.check == "clock")
    print(
        f"F13 {ahead_s:+d} s: {'ok' if found.ok else 'FAIL'} {found.problem or found.found}; fix: "
        f"{found.fix or '-'}"
    )
    assert found.ok is is_ok
    assert "Flower allows -305 to +5 s" in (found.problem or found.found)
    assert ("NTP" in found.fix) is not is_ok
    assert check_clock(None).ok is None


# ---- F29: what stands in the way of a start


@contextmanager
def taken(port: int) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", port)):
        yield


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize("key", ["port", "superlink_port", "health_port"])
def test_f29_a_port_in_use_is_said_before_anything_is_started(key: str, deployment: Deployment) -> None:
    values = yaml.safe_load((deployment.fed / "federation.yaml").read_text())
    with taken(values[key]):
        said = deployment.call("federation", "start", "--federation", deployment.fed)
    print(f"F29 {key}: {one_error(said.stderr)}")
    assert said.returncode == 2
    assert "error [port-in-use]" in said.stderr
    assert f"127.0.0.1:{values[key]}" in said.stderr
    assert not list((deployment.fed / "state").glob("*.pid"))


@pytest.mark.parametrize("name", ["flower-superexec", "flower-superlink", "flwr"])
def test_f29_a_program_that_is_missing_is_said_before_anything_is_started(
    name: str, deployment: Deployment, tmp_path: Path
) -> None:
    """An environment like this one, but for that program."""
    here = Path(sys.executable).parent
    elsewhere = tmp_path / "environment"
    (elsewhere / "bin").mkdir(parents=True)
    for path in here.parent.iterdir():
        if path.name not in ("bin", "pyvenv.cfg"):
            (elsewhere / path.name).symlink_to(path)
    shutil.copy(here.parent / "pyvenv.cfg", elsewhere)
    for path in here.iterdir():
        if path.name != name:
            target = path.resolve() if path.name.startswith("python") else path
            (elsewhere / "bin" / path.name).symlink_to(target)
    rest = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if not os.path.lexists(Path(part) / name)
    )
    words = ("-P", "-m", "common.cli", "federation", "start", "--no-proxy", "--federation", deployment.fed)
    said = deployment.call(*words, program=elsewhere / "bin" / "python", env={"PATH": rest})
    print(f"F29 without {name}: {one_error(said.stderr)}")
    assert said.returncode == 2, said.stderr
    assert f"error [no-program]: {name}" in said.stderr
    assert not list((deployment.fed / "state").glob("*.pid"))


@pytest.mark.parametrize("key", ["runtime_port", "health_port"])
def test_f29_a_node_says_which_port_is_taken(key: str, deployment: Deployment) -> None:
    site = deployment.site(SITE)
    port = yaml.safe_load((site / "node" / "node.yaml").read_text())[key]
    with taken(port):
        said = deployment.call("site", "start", "--only", "node", "--site", site)
    print(f"F29 {key}: {one_error(said.stderr)}")
    assert said.returncode == 2
    assert f"error [port-in-use]: 127.0.0.1:{port}" in said.stderr


def test_f29_a_second_node_in_one_folder_is_refused_and_flwr_home_is_never_shared(
    deployment: Deployment,
) -> None:
    """Flower's home is in node/, whatever FLWR_HOME says, and node/ belongs to one process."""
    site, shared = deployment.site(SITE), deployment.folder / "flwr-home"
    # answers 404 to everything, after which the first node would end some time: it is stopped before
    nobody = Server(Authority(deployment).certificate())
    with at_the_address_of(site, nobody):
        first = deployment.background(
            "first-node",
            ["site", "start", "--only", "node", "--site", site],
            prefix=["env", f"FLWR_HOME={shared}"],
        )
        lock = site / "node" / "node.lock"
        flower_home = site / "node" / "flwr"
        wait_until(
            lambda: lock.exists() and _is_held(lock) and flower_home.is_dir(),
            LIMIT_S,
            "the first node",
            deployment.tails,
        )
        os.killpg(first.pid, signal.SIGSTOP)
        assert _is_held(lock)
        said = deployment.call(
            "site", "start", "--only", "node", "--site", site, env={"FLWR_HOME": str(shared)}
        )
        print(f"F29 second node: {one_error(said.stderr)}")
        assert said.returncode == 2
        assert "error [node-running]" in said.stderr
        os.killpg(first.pid, signal.SIGCONT)
        first.terminate()
        first.wait(LIMIT_S)
    assert not shared.exists()


def _is_held(lock: Path) -> bool:
    return f":{lock.stat().st_ino} " in Path("/proc/locks").read_text()
