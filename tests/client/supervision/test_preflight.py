from __future__ import annotations

import base64
import ipaddress
import itertools
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.site.approvals import approve
from client.site.config import Declaration, read_site
from client.site.policy import read_policy
from client.site.site_ledger import init_ledger
from client.supervision import preflight
from client.supervision.preflight import (
    Check,
    bucket_note,
    check,
    check_bucket,
    check_clock,
    check_disk,
    check_encryption,
    check_enrolment,
    check_ethics,
    check_kind,
    check_ledger,
    check_modes,
    check_plan,
    contact,
    exit_status,
    scores_note,
    table,
)
from common.errors import ConfigError, NetworkError
from common.pricing import with_noise
from tests.helpers.consortium import HELD_OUT, settle, tiny_plan

LONG = timedelta(days=400)
FACTS = HeaderFacts(
    modality="CT",
    pixel_spacing_mm=1.0,
    patient_id="WANG^FANG",
    study_uid=make_uid(b"a"),
    series_uid=make_uid(b"b"),
    sop_uid=make_uid(b"c"),
    instance_number=1,
)


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test CA {folder.name}")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = _builder(self._name, self._name, self._key, LONG).add_extension(
            x509.BasicConstraints(True, None), True
        )
        certificate = builder.add_extension(usage, True).sign(self._key, hashes.SHA256())
        self.path = folder / "ca.crt"
        folder.mkdir(exist_ok=True)
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def server(self, *, lasts: timedelta = LONG, host: str = "127.0.0.1") -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        alternative = x509.SubjectAlternativeName(
            [x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)]
        )
        certificate = (
            _builder(name, self._name, key, lasts)
            .add_extension(alternative, False)
            .sign(self._key, hashes.SHA256())
        )
        path = self._folder / "server.pem"
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lasts: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=900))
        .not_valid_after(now + lasts)
    )


@contextmanager
def serving(answer: Any) -> Iterator[int]:
    """A loopback server that hands every connection to `answer(connection)`; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def loop() -> None:
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                with suppress(OSError):
                    answer(connection)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        done.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def http_answer(
    connection: socket.socket,
    *,
    status: str = "404 Not Found",
    ahead: timedelta = timedelta(0),
    dated: bool = True,
) -> None:
    connection.recv(65536)
    date_line = f"Date: {format_datetime(datetime.now(UTC) + ahead, usegmt=True)}\r\n" if dated else ""
    connection.sendall(
        f"HTTP/1.1 {status}\r\n{date_line}Content-Length: 0\r\nConnection: close\r\n\r\n".encode()
    )


def tls_answer(context: ssl.SSLContext, **how: Any) -> Any:
    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            http_answer(secure, **how)  # type: ignore[arg-type]

    return answer


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def refused(address: str, ca: Path, **how: Any) -> NetworkError:
    with pytest.raises(NetworkError) as caught:
        contact(address, ca, **how)
    assert caught.value.hint
    return caught.value


def test_a_good_coordinator_is_met(authority: Authority) -> None:
    with serving(tls_answer(authority.server())) as port:
        met = contact(f"127.0.0.1:{port}", authority.path)
    assert (met.via, met.status) == ("", 404)
    assert 398 < met.certificate_days < 401
    assert met.skew_s is not None
    assert check_clock(met.skew_s).ok


@pytest.mark.parametrize(
    "case", ["expired", "wrong CA", "wrong host", "wrong address", "plaintext", "not HTTP at all", "hangs up"]
)
def test_each_kind_of_wrong_server_is_told_apart(case: str, authority: Authority, tmp_path: Path) -> None:
    def garbage(connection: socket.socket) -> None:
        connection.sendall(b"220 mail.example ESMTP\r\n")
        connection.recv(65536)

    answers = {
        "expired": (tls_answer(authority.server(lasts=timedelta(days=-1))), "certificate-expired"),
        "wrong CA": (tls_answer(Authority(tmp_path / "other").server()), "wrong-authority"),
        "wrong host": (tls_answer(authority.server(host="elsewhere.example")), "wrong-host"),
        "wrong address": (tls_answer(authority.server(host="127.0.0.2")), "wrong-host"),
        "plaintext": (http_answer, "no-tls"),
        "not HTTP at all": (garbage, "no-tls"),
        "hangs up": (lambda connection: connection.recv(65536), "tls-failed"),
    }
    answer, code = answers[case]
    with serving(answer) as port:
        assert refused(f"127.0.0.1:{port}", authority.path).code == code


def test_a_server_that_says_nothing_is_a_timeout(authority: Authority) -> None:
    released = threading.Event()
    with serving(lambda connection: released.wait(20)) as port:
        error = refused(f"127.0.0.1:{port}", authority.path, timeout_s=0.3)
        released.set()
    assert error.code == "timeout"


def test_nobody_there_is_refused_and_no_such_name_is_said(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert refused(f"127.0.0.1:{port}", authority.path).code == "refused-connection"

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert refused("nobody.invalid:443", authority.path).code == "no-such-host"


def test_an_answer_that_breaks_off_is_no_answer(authority: Authority) -> None:
    context = authority.server()

    def silent(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(65536)

    with serving(silent) as port:
        assert refused(f"127.0.0.1:{port}", authority.path).code == "no-answer"


@pytest.mark.parametrize(
    ("ahead", "ok"),
    [
        (timedelta(hours=-1), False),
        (timedelta(minutes=10), False),
        (timedelta(seconds=100), True),
        (timedelta(0), True),
    ],
)
def test_a_clock_that_flower_would_refuse_is_found(ahead: timedelta, ok: bool, authority: Authority) -> None:
    """`ahead` is the coordinator's clock: an hour behind means that ours is an hour ahead."""
    with serving(tls_answer(authority.server(), ahead=ahead)) as port:
        met = contact(f"127.0.0.1:{port}", authority.path)
    found = check_clock(met.skew_s)
    assert found.ok is ok
    assert "-305 to +5 s" in found.problem + found.found


def test_the_limits_of_the_clock_are_flowers() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert (preflight.LATEST_S, preflight.EARLIEST_S) == (
        SYSTEM_TIME_TOLERANCE,
        -(TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE),
    )
    assert [check_clock(skew).ok for skew in (4.9, 5.1, -304.9, -305.1, None)] == [
        True,
        False,
        True,
        False,
        None,
    ]


def test_an_answer_without_a_date_says_nothing_of_the_clock(authority: Authority) -> None:
    with serving(tls_answer(authority.server(), dated=False)) as port:
        assert contact(f"127.0.0.1:{port}", authority.path).skew_s is None


@contextmanager
def hospital_proxy(asked: list[str], *, status: str = "200 Connection established") -> Iterator[int]:
    """A proxy that notes what it is asked, and opens the tunnel to where it is told."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def answer(connection: socket.socket) -> None:
        head = connection.recv(65536).decode()
        asked.append(head)
        connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if not status.startswith("200"):
            return
        host, _, port = head.split()[1].rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as onward:
            back = threading.Thread(target=pump, args=(onward, connection), daemon=True)
            back.start()
            pump(connection, onward)
            back.join(10)

    with serving(answer) as port:
        yield port


def test_the_hospitals_proxy_is_used_as_flowers_client_would(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    with serving(tls_answer(authority.server())) as server, hospital_proxy(asked) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://ward%40x:s3cret@127.0.0.1:{port}")
        met = contact(f"127.0.0.1:{server}", authority.path)
        assert met.via == f"127.0.0.1:{port}"
        assert asked[0].startswith(f"CONNECT 127.0.0.1:{server} ")
        assert base64.b64encode(b"ward@x:s3cret").decode() in asked[0]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert contact(f"127.0.0.1:{server}", authority.path).via == ""
    assert len(asked) == 1


def test_httpx_as_flower_makes_it_takes_the_same_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PROXY_VARIABLES claims of the installed Flower and httpx."""
    import inspect

    from flwr.supercore.protobuf.client import ProtobufClient

    made = inspect.getsource(ProtobufClient.__init__)
    assert "httpx.Client(" in made
    assert "trust_env" not in made
    asked: list[str] = []
    with hospital_proxy(asked, status="403 Forbidden") as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        client = ProtobufClient("https://203.0.113.9:8443", timeout=5.0)
        with pytest.raises(Exception, match="403"):
            client._client.get("https://203.0.113.9:8443/v1/fleet/")
    assert asked[0].startswith("CONNECT 203.0.113.9:8443 ")


@pytest.mark.parametrize("status", ["403 Forbidden", "407 Proxy Authentication Required"])
def test_a_proxy_that_refuses_is_named_without_its_password(
    status: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hospital_proxy([], status=status) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://ward:s3cret@127.0.0.1:{port}")
        error = refused("127.0.0.1:9", authority.path)
    assert error.code == "proxy-refused"
    assert status.split(maxsplit=1)[0] in error.message
    assert "s3cret" not in error.message + error.hint


def test_a_proxy_that_is_down_is_told_from_a_coordinator_that_is(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    error = refused("127.0.0.1:9", authority.path)
    assert (error.code, "proxy" in error.message) == ("refused-connection", True)


def test_a_proxy_of_another_kind_is_said(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://ward:s3cret@127.0.0.1:1080")
    with pytest.raises(ConfigError) as caught:
        contact("127.0.0.1:9", authority.path)
    assert caught.value.code == "bad-proxy"
    assert "s3cret" not in caught.value.message


def pinned(**changes: str) -> dict[str, str]:
    return {
        "federation": "north",
        "expires": "2027-01-31",
        "version": "",
        "fingerprint": "",
        "coordinator_key": "",
    } | changes


@pytest.mark.parametrize(
    ("day", "ok", "is_noted"),
    [("2026-06-01", True, False), ("2027-01-15", True, True), ("2027-02-01", False, True)],
)
def test_an_enrolment_is_noted_a_month_before_it_ends(day: str, ok: bool, is_noted: bool) -> None:
    found = check_enrolment(pinned(), date.fromisoformat(day))
    assert (found.ok, bool(found.problem), bool(found.fix)) == (ok, is_noted, is_noted)


def test_a_kit_of_another_version_is_found() -> None:
    found = {item.check: item for item in preflight.check_versions("9.9.9")}
    assert (found["fedqc"].ok, "9.9.9" in found["fedqc"].problem) == (False, True)
    assert found["flwr"].ok
    assert {item.check: item for item in preflight.check_versions("")}["fedqc"].ok


def test_where_the_agent_computes_is_named_and_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    found = preflight.check_device("auto" if not torch.cuda.is_available() else "cpu")
    assert (found.ok, found.found) == (True, f"training runs on CPU (torch {torch.__version__})")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        missing = preflight.check_device("cuda:1")
    assert missing.ok is False
    assert "cuda:1" in missing.problem
    assert missing.fix
    assert exit_status([missing]) == 2

    def broken(choice: str) -> torch.device:
        raise RuntimeError("CUDA driver version is insufficient\nmore")

    monkeypatch.setattr(
        "common.devices.use_device", lambda choice: broken(choice) if choice != "cpu" else None
    )
    found = preflight.check_device("cuda")
    assert (found.ok, found.problem) == (False, "cuda: CUDA driver version is insufficient")


def test_a_full_disk_is_found() -> None:
    assert [check_disk(size).ok for size in (1 << 30, 2 << 30)] == [False, True]


def test_encryption_that_cannot_be_told_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = check_encryption([tmp_path], "overlay / overlay rw 0 0\n")
    assert (found.ok, bool(found.problem)) == (None, True)
    (found,) = check_encryption([tmp_path], f"/dev/x / ext4 rw 0 0\n/home {tmp_path} ecryptfs rw 0 0\n")
    assert found.ok
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for types, ok in (("crypt\npart\ndisk", True), ("part\ndisk", None)):
        (bin_folder / "lsblk").write_text(f"#!/bin/sh\nprintf '{types}'\n", encoding="utf-8")
        (bin_folder / "lsblk").chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
        (found,) = check_encryption([tmp_path], "/dev/mapper/data / ext4 rw 0 0\n")
        assert (found.ok, found.problem == "the device under it is not encrypted") == (ok, not ok)


def bare_site(folder: Path) -> Path:
    for name, mode in (("state", 0o700), ("node", 0o700), ("run", 0o750)):
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(mode)
    (folder / "site.yaml").write_text(
        "name: hospital-a\nkind: hospital\ncohort: c\nnominal_patients: 200\n", encoding="utf-8"
    )
    (folder / "site.yaml").chmod(0o640)
    (folder / "node" / "node.key").touch(mode=0o600)
    return folder


@pytest.mark.parametrize(
    ("path", "mode"),
    [("node/node.key", 0o640), ("state", 0o750), ("node", 0o701), ("run", 0o755), ("site.yaml", 0o660)],
)
def test_a_file_that_lets_in_others_is_named_with_its_remedy(path: str, mode: int, tmp_path: Path) -> None:
    site = bare_site(tmp_path / "site")
    config, _ = read_site(site)
    assert check_modes(site, config).ok
    (site / path).chmod(mode)
    found = check_modes(site, config)
    assert (found.ok, str(site / path) in found.problem) == (False, True)
    command, mode_text, name = found.fix.split()
    assert (command, name) == ("chmod", str(site / path))
    (site / path).chmod(int(mode_text, 8))
    assert check_modes(site, config).ok


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_among_the_keys_is_found(tmp_path: Path) -> None:
    site = bare_site(tmp_path / "site")
    os.chown(site / "node" / "node.key", 12345, 12345)
    found = check_modes(site, read_site(site)[0])
    assert (found.ok, "node.key" in found.problem) == (False, True)


def joined(site: Path, authority: Authority, port: int, **changes: str) -> None:
    (site / "node").mkdir(mode=0o700, exist_ok=True)
    (site / "run").mkdir(mode=0o750, exist_ok=True)
    (site / "node" / "node.yaml").write_text(
        yaml.safe_dump({"address": f"127.0.0.1:{port}"}), encoding="utf-8"
    )
    (site / "node" / "ca.crt").write_bytes(authority.path.read_bytes())
    (site / "node" / "runtime.secret").write_bytes(b"a secret that is never shown")
    (site / "node" / "runtime.secret").chmod(0o600)
    far = (date.today() + timedelta(days=300)).isoformat()
    (site / "state" / "coordinator.json").write_text(
        json.dumps(pinned(expires=far, **changes)), encoding="utf-8"
    )


def by_name(checks: Iterable[Check]) -> dict[str, Check]:
    return {found.check: found for found in checks}


def test_a_site_that_is_ready_is_told_so(data: Path, authority: Authority) -> None:
    site = data / "hospital-a"
    with serving(tls_answer(authority.server())) as port:
        joined(site, authority, port)
        checks = list(check(site, with_noise(tiny_plan(arms=["federated_dp", "federated"]))))
    assert [found for found in checks if found.ok is False] == []
    assert exit_status(checks) == 0
    found = by_name(checks)
    assert found["arm federated_dp"].found == "accept"
    assert "ε 2.00 per patient at δ 1e-05 for the whole plan (federated_dp 1." in found["cost"].found
    assert "evaluation 0.8" in found["cost"].found
    assert "2 of 2 rounds" in found["cost"].found
    shown = table(checks) + json.dumps([asdict(item) for item in checks])
    assert "never shown" not in shown
    assert (site / "state" / "site.key").read_text().strip() not in shown


def test_each_check_is_told_when_it_is_done_and_images_show_their_progress(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first check decodes every image: an operator must not look at an empty screen for that long."""
    shown: list[str] = []

    @contextmanager
    def progress_shown() -> Iterator[Callable[[str, int, int], None]]:
        yield lambda stage, done, total: shown.append(stage)

    monkeypatch.setattr("client.supervision.preflight.progress_shown", progress_shown)
    checks = check(data / "hospital-a", tiny_plan(image_size=48))
    told = [found.check for found in itertools.takewhile(lambda found: found.check != "ledger", checks)]
    assert told[0] == "python"
    assert shown == []
    assert next(checks).check == "data"
    assert "slices" in shown


def test_what_the_policy_says_to_a_plan_is_told_arm_by_arm(data: Path) -> None:
    site = data / "hospital-a"
    policy = {"max_epsilon": 1.0, "require_approval": True, "evaluation": "none", "allow_non_private": False}
    settle(site, policy)
    plan = tiny_plan(arms=["federated_dp", "federated"])
    checks = by_name(check(site, plan))
    assert checks["approval"].problem.startswith("not-approved")
    assert checks["arm federated_dp"].problem.startswith("epsilon-over-policy")
    assert checks["arm federated"].problem.startswith("non-private-not-permitted")
    assert checks["evaluation"].problem.startswith("evaluation-not-permitted")
    assert checks["coordinator"].ok is None
    assert exit_status(list(checks.values())) == 4
    approve(site, plan)
    assert by_name(check(site, plan))["approval"].ok


@pytest.mark.parametrize(("nominal", "right"), [(5000, "20"), (1, "20"), (50, ""), (20, "")])
def test_a_nominal_number_that_is_off_is_shown_with_the_right_bucket_and_fails_nothing(
    nominal: int, right: str
) -> None:
    """5000 with 42 training patients would outweigh every other site."""
    found = check_bucket(nominal, 42)
    assert found.ok
    assert ("nominal_patients: 20" in found.fix, f"{nominal}, and 42" in found.problem) == (bool(right),) * 2


def test_site_check_and_join_compare_the_nominal_number_with_the_images(data: Path) -> None:
    site = data / "hospital-a"
    settle(site, nominal_patients=10)
    assert by_name(check(site))["bucket"].problem == bucket_note(site) == ""
    settle(site, nominal_patients=5000)
    far = by_name(check(site))["bucket"]
    assert "5000" in far.problem
    assert bucket_note(site) == f"{far.problem}; {far.fix}"
    assert "bucket" not in by_name(check(site, tiny_plan(held_out=["hospital-a"]))), "it does not train"


def test_joining_decodes_no_image(tmp_path: Path) -> None:
    assert bucket_note(bare_site(tmp_path / "site")) == ""


def test_a_held_out_site_is_not_asked_to_train(data: Path) -> None:
    checks = by_name(check(data / HELD_OUT, tiny_plan(arms=["federated_dp"])))
    assert "arm federated_dp" not in checks
    assert "cost" not in checks


def test_a_coordinator_who_is_half_there_is_a_network_problem(data: Path, authority: Authority) -> None:
    site = data / "hospital-a"
    with serving(tls_answer(authority.server(lasts=timedelta(days=7)), status="502 Bad Gateway")) as port:
        joined(site, authority, port)
        checks = list(check(site))
    found = by_name(checks)
    assert (found["coordinator"].ok, "502" in found["coordinator"].problem) == (False, True)
    assert (found["certificate"].ok, bool(found["certificate"].problem)) == (True, True)
    assert exit_status(checks) == 3


def test_ethics_approval_and_consent_are_asked_of_hospitals_only(tmp_path: Path) -> None:
    config, folder = read_site(bare_site(tmp_path / "site"))
    assert (check_ethics(folder, config).ok, "ethics-missing" in check_ethics(folder, config).problem) == (
        False,
        True,
    )
    (folder / "cohort.yaml").write_text("ethics_approval: E1\nconsent_basis: broad\n")
    assert check_ethics(folder, config).ok
    (folder / "cohort.yaml").unlink()
    assert check_ethics(folder, config.model_copy(update={"kind": "public"})).ok is None


def test_a_site_that_is_no_hospital_shows_what_says_so(data: Path, tmp_path: Path) -> None:
    config, folder = read_site(bare_site(tmp_path / "site"))
    assert check_kind(folder, config).ok is None
    (folder / "images").mkdir()
    path = folder / "images" / "scan"
    write_slice(path, np.zeros((8, 8)), FACTS)
    scanned = pydicom.dcmread(path)
    scanned.file_meta.ImplementationVersionName = "SCANNER"
    scanned.save_as(path)
    public = config.model_copy(update={"kind": "public"})
    assert "kind-undeclared" in check_kind(folder, public).problem
    assert check_kind(folder, public).ok is False
    config, folder = read_site(data / "hospital-a")
    assert check_kind(folder, config).found == "synthetic: its images were written by fedqc"
    declared = Declaration(by="li", at="2026-01-01", why="consented volunteers", images="images")
    public = public.model_copy(update={"declared_not_hospital": declared})
    found = check_kind(tmp_path / "site", public)
    assert (found.ok, "consented volunteers" in found.found) == (True, True)
    assert "1 of 1 files" in found.problem
    assert "WANG" not in str(found)


def test_a_ledger_that_is_missing_or_damaged_is_found_before_a_run(tmp_path: Path) -> None:
    """A hospital without it refuses every private arm and every noised score."""
    config, folder = read_site(bare_site(tmp_path / "site"))
    path = folder / "state" / "ledger.sqlite3"
    missing = check_ledger(folder, config)
    assert missing.ok is False
    assert missing.problem.startswith("ledger-missing: ")
    assert "fedqc site init" in missing.fix
    assert not path.exists(), "a check makes no ledger"
    init_ledger(config, folder)
    assert check_ledger(folder, config) == Check(check="ledger", ok=True, found="intact, entries: 1")
    path.unlink()
    gone = check_ledger(folder, config)
    assert (gone.ok, gone.problem.startswith("ledger-missing: ")) == (False, True)
    assert "backup" in gone.fix
    assert "init" not in gone.fix, "there is no second budget"
    path.write_bytes(b"no ledger")
    assert check_ledger(folder, config).problem.startswith("ledger-damaged: ")
    assert exit_status([check_ledger(folder, config)]) == 2


def test_a_site_without_patients_needs_no_ledger_yet(data: Path) -> None:
    config, folder = read_site(data / "hospital-a")
    assert check_ledger(folder, config).ok is None
    assert not (folder / "state" / "ledger.sqlite3").exists()


def test_a_ledger_of_an_earlier_version_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    config, folder = read_site(bare_site(tmp_path / "site"))
    (folder / "state" / "ledger-0a.sqlite3").write_bytes(b"")
    assert check_ledger(folder, config).found.startswith("of an earlier version")
    assert not (folder / "state" / "ledger.sqlite3").exists()


def test_a_site_that_cannot_work_says_everything_at_once(tmp_path: Path) -> None:
    site = bare_site(tmp_path / "site")
    (site / "node" / "node.key").chmod(0o644)
    (site / "node" / "node.yaml").write_text("[", encoding="utf-8")
    (site / "state" / "coordinator.json").write_text("{", encoding="utf-8")
    (site / "policy.yaml").write_text("max_epsilon: -1\n", encoding="utf-8")
    with (site / "site.yaml").open("a", encoding="utf-8") as file:
        file.write("policy: policy.yaml\n")
    checks = list(check(site))
    assert {found.check for found in checks if found.ok is False} == {
        "enrolment",
        "coordinator",
        "modes",
        "ledger",
        "data",
        "ethics",
        "policy",
    }
    assert exit_status(checks) == 2
    assert all(found.fix for found in checks if found.ok is False), table(checks)


@pytest.mark.parametrize(
    ("bucket", "split", "begins"),
    [
        (2000, None, "scores with noise: estimable at this n and epsilon (857 test patients by the bucket"),
        (50, None, "scores with noise: not estimable at this n and epsilon (21 test patients by the bucket"),
        (2000, {"train": 0.0, "test": 1.0}, "scores with noise: estimable at this n and epsilon (2000 test"),
    ],
)
def test_a_hospital_is_told_when_it_joins_whether_scores_with_noise_could_tell_anything(
    bucket: int, split: Any, begins: str, data: Path
) -> None:
    site = data / "hospital-a"
    more = {} if split is None else {"split": split}
    settle(site, kind="hospital", nominal_patients=bucket, policy={"max_epsilon_per_run": 2.0}, **more)
    note = scores_note(site)
    assert note.startswith(begins)
    assert "ε 2, the most that the policy permits a run, 1 model" in note
    assert ("test patients on they are" in note) == (bucket == 50)
    settle(site, policy={"evaluation": "disclosed"})
    assert scores_note(site) == ""


def test_a_check_of_a_plan_warns_where_scores_would_be_charged_and_tell_nothing(data: Path) -> None:
    site = data / "hospital-a"
    settle(site, kind="hospital", nominal_patients=100, policy={"evaluation": "dp"})
    plan = with_noise(tiny_plan(arms=["public", "federated_dp"], privacy={"epsilon": 1.0}))
    checks = check_plan(site, read_site(site)[0], read_policy(site / "policy.yaml"), plan)
    found = {one.check: one for one in checks}
    assert found["scores"].ok  # a warning: the operator decides
    assert found["scores"].problem.startswith("not estimable at this n and epsilon (67 test patients")
    assert "fewer models" in found["scores"].fix
