"""What really leaves a hospital, byte for byte.

The node of one hospital runs in a network namespace with one way out: a link to a recording box, which ends
its TLS (with a certificate of the federation's own authority), writes every byte down and passes it on. The
hospital's images, sheets and paths carry planted markers. In a whole run, and in runs that fail, no marker
may be found in the bytes, nor in any message decoded from them, in any form; a marker that is meant to be
sent must be.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import hashlib
import ipaddress
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from client.supervision.supervisor import state_of
from common import wire
from common.signing import Statement
from common.weights import decode_steps
from common.wire import Envelope, type_of
from tests.helpers.ports import free_port
from tests.helpers.rig import LIMIT_S, Deployment, deployed_plan, wait_until
from tests.helpers.wire import LEAVES_A_HOSPITAL

CAN_RUN = os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("nsenter") is not None
pytestmark = pytest.mark.skipif(
    not CAN_RUN, reason="needs nginx, and root with ip and nsenter to lay a link between network namespaces"
)

SITE = "hospital-a"
MEANT_TO_BE_SENT = (
    "phantoms-Wq7uLeafControl-told-on-purpose"  # site.yaml's stand_in: public, in every introduction
)

TAGS: dict[str, tuple[str, str]] = {  # marker -> keyword, value ({} = number of the patient or image)
    "Zykowska^Brunhilde": ("PatientName", "Zykowska^Brunhilde^{}"),
    "PIDQX-77013": ("PatientID", "PIDQX-77013-{}"),
    "OTHERID-5518293": ("OtherPatientIDs", "OTHERID-5518293"),
    "19371123": ("PatientBirthDate", "19371123"),
    "Birkenallee 4711": ("PatientAddress", "Birkenallee 4711, Hinterwald"),
    "+49-5550-918273": ("PatientTelephoneNumbers", "+49-5550-918273"),
    "Mutmasslich": ("PatientMotherBirthName", "Mutmasslich^Adelgunde"),
    "1.2.826.0.1.3680043.8.498.66550011": ("StudyInstanceUID", "1.2.826.0.1.3680043.8.498.66550011.{}"),
    "1.2.826.0.1.3680043.8.498.66550022": ("SeriesInstanceUID", "1.2.826.0.1.3680043.8.498.66550022.{}"),
    "1.2.826.0.1.3680043.8.498.66550033": ("SOPInstanceUID", "1.2.826.0.1.3680043.8.498.66550033.{}"),
    "1.2.826.0.1.3680043.8.498.66550044": ("FrameOfReferenceUID", "1.2.826.0.1.3680043.8.498.66550044.{}"),
    "ACCNO5839201": ("AccessionNumber", "ACCNO5839201"),
    "STUDYIDQ8812": ("StudyID", "STUDYIDQ8812"),
    "20190314": ("StudyDate", "20190314"),
    "101742.338811": ("StudyTime", "101742.338811"),
    "20190315081533.77": ("AcquisitionDateTime", "20190315081533.770000"),
    "Klinikum Trollhausen": ("InstitutionName", "Klinikum Trollhausen am See"),
    "Sackgasse 99": ("InstitutionAddress", "Sackgasse 99, 00815 Trollhausen"),
    "NeuroradNord7": ("InstitutionalDepartmentName", "NeuroradNord7"),
    "Quacksalber": ("ReferringPhysicianName", "Quacksalber^Ottokar"),
    "Pfuscherhuber": ("PerformingPhysicianName", "Pfuscherhuber^Zenzi"),
    "Knipserling": ("OperatorsName", "Knipserling^Egon"),
    "Stud-Kopfschmerz-Verlauf": ("StudyDescription", "Stud-Kopfschmerz-Verlauf"),
    "ser_t2_haste_zz81": ("SeriesDescription", "ser_t2_haste_zz81"),
    "prot_klein_hirn_k3": ("ProtocolName", "prot_klein_hirn_k3"),
    "STATIONXR12": ("StationName", "STATIONXR12"),
    "SN-90125-66": ("DeviceSerialNumber", "SN-90125-66"),
    "Patient kam mit Gehhilfe": ("ImageComments", "Patient kam mit Gehhilfe"),
    "Zustand nach Zwiebelsturz": ("AdditionalPatientHistory", "Zustand nach Zwiebelsturz"),
    "KRANKENKASSE-AOZ": ("PatientInsurancePlanCodeSequence", "KRANKENKASSE-AOZ"),
}
CHINESE = "欧阳震华检查者"  # PatientComments, in GB18030
PRIVATE = {
    "private creator": "PRIVCREATOR_KVZ",
    "private text": "private-remark-8273",
    "private bytes": "rawprivate00ff7766",
}
PATHS = {
    "images folder": "bilder-frau-zykowska",
    "patient folder": "station-4b-bett-2",
    "file name": "IMG-KAEMPFER-1937",
    "label file name": "befunde-dr-quengel",
    "cohort": "kohorte-geheimwald",
}
NOTES = {
    "ethics approval": "EK-2031-Nr-55172",
    "consent basis": "Einwilligung Formular Grau-9",
    "operator note": "anruf bei Schwester Irmtraud",
    "exception text, policy": "maxepsilon-vertippt-von-Hans",
    "exception text, labels": "ja-wohl-hat-metall",
}
MARKERS = (*TAGS, CHINESE, *PRIVATE.values(), *PATHS.values(), *NOTES.values())


def test_there_are_forty_markers() -> None:
    assert len(set(MARKERS)) >= 40
    assert all(len(marker.encode()) >= 8 for marker in MARKERS)


# ---- planting


def plant(site: Path) -> dict[str, set[str]]:
    """Put the markers into the hospital's files and names. Returns marker -> the whole values that were
    written, for hashes of them.
    """
    values: dict[str, set[str]] = {marker: {marker} for marker in MARKERS}
    images = site / PATHS["images folder"] / PATHS["patient folder"]
    images.mkdir(parents=True)
    names: dict[str, str] = {}
    for number, path in enumerate(sorted((site / "images").glob("*.dcm"))):
        slice_ = pydicom.dcmread(path)
        patient = int(path.stem[1:].split("_")[0])
        slice_.SpecificCharacterSet = "GB18030"
        slice_.PatientComments = CHINESE
        for marker, (keyword, pattern) in TAGS.items():
            written = pattern.format(
                number if "Instance" in keyword and keyword != "StudyInstanceUID" else patient
            )
            if keyword == "PatientInsurancePlanCodeSequence":
                item = pydicom.Dataset()
                item.CodeMeaning = written
                slice_.PatientInsurancePlanCodeSequence = [item]
            else:
                setattr(slice_, keyword, written)
            values[marker].add(written)
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        block = slice_.private_block(0x0043, PRIVATE["private creator"], create=True)
        block.add_new(0x01, "LT", PRIVATE["private text"])
        block.add_new(0x02, "UN", PRIVATE["private bytes"].encode())
        name = f"{PATHS['file name']}-{path.name}"
        slice_.save_as(images / name)
        names[path.name] = f"{PATHS['patient folder']}/{name}"
        values[PATHS["file name"]] |= {name, names[path.name], str(images / name)}
    shutil.rmtree(site / "images")
    with (site / "labels.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    with labels_of(site).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [header, *([names[row[0]], *row[1:]] for row in rows)]
        )
    (site / "labels.csv").unlink()
    return values


def labels_of(site: Path) -> Path:
    return site / f"{PATHS['label file name']}.csv"


# ---- recording


@dataclass
class Recording:
    """Both directions of every connection, as they were inside TLS; and what kinds of packets crossed the
    link at all.
    """

    streams: list[tuple[bytearray, bytearray]] = field(default_factory=list)  # from the site, to the site
    packets: set[tuple[str, ...]] = field(default_factory=set)

    def sent(self) -> list[bytes]:
        return [bytes(out) for out, _ in self.streams]

    def received(self) -> list[bytes]:
        return [bytes(back) for _, back in self.streams]


class Box:
    """Ends TLS, notes all bytes, passes them on to the real proxy in TLS again; and listens to the link
    itself.
    """

    def __init__(self, address: str, link: str, deployment: Deployment) -> None:
        self.recording = Recording()
        self.port = free_port()
        self._upstream = deployment.port
        self._inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._inside.load_cert_chain(*certificate_for(address, deployment))
        self._outside = ssl.create_default_context(cafile=str(deployment.fed / "certificates" / "ca.crt"))
        self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))  # ETH_P_ALL
        self._wire.bind((link, 0))
        self._wire.settimeout(0.2)
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        listening = asyncio.start_server(self._carry, address, self.port, ssl=self._inside)
        self._server = self._loop.run_until_complete(listening)
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._loop.run_forever, self._watch_link)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed.set()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join(10)
        self._wire.close()

    async def _end(self) -> None:
        self._server.close()
        carrying = asyncio.all_tasks() - {asyncio.current_task()}
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    async def _carry(self, from_site: asyncio.StreamReader, to_site: asyncio.StreamWriter) -> None:
        out, back = bytearray(), bytearray()
        self.recording.streams.append((out, back))
        try:
            from_proxy, to_proxy = await asyncio.open_connection(
                "127.0.0.1", self._upstream, ssl=self._outside
            )
        except OSError:
            to_site.close()
            return
        await asyncio.gather(self._pump(from_site, to_proxy, out), self._pump(from_proxy, to_site, back))

    @staticmethod
    async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, record: bytearray) -> None:
        with suppress(OSError):
            while content := await source.read(1 << 16):
                record += content
                sink.write(content)
                await sink.drain()
        sink.close()

    def _watch_link(self) -> None:
        while not self._closed.is_set():
            with suppress(TimeoutError):
                self.recording.packets.add(kind_of_packet(self._wire.recv(65535)))


def kind_of_packet(frame: bytes) -> tuple[str, ...]:
    """ARP; or protocol, addresses and, for TCP, the lower port (the other one is the caller's own choice)."""
    if frame[12:14] == b"\x08\x06":
        return ("arp",)
    if frame[12:14] != b"\x08\x00":
        return ("other", frame[12:14].hex())
    ip = frame[14:]
    ends = sorted(str(ipaddress.IPv4Address(ip[start : start + 4])) for start in (12, 16))
    if ip[9] != 6:
        return (f"ip protocol {ip[9]}", *ends)
    tcp = ip[(ip[0] & 15) * 4 :]
    return ("tcp", *ends, *sorted(str(int.from_bytes(tcp[start : start + 2], "big")) for start in (0, 2)))


def certificate_for(address: str, deployment: Deployment) -> tuple[Path, Path]:
    """A server certificate for `address` from the federation's own authority, whose key the rig has."""
    authority = x509.load_pem_x509_certificate((deployment.fed / "certificates" / "ca.crt").read_bytes())
    signer: Any = serialization.load_pem_private_key(
        (deployment.fed / "keys" / "ca.key").read_bytes(), password=None
    )
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    certificate, private = deployment.folder / "box.crt", deployment.folder / "box.key"
    certificate.write_bytes(builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    private.write_bytes(pem)
    return certificate, private


class Cell:
    """A network namespace whose only interface besides its own loopback leads to `outer`: no route goes
    further.
    """

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        third, fourth = secrets.randbelow(250) + 1, 4 * secrets.randbelow(60)
        self.name, self.link = f"fedqc{tag}", f"fq{tag}o"
        self.outer, self.inner = f"10.213.{third}.{fourth + 1}", f"10.213.{third}.{fourth + 2}"
        inner_link = f"fq{tag}i"
        _ip("netns", "add", self.name)
        try:
            _ip("link", "add", self.link, "type", "veth", "peer", "name", inner_link, "netns", self.name)
            Path(f"/proc/sys/net/ipv6/conf/{self.link}/disable_ipv6").write_text("1", encoding="ascii")
            _ip("addr", "add", f"{self.outer}/30", "dev", self.link)
            _ip("link", "set", self.link, "up")
            disable = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 > $f; done"
            subprocess.run(
                ["ip", "netns", "exec", self.name, "sh", "-c", disable],
                check=True,
                capture_output=True,
                timeout=20,
            )
            _ip("-n", self.name, "addr", "add", f"{self.inner}/30", "dev", inner_link)
            _ip("-n", self.name, "link", "set", inner_link, "up")
            _ip("-n", self.name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    @property
    def prefix(self) -> list[str]:
        """Words before a command that runs it inside."""
        return ["nsenter", f"--net=/run/netns/{self.name}"]

    def routes(self) -> str:
        said = subprocess.run(
            ["ip", "-n", self.name, "route"], check=True, capture_output=True, text=True, timeout=20
        )
        return said.stdout.strip()

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True, timeout=20)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


# ---- decoding


@dataclass(frozen=True, kw_only=True)
class Request:
    path: str
    headers: dict[str, str]
    body: bytes


def requests_in(stream: bytes) -> tuple[list[Request], bytes]:
    """The HTTP/1.1 requests of one connection, and the beginning of a last one, if its process ended while it
    sent it. Raises ValueError for bytes that are none: nothing may pass unread.
    """
    found: list[Request] = []
    rest = stream
    while rest:
        begun = rest
        head, separator, rest = rest.partition(b"\r\n\r\n")
        if not separator:
            return found, begun
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, version = first.split(" ")
        if (method, version) not in (("POST", "HTTP/1.1"), ("GET", "HTTP/1.1")):
            raise ValueError(first)
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        if "chunked" in headers.get("transfer-encoding", ""):
            body, rest = _unchunked(rest)
        else:
            length = int(headers.get("content-length", "0"))
            if len(rest) < length:
                return found, begun
            body, rest = rest[:length], rest[length:]
        found.append(Request(path=path, headers=headers, body=body))
    return found, b""


def test_a_request_that_was_cut_off_is_kept_as_it_is() -> None:
    whole = b"POST /x HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    assert requests_in(whole * 2)[1] == b""
    for cut in (10, len(whole) - 1):
        requests, begun = requests_in(whole + whole[:cut])
        assert ([request.body for request in requests], begun) == ([b"abc"], whole[:cut])
    with pytest.raises(ValueError, match="PUT"):
        requests_in(whole.replace(b"POST", b"PUT"))


def _unchunked(rest: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        body, rest = body + rest[:length], rest[length + 2 :]
        if length == 0:
            return body, rest


@dataclass(kw_only=True)
class Decoded:
    """Everything that is in the recorded requests, down to the arrays."""

    requests: list[Request] = field(default_factory=list)
    objects: list[bytes] = field(default_factory=list)
    envelopes: list[Envelope] = field(default_factory=list)
    # decoded: metadata, statements, payloads, JSON texts, arrays
    parts: list[bytes] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # Flower's own error replies
    # type of message -> its sets of field names
    fields: dict[str, set[frozenset[str]]] = field(default_factory=dict)


def decode(streams: Sequence[bytes]) -> Decoded:
    found = Decoded()
    for stream in streams:
        requests, begun = requests_in(stream)
        found.requests += requests
        found.parts.append(begun)  # searched as it is
    contents: dict[str, bytes] = {}
    trees: list[ObjectTree] = []
    for request in found.requests:
        message = PROTOBUF_REQUEST_TYPES["POST", request.path].FromString(request.body)
        if isinstance(message, PushObjectRequest):
            contents[message.object_id] = message.object_content
            message.ClearField("object_content")  # it is searched as it is; as text it would be escaped
        elif isinstance(message, PushMessagesRequest):
            trees += message.message_object_trees
        found.parts.append(str(message).encode())
    found.objects = list(contents.values())
    for tree in trees:
        answer = inflate_object_from_contents(tree.object_id, dict(contents), keep_object_contents=True)
        assert isinstance(answer, Message)
        if answer.has_error():
            found.errors.append(f"{answer.error.code} {answer.error.reason}")
            continue
        envelope = Envelope.from_record(answer.content)
        assert set(answer.content) == set(envelope.to_record()), "more than an envelope left"
        Statement.parse(envelope.statement)  # raises for a field more
        found.envelopes.append(envelope)
        found.parts += [
            envelope.statement.encode(),
            envelope.payload,
            *_opened(envelope.payload, found.fields),
        ]
    return found


def _opened(payload: bytes, fields: dict[str, set[frozenset[str]]]) -> Iterator[bytes]:
    """The parts of a message: its JSON text, each value in it, each array; frames also unpacked."""
    kind = type_of(payload)
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    assert set(header["__metadata__"]) == {"json"}
    scalars = json.loads(header["__metadata__"]["json"])
    arrays = set(header) - {"__metadata__", "_"}
    fields.setdefault(kind, set()).add(frozenset((set(scalars) - {"type"}) | arrays))
    yield json.dumps(scalars, ensure_ascii=False).encode()
    message = next(known for known in wire.OUTGOING if known.__name__ == kind).from_bytes(payload)
    for name in arrays:
        array = np.asarray(getattr(message, name))
        yield array.tobytes()
        if array.dtype == np.uint8:
            yield _unframed(array).tobytes()


def _unframed(frame: np.ndarray) -> np.ndarray:
    """The steps in an update's frame: of the whole model, or of its head alone in the private arm."""
    from common.models import build
    from common.weights import manifest_of

    manifest = manifest_of(build("small_cnn").state_dict())
    part = manifest.part("head.")
    for size in (manifest.size, part.stop - part.start):
        with suppress(Exception):
            return decode_steps(frame, size)
    raise AssertionError("a frame that nobody can read left the hospital")


# ---- looking for markers

BETWEEN = b"\0 \t\r\n-_.,:;/\\|+=*#~^'\""


def plain_forms(marker: str) -> dict[str, bytes]:
    """The marker in encodings in which it can be read off again. Looked for in lower case, except base64."""
    forms = {encoding: marker.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be", "gb18030")}
    forms["reversed"] = marker[::-1].encode()
    return {name: form.lower() for name, form in forms.items()} | {
        f"hex {name}": form.hex().encode() for name, form in forms.items()
    }


def base64_forms(marker: str) -> dict[str, bytes]:
    """Each alignment: the characters that do not depend on what stands before or after."""
    forms = {}
    for encoding in ("utf-8", "utf-16-le", "gb18030"):
        raw = marker.encode(encoding)
        for shift in range(3):
            text = base64.b64encode(b"\0" * shift + raw)
            inner = text[(0, 2, 3)[shift] : len(text) - (0, 3, 2)[(shift + len(raw)) % 3]]
            forms[f"base64 {encoding} +{shift}"] = inner
            forms[f"base64url {encoding} +{shift}"] = inner.translate(bytes.maketrans(b"+/", b"-_"))
    return forms


def hash_forms(value: str) -> dict[str, tuple[bytes, bytes]]:
    """The first 16 digits, and the first 8 bytes: a shortened hash is one too."""
    forms = {}
    for algorithm in ("md5", "sha1", "sha256"):
        digest = hashlib.new(algorithm, value.encode(), usedforsecurity=False)
        forms[algorithm] = digest.hexdigest()[:16].encode(), digest.digest()[:8]
    return forms


def squeezed(content: bytes) -> bytes:
    """Without anything that could be put between characters: interleaved with NUL, split by dashes,
    grouped.
    """
    return content.translate(None, BETWEEN)


class Haystack:
    def __init__(self, parts: Sequence[bytes]) -> None:
        self.exact = b"\x01\x01\x01".join(parts)
        self.lower = self.exact.lower()
        self.squeezed = squeezed(self.lower)

    def find(self, marker: str, values: set[str]) -> list[str]:
        """The forms in which a marker is there."""
        found = [name for name, form in plain_forms(marker).items() if form in self.lower]
        found += [name for name, form in base64_forms(marker).items() if form in self.exact]
        for value in values | {marker}:
            for name, (digits, raw) in hash_forms(value).items():
                if digits in self.lower or raw in self.exact:
                    found.append(f"{name} of a value")
        for name, text in (("split", marker), ("split and reversed", marker[::-1])):
            if squeezed(text.encode().lower()) in self.squeezed:
                found.append(name)
        return found


HIDDEN = {
    "raw": lambda text: text.encode(),
    "upper case": lambda text: text.upper().encode(),
    "utf-16le": lambda text: text.encode("utf-16-le"),
    "utf-16be": lambda text: text.encode("utf-16-be"),
    "gb18030": lambda text: text.encode("gb18030"),
    "hex": lambda text: text.encode().hex().encode(),
    "HEX": lambda text: text.encode().hex().upper().encode(),
    "base64": lambda text: base64.b64encode(text.encode()),
    "base64, one before": lambda text: base64.b64encode(b"x" + text.encode() + b"yz"),
    "base64, two before": lambda text: base64.b64encode(b"xy" + text.encode() + b"z"),
    "base64url": lambda text: base64.urlsafe_b64encode(text.encode()),
    "md5": lambda text: hashlib.md5(text.encode(), usedforsecurity=False).digest(),
    "sha1 hex": lambda text: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode(),
    "sha256 hex, shortened": lambda text: hashlib.sha256(text.encode()).hexdigest()[:20].encode(),
    "reversed": lambda text: text[::-1].encode(),
    "dashes": lambda text: "-".join(text).encode(),
    "NUL between": lambda text: "\0".join(text).encode(),
    "reversed with dots": lambda text: ".".join(reversed(text)).encode(),
}


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("marker", ["Zykowska^Brunhilde", CHINESE, "1.2.826.0.1.3680043.8.498.66550011"])
def test_the_oracle_finds_a_marker_however_it_is_hidden(how: str, marker: str) -> None:
    noise = np.random.default_rng(0).bytes(4096)
    assert not Haystack([noise]).find(marker, {marker})
    assert Haystack([noise + HIDDEN[how](marker) + noise]).find(marker, {marker})


# ---- the run


@dataclass(frozen=True, kw_only=True)
class Watched:
    deployment: Deployment
    recording: Recording
    values: Mapping[str, set[str]]
    routes: str
    box: tuple[str, int]
    decoded: Decoded

    def __str__(self) -> str:
        return self.deployment.tails()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One hospital, one whole run of both arms, then runs that fail inside it in ways that quote markers."""
    deployment = Deployment(tmp_path_factory.mktemp("egress"), sites=1, running=False)
    cell = Cell()
    try:
        with deployment:
            deployment.make_data()
            site = deployment.site(SITE)
            values = plant(site)
            deployment.init()
            deployment.enrol(
                SITE,
                images=site / PATHS["images folder"],
                labels=labels_of(site),
                cohort=PATHS["cohort"],
                ethics_approval=NOTES["ethics approval"],
                consent_basis=NOTES["consent basis"],
                stand_in=MEANT_TO_BE_SENT,
            )
            policy = site / "policy.yaml"
            policy.write_text(
                f"# {NOTES['operator note']}\n{policy.read_text(encoding='utf-8')}", encoding="utf-8"
            )
            box = Box(cell.outer, cell.link, deployment)
            try:
                node_yaml = site / "node" / "node.yaml"
                there = yaml.safe_load(node_yaml.read_text(encoding="utf-8")) | {
                    "address": f"{cell.outer}:{box.port}"
                }
                node_yaml.write_text(yaml.safe_dump(there), encoding="utf-8")
                deployment.start_federation()
                deployment.start_site(SITE, only="agent")
                deployment.start_site(SITE, only="node", prefix=cell.prefix)
                wait_until(
                    lambda: (now := state_of(site))["agent"] and now["node"],
                    LIMIT_S,
                    "the site is up",
                    deployment.tails,
                )
                run_all(deployment, site)
                for part in ("node", "agent"):  # its farewell to the coordinator is on record too
                    deployment.end_process(f"{SITE}-{part}")
            finally:
                box.close()
            recording = box.recording
            yield Watched(
                deployment=deployment,
                recording=recording,
                values=values,
                routes=cell.routes(),
                box=(cell.outer, box.port),
                decoded=decode(recording.sent()),
            )
    finally:
        cell.close()


def run_all(deployment: Deployment, site: Path) -> None:
    alone = {"quorum": 1, "deadline_s": 60, "patience_s": 5}
    plan = deployed_plan(arms=["federated", "federated_dp"], federation=alone, training={"rounds": 1})
    deployment.run_start(plan, "whole")
    assert deployment.evaluation("whole")["status"] == "completed"
    policy, labels = site / "policy.yaml", labels_of(site)
    before = policy.read_text(encoding="utf-8")
    policy.write_text(f"{before}max_rounds: {NOTES['exception text, policy']}\n", encoding="utf-8")
    said = deployment.run_check(plan, status=4)
    assert said["sites"][SITE]["answer"] == "site-failure"
    policy.write_text(before, encoding="utf-8")
    lines = labels.read_text(encoding="utf-8").splitlines()
    file, _, *rest = lines[1].split(",")
    lines[1] = ",".join([file, NOTES["exception text, labels"], *rest])
    labels.write_text("\n".join(lines), encoding="utf-8")
    failing = deployed_plan(arms=["federated"], federation=alone, training={"rounds": 1}, seed=4)
    deployment.run_start(failing, "failing", status=1)
    log = (site / "state" / "site.log").read_text(encoding="utf-8")
    assert NOTES["exception text, policy"] in log  # the failures really quoted them, at home
    assert "row 2" in log  # of a cell it says where it is, never what is in it
    assert NOTES["exception text, labels"] not in log


def test_every_packet_went_to_the_box(watched: Watched) -> None:
    """The one route leads to the link's other end, and nothing but TCP to the box and ARP was on the link."""
    address, port = watched.box
    assert watched.routes.count("\n") == 0
    assert "via" not in watched.routes
    assert "default" not in watched.routes
    kinds = {kind[:3] for kind in watched.recording.packets if kind != ("arp",)}
    assert {kind[0] for kind in kinds} == {"tcp"}
    assert all(
        address in kind and str(port) in kind for kind in watched.recording.packets if kind != ("arp",)
    )


def test_only_the_fleet_routes_were_asked_for_and_nothing_was_packed(watched: Watched) -> None:
    assert all(request.path.startswith("/v1/fleet/") for request in watched.decoded.requests)
    assert not [request for request in watched.decoded.requests if "content-encoding" in request.headers]


def test_no_marker_left_the_hospital_in_any_form(watched: Watched) -> None:
    haystack = Haystack([*watched.recording.sent(), *watched.decoded.objects, *watched.decoded.parts])
    assert len(haystack.exact) > 100_000
    found = {marker: forms for marker in MARKERS if (forms := haystack.find(marker, watched.values[marker]))}
    assert not found


def test_a_marker_that_is_meant_to_be_sent_is_found(watched: Watched) -> None:
    """The control: the same search in the same recording sees what the operator did decide to tell."""
    assert "utf-8" in Haystack(watched.recording.sent()).find(MEANT_TO_BE_SENT, set())
    assert "utf-8" in Haystack(watched.decoded.parts).find(MEANT_TO_BE_SENT, set())


def test_no_secret_left_the_hospital(watched: Watched) -> None:
    site = watched.deployment.site(SITE)
    haystack = Haystack([*watched.recording.sent(), *watched.decoded.parts])
    pems = [
        (site / part).read_text(encoding="ascii").splitlines()[1]
        for part in ("state/signing.key", "node/node.key")
    ]
    site_key = bytes.fromhex((site / "state" / "site.key").read_text(encoding="ascii").strip())
    raws = [site_key, (site / "node" / "runtime.secret").read_bytes()]
    assert not [pem for pem in pems if pem.encode() in haystack.exact]
    assert not [raw for raw in raws if raw in haystack.exact or raw.hex().encode() in haystack.lower]


def test_nothing_about_the_machine_left_the_hospital(watched: Watched) -> None:
    haystack = Haystack([*watched.recording.sent(), *watched.decoded.parts])
    words = [str(watched.deployment.folder), f"{SITE}/", "Traceback", ".dcm", "site.yaml"]
    # a shorter one would be found by chance
    words += [name for name in [socket.gethostname()] if len(name) >= 6]
    assert not [word for word in words if word.encode().lower() in haystack.lower]


def test_the_sent_fields_are_the_literal_list(watched: Watched) -> None:
    assert watched.decoded.errors == []
    only_if_true = {"data_changed", "void", "nominal_tested"}  # not the case here: scored exactly
    of_noised_scores = {"SiteEvaluation": {"noise_multiplier", "epsilon", "delta"}}  # scored exactly here
    assert {
        kind: {frozenset(set(fields) - only_if_true - of_noised_scores.get(kind, set()))}
        for kind, fields in LEAVES_A_HOSPITAL.items()
    } == watched.decoded.fields


def test_the_operator_was_told_of_every_message(watched: Watched) -> None:
    """`site sent` lists what was seen on the wire, by hash: no more, no less."""
    listed = watched.deployment.json("site", "sent", "--site", watched.deployment.site(SITE))
    seen = [hashlib.sha256(sent.payload).hexdigest() for sent in watched.decoded.envelopes]
    assert sorted(line["sha256"] for line in listed) == sorted(seen)
    assert all(sent.signature for sent in watched.decoded.envelopes)
