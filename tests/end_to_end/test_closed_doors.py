"""A real SuperLink behind the real proxy, made and started as a coordinator does: without credentials nothing
of it is reachable.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from server.federation.nginx import FLEET_CALLS
from server.federation.registry import Federation, approve, revoke
from server.federation.services import environment, superlink_answers
from tests.helpers.command_line import FEDQC, fedqc
from tests.helpers.enrolment import a_request
from tests.helpers.ports import free_port
from tests.helpers.proxy_probe import TRICKS, answers, head

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin") is None,
        reason="nginx is not installed",
    ),
]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("doors") / "fed"
    words = (
        "init",
        "doors",
        "--dir",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        free_port(),
        "--listen",
        "127.0.0.1",
    )
    said = fedqc("federation", *words)
    assert said.returncode == 0, said.stderr
    made = Federation.open(folder)
    log = folder.parent / "start.log"
    began = time.monotonic()
    with log.open("wb") as sink:
        command = [str(FEDQC), "federation", "start", "--federation", str(folder)]
        process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
    try:
        while "listening" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        print(f"\nfederation start: {time.monotonic() - began:.1f} s until it listens")
        yield made
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 143, log.read_text()
        print(f"federation start: ended {time.monotonic() - began:.1f} s after SIGTERM")
    finally:
        process.kill()
        process.wait(600)


def directly(federation: Federation, path: str, method: str = "GET") -> tuple[int, bytes]:
    """The SuperLink itself, on loopback: what the proxy hides."""
    url = f"https://127.0.0.1:{federation.settings.superlink_port}{path}"
    context = ssl.create_default_context(cafile=str(federation.ca_certificate))
    headers = {"Content-Type": PROTOBUF_MEDIA_TYPE, "Accept": PROTOBUF_MEDIA_TYPE}
    request = urllib.request.Request(
        url, data=b"" if method == "POST" else None, method=method, headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def routes(deployed: Federation) -> dict[str, list[str]]:
    """Every route that the running SuperLink says it has: path to methods."""
    status, text = directly(deployed, "/openapi.json")
    assert status == 200
    found = {
        path: [method.upper() for method in methods] for path, methods in json.loads(text)["paths"].items()
    }
    return found | {"/openapi.json": ["GET"], "/docs": ["GET"], "/docs/oauth2-redirect": ["GET"]}


def test_the_proxy_s_list_is_the_superlink_s_fleet(routes: dict[str, list[str]]) -> None:
    fleet = {path for path in routes if path.startswith("/v1/fleet/")}
    assert fleet == {f"/v1/fleet/{call}" for call in FLEET_CALLS}
    assert all(routes[path] == ["POST"] for path in fleet)
    assert {path.split("/")[2] for path in routes if path.startswith("/v1/")} == {
        "fleet",
        "control",
        "runtime",
    }


def test_on_loopback_the_doors_are_open(deployed: Federation) -> None:
    """The control: what the probes below ask for exists, and would be answered."""
    assert directly(deployed, "/v1/control/list-nodes", "POST")[0] == 200
    assert directly(deployed, "/docs")[0] == 200
    # the secret guards this one even there
    assert directly(deployed, "/v1/runtime/acquire-task", "POST")[0] == 401


def test_every_route_of_control_runtime_and_docs_is_shut(
    deployed: Federation, routes: dict[str, list[str]]
) -> None:
    hidden = sorted(path for path in routes if not path.startswith("/v1/fleet/"))
    assert len(hidden) > 40
    found: Counter[int] = Counter()
    log = deployed.state / "superlink.log"
    before = len(log.read_text(errors="replace").splitlines())
    for path, trick in itertools.product(hidden, TRICKS):
        target = TRICKS[trick](path.replace("{", "%7b").replace("}", "%7d"))
        for method in routes[path]:
            (status,) = answers(deployed, head(method, target))
            found[status] += 1
            assert status == 404, (method, target)
    print(
        f"\n{len(hidden)} routes of control, runtime and docs, {len(TRICKS)} ways to write each: answers "
        f"{dict(found)}"
    )
    lines = log.read_text(errors="replace").splitlines()[before:]
    arrived = {line.split('"')[1].split()[1] for line in lines if '" ' in line and "HTTP/1.1" in line}
    # all from loopback
    assert arrived <= {
        "/openapi.json",
        "/docs",
        "/health",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
    }


def test_the_calls_of_nodes_reach_it_and_want_a_node_s_key(deployed: Federation) -> None:
    for call in FLEET_CALLS:
        headers = f"Content-Type: {PROTOBUF_MEDIA_TYPE}\r\nAccept: {PROTOBUF_MEDIA_TYPE}\r\n"
        (status,) = answers(deployed, head("POST", f"/v1/fleet/{call}", headers=headers))
        assert status == 401, call


def until(is_true: Callable[[], bool]) -> None:
    for _ in range(600):
        if is_true():
            return
        time.sleep(0.1)
    pytest.fail("it never happened")


def call_as(federation: Federation, key: ec.EllipticCurvePrivateKey, call: str, node_id: int) -> int:
    """The status of a node's call through the proxy, signed with `key`, in the name of the node `node_id`."""
    message = PROTOBUF_REQUEST_TYPES["POST", f"/v1/fleet/{call}"]()
    names = {field.name for field in message.DESCRIPTOR.fields}
    if "node" in names:
        message.node.node_id = node_id
    else:
        message.node_id = node_id
    timestamp = now().isoformat()
    headers = {
        "Content-Type": PROTOBUF_MEDIA_TYPE,
        "Accept": PROTOBUF_MEDIA_TYPE,
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, timestamp.encode())).decode(),
        "flwr-timestamp": timestamp,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    (status,) = answers(
        federation, head("POST", f"/v1/fleet/{call}", body=message.SerializeToString(), headers=lines)
    )
    return status


def test_with_one_site_s_key_nothing_of_another_is_reachable(deployed: Federation) -> None:
    """And enrolling and revoking take effect while the services run."""
    keys = {site: ec.generate_private_key(ec.SECP384R1()) for site in ("hospital-a", "hospital-b")}
    for site, key in keys.items():
        approve(deployed, a_request(site, node=key))
    until(lambda: all(enrolment.node_id for enrolment in deployed.sites()))
    nodes = {enrolment.site: enrolment.node_id or 0 for enrolment in deployed.sites()}
    # these two name a key, not a node
    for call in (call for call in FLEET_CALLS if call not in ("register-node", "activate-node")):
        assert call_as(deployed, keys["hospital-a"], call, nodes["hospital-b"]) == 401, call
        assert call_as(deployed, ec.generate_private_key(ec.SECP384R1()), call, nodes["hospital-b"]) == 401, (
            call
        )
    assert call_as(deployed, keys["hospital-b"], "pull-messages", nodes["hospital-b"]) == 200  # the control
    revoke(deployed, "hospital-b")
    until(lambda: call_as(deployed, keys["hospital-b"], "pull-messages", nodes["hospital-b"]) == 401)
    assert call_as(deployed, keys["hospital-a"], "pull-messages", nodes["hospital-a"]) == 200


def test_flower_s_own_client_cannot_be_a_coordinator_from_outside(
    deployed: Federation, tmp_path: Path
) -> None:
    """`flwr supernode list` with the authority's certificate, which every hospital has: through the proxy,
    and on loopback.
    """
    said = {}
    for place, port in (("proxy", deployed.settings.port), ("loopback", deployed.settings.superlink_port)):
        home = tmp_path / place
        home.mkdir()
        lines = ["[superlink]", 'default = "x"', "[superlink.x]", f'address = "127.0.0.1:{port}"']
        (home / "config.toml").write_text(
            "\n".join([*lines, f'root-certificates = "{deployed.ca_certificate}"', ""])
        )
        command = [str(FEDQC.with_name("flwr")), "supernode", "list", "x", "--format", "json"]
        env = {**environment(deployed), "FLWR_HOME": str(home)}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
        said[place] = json.loads(ran.stdout[ran.stdout.index("{") :])["success"]
    assert said == {"proxy": False, "loopback": True}


def test_a_superlink_that_is_killed_comes_back(deployed: Federation) -> None:
    path = deployed.state / "superlink.pid"
    before = int(path.read_text())
    os.kill(before, signal.SIGKILL)
    until(lambda: int(path.read_text()) != before and superlink_answers(deployed))
    (status,) = answers(deployed, head("POST", "/v1/control/list-nodes"))
    assert status == 404


def test_a_second_start_is_refused(deployed: Federation) -> None:
    said = fedqc("federation", "start", "--federation", deployed.folder)
    assert said.returncode == 2
    assert "error [already-running]" in said.stderr
