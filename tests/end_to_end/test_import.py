"""Pictures and a workbook in the layout of a publication go all the way to a report, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.physics.appearance import SITE_APPEARANCES
from common.physics.phantom import draw_patients
from tests.helpers.command_line import ROOT, fedqc
from tests.helpers.public_collections import save, write_xlsx

PATIENTS = 16


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.jpg, 2.jpg, …; labels.xlsx with patient id, hospital, gestational age, plane, key slice, label."""
    root = tmp_path_factory.mktemp("publication")
    rows: list[list[object]] = [["image", "patient id", "hospital", "GA", "plane", "key slice", "label"]]
    patient = 0
    for hospital, appearance in zip(("First", "Second"), SITE_APPEARANCES, strict=False):
        for slices in draw_patients(appearance, PATIENTS, 5):
            patient += 1
            for item in slices:
                if item.modality == "MR":
                    image = np.asarray(item.image, float)
                    eight_bits = (255 * np.clip(image / np.percentile(image, 99.5), 0, 1)).astype(np.uint8)
                    save(root / "images" / f"{len(rows)}.jpg", eight_bits, quality=95)
                    label = int(item.labels.get("motion", 0))
                    rows.append([len(rows), patient, hospital, 19 + patient % 20, "axial", 1, label])
    write_xlsx(root / "labels.xlsx", rows)
    return root


def test_pictures_and_a_workbook_to_a_report(collection: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    words = ["--labels", collection / "labels.xlsx", "--label", "motion", "--modality", "MR"]
    said = fedqc(
        *(
            "data",
            "import",
            "pictures",
            collection / "images",
            data,
            "--collection",
            "layout of a paper",
            *words,
        )
    )
    assert said.returncode == 0, said.stderr
    assert said.stderr == ""
    assert "columns not used: GA, plane, key slice" in said.stdout
    checked = fedqc("data", "check", data / "first", "--format", "json")
    assert checked.returncode == 0, checked.stderr
    assert {finding["code"] for finding in json.loads(checked.stdout)["findings"]} >= {"lossy-used"}
    plan = ROOT / "configs" / "plans" / "imported.yaml"
    ran = fedqc("simulate", plan, "--data", data, "--out", run, "--threads", 1, "--format", "json")
    assert ran.returncode == 0, ran.stderr
    written = fedqc("report", run)
    assert written.returncode == 0, written.stderr
    page = (run / "report.html").read_text(encoding="utf-8")
    assert {"first", "second", "motion"} <= set(page.replace(">", " ").replace("<", " ").split())
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert set(evaluation["headline"]) >= {"public", "local", "federated"}
    homes = [evaluation["headline"][arm]["home"] for arm in ("public", "local", "federated")]
    assert all(0 <= home <= 1 for home in homes)  # each site has test patients with and without motion
    assert "not private" in page.lower()
