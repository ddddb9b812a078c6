"""Pictures and a workbook in the layout of a publication go all the way to a report, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command_line import ROOT, fedqc
from tests.helpers.public_collections import grey, save, write_xlsx

PATIENTS = 8  # at each hospital


def with_ghosts(image: np.ndarray) -> np.ndarray:
    """A head that moved: copies of it along an axis."""
    ghosts = sum(np.roll(image.astype(float), step, axis=0) for step in (-14, -7, 7, 14))
    return np.clip(0.7 * image + 0.15 * ghosts, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.jpg, 2.jpg, …, every second patient moved; labels.xlsx with patient id, hospital, gestational age,
    plane, key slice, label and the list of test images.
    """
    root = tmp_path_factory.mktemp("publication")
    rows: list[list[object]] = [
        ["image", "patient id", "hospital", "GA", "plane", "key slice", "label", "split"]
    ]
    for patient in range(2 * PATIENTS):
        hospital, moved = ("First", "Second")[patient // PATIENTS], patient % 2
        part = "test" if patient % PATIENTS < 4 else "train"
        for plane in ("axial", "coronal"):
            image = grey(3 * patient + len(plane), patient % 3)
            number = len(rows)
            save(root / "images" / f"{number}.jpg", with_ghosts(image) if moved else image, quality=95)
            rows.append([number, patient, hospital, 19 + patient % 20, plane, 1, moved, part])
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
    plan = ROOT / "configs" / "plans" / "imported.yaml"
    ran = fedqc("simulate", plan, "--data", data, "--out", run, "--jobs", 1, "--format", "json")
    assert ran.returncode == 0, ran.stderr
    written = fedqc("report", run)
    assert written.returncode == 0, written.stderr
    page = (run / "report.html").read_text(encoding="utf-8")
    assert {"first", "second", "motion"} <= set(page.replace(">", " ").replace("<", " ").split())
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for arm in ("public", "local", "federated"):
        assert 0 <= evaluation["headline"][arm]["home"] <= 1
    for site in ("first", "second"):  # the publication's own list of test images
        motion = evaluation["matrix"]["federated"][site]["motion"]
        assert (motion["n_pos"], motion["n_neg"]) == (2, 2)
    assert "not private" in page.lower()
