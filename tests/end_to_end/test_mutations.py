"""100 000 seeded mutations of what others send or hand over: each is read, or refused by one line with a
code, in bounded time and memory, and nothing is written outside the folder at hand.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from client.agent.failures import SITE_FAILURE
from client.agent.verification import Guard
from client.data.inclusion import read_rules
from client.data.opt_outs import read_opt_outs
from client.importing.sheet import Files, Labelling, read_sheet
from client.labels.label_sheet import inspect_labels
from client.node.process import read_node
from client.predict.model import find_model
from client.simulation.injection import read_map
from client.site.config import read_site
from client.site.enrolment import coordinator_of
from client.site.policy import default_policy, read_policy
from common.counts import BINS, Counts
from common.enrolment import Kit, Request, read_kit, read_request, write_kit, write_request
from common.errors import FedqcError, RefusedError, RunError
from common.lineage import read_lineage
from common.model_file import load_model
from common.plan import read_plan
from common.signing import payload_sha256, public_text, sign
from common.weights import (
    decode_floats,
    decode_steps,
    dequantize_int8,
    encode_floats,
    encode_steps,
    quantize_int8,
)
from common.wire import (
    OUTGOING,
    Envelope,
    EvaluateTask,
    SiteDescription,
    SiteEvaluation,
    SiteReadiness,
    SiteUpdate,
    WireMessage,
    type_of,
)
from server.evaluation.report.page import write_report
from server.evaluation.table_check import check_table, read_table
from server.messaging.answer_checks import check_evaluation, check_update
from server.messaging.signatures import Question, Seal
from server.run.control_files import Order, order_path, read_order, write_order
from server.run.recompute import recompute
from server.run_folder import RunFolder, intact
from tests.helpers.answers import BASE_SHA256, SITE, SIZE, task, update
from tests.helpers.answers import PLAN as ANSWERED
from tests.helpers.attacked import Kind, Random, as_json, as_yaml, in_file, of_bytes, of_values, put
from tests.helpers.command_line import ROOT
from tests.helpers.consortium import Finished, tiny_values
from tests.helpers.enrolment import a_request
from tests.helpers.mutations import changed, label_workbook, mutated, mutated_archive, workbook
from tests.helpers.signed_site import EVALUATE, JSON, METHODS, PRIVATE, REHEARSE, TRAIN, decoded, question
from tests.helpers.site_agent import COORDINATOR, MANIFEST, OTHER, A, enrol

# --- messages, each signed by a party that is enrolled and lies


def message_bytes(message: WireMessage, rng: Random | None) -> bytes:
    """The bytes of a message in which the JSON text, an array or anything was changed."""
    good = message.to_bytes()
    if rng is None:
        return good
    if rng.random() < 0.3:
        return mutated(good, rng)
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    if rng.random() < 0.7:
        text = json.dumps(changed(json.loads(header["__metadata__"]["json"]), rng))
        header["__metadata__"]["json"] = (
            text if rng.random() < 0.9 else mutated(text.encode(), rng).decode("latin-1")
        )
    else:
        header = changed(header, rng)
    written = json.dumps(header).encode()
    if rng.random() < 0.2:
        body = mutated(body, rng)
    return len(written).to_bytes(8, "little") + written + body


def answers() -> dict[str, WireMessage]:
    artifacts = len(ANSWERED.model.labels)
    histograms = np.zeros((1, 2, artifacts, BINS), np.int64)
    histograms[0, 0, :, 240:250], histograms[0, 1, :, 230:240] = 3, 4
    scores = SiteEvaluation(
        site=SITE.site,
        run="r",
        models=("public",),
        mode="disclosed",
        histograms=histograms,
        covariance=np.diag(Counts(positives=histograms[0, 0], negatives=histograms[0, 1]).auroc_variance()),
    )
    ready = SiteReadiness(
        site=SITE.site,
        kind="hospital",
        nominal_patients=50,
        version="0",
        arms={"federated": "accept"},
        reasons={"federated_dp": "no budget"},
        evaluation="accept",
        data_prepared=True,
        rounds_affordable=3,
        seconds_a_round=1.5,
    )
    return {
        "SiteDescription": SITE,
        "SiteReadiness": ready,
        "SiteUpdate": update(True),
        "SiteEvaluation": scores,
    }


def to_coordinator(message: WireMessage) -> Kind:
    seal = Seal(plan_sha256=ANSWERED.sha256(), key=COORDINATOR, sites={SITE.site: OTHER.public_key()})
    asked = seal.question(REHEARSE, REHEARSE.to_bytes(), site=SITE.site)

    def make(rng: Random | None) -> bytes:
        payload = message_bytes(message, rng)
        said = asked.statement.model_copy(
            update={"kind": type_of(payload), "payload_sha256": payload_sha256(payload), "site": SITE.site}
        )
        text = json.dumps(json.loads(asked.statement.text()) | said.model_dump())
        if rng is not None and rng.random() < 0.1:
            text = json.dumps(changed(json.loads(text), rng))
        signed = sign(text.encode("utf-8", "replace"), OTHER)
        sent = Envelope(payload=payload, statement=text, signature=signed).to_bytes()
        return mutated(sent, rng) if rng is not None and rng.random() < 0.1 else sent

    return Kind(12_000, make, lambda sent: receive(seal, asked, sent))


def receive(seal: Seal, asked: Question, sent: bytes) -> None:
    """What the coordinator does with an answer of each kind."""
    payload = seal.open(Envelope.from_bytes(sent), asked)
    answer = {kind.__name__: kind for kind in OUTGOING}.get(type_of(payload), SiteDescription).from_bytes(
        payload
    )
    assert answer.to_bytes()
    if isinstance(answer, SiteUpdate):
        check_update(answer, task(True), BASE_SHA256, SITE, SIZE, ANSWERED)
    if isinstance(answer, SiteEvaluation):
        asked_for = EvaluateTask(
            run="r", models=("public",), everyone=False, weights=np.zeros((1, SIZE), np.float32)
        )
        check_evaluation(answer, asked_for, SITE, ANSWERED)


def to_site(site: Path, message: WireMessage, number: int) -> Kind:
    """Tasks of a coordinator whose key the site pinned: what it cannot read is a refusal with a code of its
    own, and no failure of the site.
    """
    guard, method = Guard(str(site)), METHODS[type(message).__name__]

    def make(rng: Random | None) -> tuple[str, bytes]:
        payload, plan = message_bytes(message, rng), JSON
        if rng is not None and rng.random() < 0.3:
            payload, plan = message.to_bytes(), json.dumps(changed(json.loads(JSON), rng))
        if rng is not None and rng.random() < 0.1:
            plan = mutated(JSON.encode(), rng).decode("latin-1")
        digest = payload_sha256(plan.encode("utf-8", "replace"))
        return plan, question(
            message, payload=payload, payload_sha256=payload_sha256(payload), plan_sha256=digest
        )

    def read(asked: tuple[str, bytes]) -> None:
        answer = decoded(Envelope.from_bytes(guard.answer(method, *asked)).payload)
        code = getattr(answer, "code", "")
        assert code != SITE_FAILURE, (site / "state" / "site.log").read_text(encoding="utf-8")[-3000:]
        if code:
            raise RefusedError("", code=code)

    return Kind(number, make, read)


def frames(rng: Random | None) -> tuple[int, np.ndarray]:
    drawn = rng or np.random.default_rng(0)
    steps = np.arange(-50, 50, dtype=np.int32)
    which = int(drawn.integers(0, 3))
    good = (encode_steps(steps), encode_floats(steps.astype(np.float32)), quantize_int8(steps, drawn)[0])[
        which
    ]
    content = good.tobytes() if rng is None else mutated(good.tobytes(), rng)
    return which, np.frombuffer(content, np.uint8)


def decode(frame: tuple[int, np.ndarray]) -> None:
    which, content = frame
    (decode_steps, decode_floats, dequantize_int8)[which](content, 100)


# --- files


def signed_file(
    folder: Path, paper: Request | Kit, write: Callable[..., None], read: Callable[[Path], object]
) -> Kind:
    """Requests and kits: the archive changed, or the text changed and signed again by who made it."""
    folder.mkdir()
    good, target = folder / "good.zip", folder / "now.zip"
    write(good, paper, COORDINATOR)
    content, values = good.read_bytes(), json.loads(paper.model_dump_json())

    def make(rng: Random | None) -> bytes:
        if rng is None or rng.random() < 0.5:
            return content if rng is None else mutated_archive(content, rng)
        target.unlink(missing_ok=True)
        written = json.dumps(changed(values, rng))
        write(target, _Written(written), COORDINATOR)
        return target.read_bytes()

    return Kind(6_000, make, in_file(target, read))


class _Written:
    """Stands where a paper is written: its text is given."""

    def __init__(self, text: str) -> None:
        self._text = text

    def model_dump_json(self, **_: object) -> str:
        return self._text


KIT = {
    "federation": "qc",
    "site": "hospital-a",
    "address": "qc.example.org:8443",
    "ca_certificate": "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n",
    "coordinator_key": public_text(COORDINATOR),
    "bundle_sha256": "ab" * 32,
    "site_key": public_text(OTHER),
    "version": "0.1.0",
    "expires": "2099-01-01",
}
NODE = {
    "site": A,
    "federation": "qc",
    "address": "qc.example.org:8443",
    "bundle_sha256": "ab" * 32,
    "runtime_port": 9000,
    "health_port": 9001,
    "agent_socket": "/srv/site/run/agent.sock",
}
COHORT = {
    "ethics_approval": "2026-17",
    "consent_basis": "broad consent",
    "include": {
        "study_date": {"first": "2020-01-01", "last": "2024-12-31"},
        "age_years": {"min": 18.0, "max": 90.0},
        "body_part": ["HEAD"],
    },
    "exclude": {"series_description": ["LOC"]},
    "opt_out": ["P1", "P2"],
}
SHEET = b"file,patient,label,severity,reader,split\na.png,P1,metal,0.5,R 1,train\nb.png,P2,clean,,R 2,test\n"
OPT_OUTS = "PatientID;Datum\nP-100;2024-01-02\n00123;\n病人7;\n".encode()


OPT_OUT_ROWS = [["PatientID", "Datum"], ["P-100", "2024-01-02"], [123, ""], ["病人7", ""]]
TABLE = b"""table,row,n,positives,tp,fn,fp,tn,sensitivity,specificity,precision,f1,accuracy
main,a,100,40,30,10,5,55,0.75,0.917,0.857,0.8,0.85
main,b,100,40,35,5,,,87.5%,,,,
"""


def files(folder: Path, site: Path) -> dict[str, Kind]:
    """What people write or hand over on paper's behalf: settings, enrolment, sheets."""
    plan, policy = tiny_values(arms=["federated", "federated_dp"]), default_policy("hospital")
    settings = yaml.safe_load((site / "site.yaml").read_text(encoding="utf-8"))
    hospitals = yaml.safe_load((ROOT / "configs" / "real_hospitals.yaml").read_text(encoding="utf-8"))
    made = site.parent / "made"
    made.mkdir()

    def yamls(name: str, number: int, values: Any, read: Callable[[Path], object]) -> Kind:
        return Kind(number, of_values(values, as_yaml), in_file(made / name, read))

    def labels(path: Path) -> None:
        inspect_labels(path, key=bytes(32))

    def sheet(path: Path) -> None:
        read_sheet(
            path,
            Files(["a.png", "b.png"]),
            Labelling(column="", artifact="", present_from=None, absent_to=None),
        )

    csv = (site / "labels.csv").read_bytes()[:2000].rpartition(b"\n")[0] + b"\n"
    pinned = json.loads((site / "state" / "coordinator.json").read_bytes())
    request = a_request("hospital-a", signing=COORDINATOR)
    return {
        "plan.yaml": yamls("plan.yaml", 5_000, plan, read_plan),
        "policy.yaml": yamls("policy.yaml", 4_000, policy.model_dump(mode="json"), read_policy),
        "site.yaml": yamls("site.yaml", 4_000, settings, read_site),
        "cohort.yaml": yamls("cohort.yaml", 4_000, COHORT, lambda path: read_rules(path.parent)),
        "node.yaml": yamls("node.yaml", 4_000, NODE, lambda path: read_node(path.parent)),
        "map.yaml": yamls("map.yaml", 1_000, hospitals, read_map),
        "coordinator.json": Kind(
            2_000,
            of_values(pinned, as_json),
            in_file(made / "coordinator.json", lambda path: coordinator_of(path.parent)),
        ),
        "request.zip": signed_file(folder / "request", request, write_request, read_request),
        "kit.zip": signed_file(folder / "kit", Kit.model_validate_json(json.dumps(KIT)), write_kit, read_kit),
        "labels.csv": Kind(6_000, of_bytes(csv), in_file(made / "labels.csv", labels)),
        "labels.xlsx": Kind(
            6_000, of_bytes(label_workbook(), mutated_archive), in_file(made / "l.xlsx", labels)
        ),
        "sheet.csv": Kind(3_000, of_bytes(SHEET), in_file(made / "sheet.csv", sheet)),
        "table.csv": Kind(
            1_000, of_bytes(TABLE), in_file(made / "t.csv", lambda path: check_table(read_table(path)))
        ),
        "opt-outs.csv": Kind(3_000, of_bytes(OPT_OUTS), in_file(made / "o.csv", read_opt_outs)),
        "opt-outs.xlsx": Kind(
            3_000, of_bytes(workbook(OPT_OUT_ROWS), mutated_archive), in_file(made / "o.xlsx", read_opt_outs)
        ),
    }


def run_files(folder: Path, run: Path) -> dict[str, Kind]:
    """Of a run folder that somebody else made, and models."""

    def kind(name: str, number: int, read: Callable[[Path], object]) -> Kind:
        path = run / name
        good = path.read_bytes()

        def put(content: bytes) -> None:
            path.write_bytes(content)
            try:
                read(run)
            finally:
                path.write_bytes(good)

        values = None if path.suffix in (".safetensors", ".answer", ".jsonl") else json.loads(good)
        make = of_bytes(good) if values is None else of_values(values, as_json)
        return Kind(number, make, put)

    write_order(folder, "1", Order())
    model = (run / "arms" / "federated" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(model[:8], "little")

    def of_model(rng: Random | None) -> bytes:  # damage to numbers alone is found by nobody
        if rng is None:
            return model
        if rng.random() < 0.5:
            return mutated(model[:header], rng) + model[header:]
        text = json.dumps(changed(json.loads(model[8:header]), rng)).encode()
        return len(text).to_bytes(8, "little") + text + model[header:]

    def of_path(path: Path) -> None:
        failure: FedqcError | None = None
        for read in (
            read_lineage,
            lambda one: find_model(str(one), None),
            lambda one: load_model(one, MANIFEST),
        ):
            try:
                read(path)
            except FedqcError as refused:
                failure = refused
        if failure:
            raise failure

    def report(path: Path) -> None:
        with intact(path):
            write_report(RunFolder.open(path))

    return {
        "evaluation.json": kind("evaluation.json", 4_000, lambda path: RunFolder.open(path).evaluation),
        "manifest.json": kind("manifest.json", 3_000, lambda path: RunFolder.open(path).manifest),
        "order.json": Kind(
            2_000,
            of_values(Order(sites=("a", "b")).model_dump(mode="json"), as_json),
            in_file(order_path(folder, "1"), lambda _: read_order(folder, "1")),
        ),
        "model.safetensors": Kind(4_000, of_model, in_file(folder / "m.safetensors", of_path)),
        "report of evaluation.json": kind("evaluation.json", 300, report),
        "report of manifest.json": kind("manifest.json", 200, report),
        "verify of an answer": kind("arms/federated/answers/round-0001/hospital-a.answer", 100, verified),
        "verify of rounds.jsonl": kind("arms/federated/rounds.jsonl", 100, verified),
        "verify of evaluation.json": kind("evaluation.json", 100, verified),
    }


def verified(run: Path) -> None:
    with intact(run):
        findings = recompute(RunFolder.open(run))
    if wrong := [finding.detail for finding in findings if finding.holds is False]:
        raise RunError(wrong[0], code="not-recomputed")


@pytest.fixture
def kinds(tmp_path: Path, data: Path, finished: Finished) -> dict[str, Kind]:
    """Every kind, by name; all their files lie below `tmp_path`."""
    site = data / A
    enrol(site)
    run = Path(shutil.copytree(finished.out, tmp_path / "run"))
    return {
        **{f"{name}, to the coordinator": to_coordinator(message) for name, message in answers().items()},
        "DescribeTask, to a site": to_site(site, REHEARSE, 1_000),
        "TrainTask, to a site": to_site(site, TRAIN, 1_000),
        "private TrainTask, to a site": to_site(site, PRIVATE, 1_000),
        "EvaluateTask, to a site": to_site(site, EVALUATE, 1_000),
        "frame": Kind(10_000, frames, decode),
        **files(tmp_path, site),
        **run_files(tmp_path, run),
    }


@pytest.fixture
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("_inside")
def test_a_few_mutations_of_every_kind_are_read_or_refused(kinds: dict[str, Kind]) -> None:
    for number, (name, kind) in enumerate(kinds.items()):
        told = put(kind, min(30, kind.number // 20), number)
        print(name, dict(told))


@pytest.mark.slow
@pytest.mark.usefixtures("_inside")
def test_a_hundred_thousand_mutations_are_read_or_refused(kinds: dict[str, Kind]) -> None:
    assert sum(kind.number for kind in kinds.values()) >= 100_000
    for number, (name, kind) in enumerate(kinds.items()):
        began = time.process_time()
        told = put(kind, kind.number, 1_000 + number)
        print(f"{name}: {kind.number}, {time.process_time() - began:.0f} s, {dict(told)}", flush=True)
        assert set(told) - {"read"}, f"{name}: nothing was ever refused"
