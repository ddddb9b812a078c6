"""A site of public images becomes the coordinator's public set, and a run is measured and chosen by it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml

from client.data.cohort import load_cohort
from client.data.series import series_of_records
from common.artifacts import INDEX
from common.errors import ConfigError
from common.losses import masked_bce
from common.model_file import load_model
from common.models import build
from common.plan import RunPlan
from common.public_slices import Slices, load_slices
from common.weights import manifest_of, unflatten
from server.public_model.public_set import measure
from server.run.conduct import check_names
from server.run_folder import RunFolder
from tests.helpers.command_line import typed
from tests.helpers.consortium import SIZE, Consortium, settle, tiny_plan, write_plan

REAL = os.environ.get("FEDQC_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")


def public_set_of(
    site: Path, out: Path, capsys: pytest.CaptureFixture[str], plan: Path | None = None
) -> dict[str, Any]:
    words = ["--plan", plan] if plan else []
    status, said, err = typed(
        capsys, "data", "prepare", site, "--public-set", out, *words, "--format", "json"
    )
    assert status == 0, err
    found: dict[str, Any] = json.loads(said)["public_set"]
    return found


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "tiny.yaml")


def test_it_holds_the_labelled_slices_and_no_name(
    data: Path, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = data / "hospital-d"
    cohort = load_cohort(site, size=SIZE)
    written = public_set_of(site, tmp_path / "public.safetensors", capsys, plan_file)
    found = load_slices(Path(written["file"]), written["sha256"], SIZE)
    series, order, _ = series_of_records(cohort.records)
    assert found.series is not None
    assert np.array_equal(found.series, series[order])
    assert np.array_equal(found.images, cohort.images[order])
    assert np.array_equal(found.labels, cohort.labels[order], equal_nan=True)
    assert np.array_equal(found.patients, cohort.patients[order])
    assert (written["slices"], written["patients"]) == (len(cohort.images), len(set(cohort.patients)))
    content = Path(written["file"]).read_bytes()
    for record in cohort.records:
        assert record.patient.encode() not in content


def test_images_of_a_hospital_stay_where_they_are(
    data: Path, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(data / "hospital-a", kind="hospital")
    out = tmp_path / "public.safetensors"
    words = ("data", "prepare", data / "hospital-a", "--plan", plan_file, "--public-set", out)
    status, _, err = typed(capsys, *words)
    assert status == 2
    assert "[not-public]" in err
    assert not out.exists()


def test_a_site_that_only_says_it_is_public_is_refused(
    data: Path, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = next(path for path in sorted((data / "hospital-a" / "images").rglob("*")) if path.is_file())
    dataset = pydicom.dcmread(other)
    dataset.file_meta.ImplementationVersionName = "ACME"
    dataset.save_as(other)
    out = tmp_path / "public.safetensors"
    words = ("data", "prepare", data / "hospital-a", "--plan", plan_file, "--public-set", out)
    status, _, err = typed(capsys, *words)
    assert (status, "[kind-undeclared]" in err, out.exists()) == (4, True, False)


def test_nothing_is_overwritten(
    data: Path, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "public.safetensors"
    out.write_bytes(b"mine")
    words = ("data", "prepare", data / "hospital-a", "--plan", plan_file, "--public-set", out)
    status, _, err = typed(capsys, *words)
    assert (status, "[output-exists]" in err, out.read_bytes()) == (2, True, b"mine")


def test_it_prints_what_a_plan_needs(
    data: Path, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "public.safetensors"
    _, said, _ = typed(
        capsys, "data", "prepare", data / "hospital-d", "--plan", plan_file, "--public-set", out
    )
    values = yaml.safe_load(said.partition("in a plan:\n")[2])
    plan = tiny_plan(**values)
    check_names(plan)
    assert plan.public_set.file == str(out)
    other = tmp_path / "other"
    other.write_bytes(out.read_bytes() + b" ")
    with pytest.raises(ConfigError) as caught:
        check_names(tiny_plan(public_set=values["public_set"] | {"file": str(other)}))
    assert caught.value.code == "wrong-public-set"


def scores_of(run: RunFolder, plan: RunPlan, slices: Slices) -> list[dict[str, float]]:
    """Every round's model of `federated`, measured again on the slices of the file."""
    network = build("small_cnn")
    manifest, arm, found = manifest_of(network.state_dict()), run.arm("federated"), []
    for number in range(1, plan.training.rounds + 1):
        network.load_state_dict(unflatten(load_model(arm.checkpoint_path(number), manifest), manifest))
        found.append(measure(network, slices, masked_bce))
    return found


def test_a_run_is_measured_on_the_file_after_every_round(
    consortium: Consortium, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = public_set_of(consortium.data / "hospital-d", tmp_path / "public", capsys, plan_file)
    named = {"file": written["file"], "sha256": written["sha256"]}
    training = {"rounds": 2, "choose_round": "public"}
    plan = tiny_plan(arms=["public", "federated"], public_set=named, training=training)
    run = consortium.conduct(plan, tmp_path / "run")
    slices = load_slices(Path(written["file"]), written["sha256"], SIZE)
    measured = scores_of(run, plan, slices)
    assert [record["public"] for record in run.arm("federated").rounds()] == measured
    best = max(range(2), key=lambda place: measured[place]["auroc"]) + 1
    assert run.evaluation["chosen_rounds"] == {"federated": best}
    assert RunFolder.open(run.path).plan == plan


@needs_real_data
def test_a_run_is_measured_on_real_slices(
    consortium: Consortium, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two people: one who moved in one of two scans, and one at another scanner who did not."""
    folders, site = ("site_mr_siemens_trio_usc", "site_mr_ge_signa_uthscsa"), tmp_path / "real"
    rows = ["file,motion"]
    with (Path(str(REAL)) / "labels_eyeballed.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["file"].partition("/")[0] in folders:
                to = site / "images" / row["file"]
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(str(REAL)) / row["file"], to)
                rows.append(f"{row['file']},{int(row['label'] == 'mri_motion')}")
    (site / "labels.csv").write_text("\n".join(rows) + "\n")
    why = {"by": "me", "at": "2026-01-01", "why": "an open collection", "images": "images"}
    values = {"name": "open", "kind": "public", "cohort": "open", "nominal_patients": 50}
    (site / "site.yaml").write_text(yaml.safe_dump(values | {"declared_not_hospital": why}))
    written = public_set_of(site, tmp_path / "public", capsys, plan_file)
    assert written["slices"] > len(rows)  # a mosaic is many slices
    assert written["patients"] == 2
    slices = load_slices(Path(written["file"]), written["sha256"], SIZE)
    assert np.isnan(np.delete(slices.labels, INDEX["motion"], axis=1)).all()
    assert {*slices.labels[:, INDEX["motion"]]} == {0, 1}
    named = {"file": written["file"], "sha256": written["sha256"]}
    plan = tiny_plan(arms=["public", "federated"], public_set=named)
    run = consortium.conduct(plan, tmp_path / "run")
    assert [record["public"] for record in run.arm("federated").rounds()] == scores_of(run, plan, slices)
    assert run.evaluation["curves"]["federated"][0]["auroc"] is not None
