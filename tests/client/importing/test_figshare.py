"""MATLAB 7.3 files of the figshare set: image, patient and tumour are read, nothing of other files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
import pytest

from client.dicom.dicom import read_header, read_pixels
from client.site.config import read_site
from tests.helpers.command_line import typed
from tests.helpers.injected import mr_slice
from tests.helpers.public_collections import about, save_mat, write_csv

Capture = pytest.CaptureFixture[str]


def ran(capsys: Capture, src: Path, out: Path, *more: object) -> tuple[object, str, str]:
    return typed(capsys, "data", "import", "mat", src, out, "--collection", "Cheng, CC BY 4.0", *more)


def imported(capsys: Capture, src: Path, out: Path, *more: object) -> dict[str, Any]:
    code, said, talk = ran(capsys, src, out, "--format", "json", *more)
    assert code == 0, talk
    report: dict[str, Any] = json.loads(said)
    return report


def picture(number: int = 0) -> np.ndarray:
    """Rows and columns differ, so that a transposed image is seen."""
    return mr_slice(number, 0)[:40, :].astype(np.int16)


def test_slices_of_patients_without_labels(tmp_path: Path, capsys: Capture) -> None:
    src = tmp_path / "src"
    save_mat(src / "1.mat", picture(1), "100360", 1)
    save_mat(src / "2.mat", picture(2), "100360", 1)
    save_mat(src / "3.mat", np.pad(picture(3), ((0, 472), (0, 512 - picture().shape[1]))), "MR017260F", 3)
    with h5py.File(src / "cvind.mat", "w") as file:  # the set's list of folds
        file["cvind"] = np.ones((1, 3))
    report = imported(capsys, src, tmp_path / "out")
    assert report["left_out"] == {"no-cjdata": 1}
    assert report["sites"][0] | {"labels": {}} == {
        "site": "src",
        "patients": 2,
        "images": 3,
        "modalities": {"MR": 3},
        "labels": {},
    }
    site = tmp_path / "out" / "src"
    assert read_site(site)[0].labels == "none"
    lines = about(site)
    assert lines["3.mat"]["about"] == {"tumour": "pituitary tumor"}
    path = site / "images" / lines["1.mat"]["file"]
    header = read_header(path)
    assert np.array_equal(read_pixels(path), picture(1))
    assert (header.patient_id, header.body_part, header.imported) == ("100360", "BRAIN", True)
    assert (header.pixel_spacing_mm, header.slice_thickness_mm) == (None, 6.0)  # stated of 512 pixels only
    full = read_header(site / "images" / lines["3.mat"]["file"])
    assert (full.patient_id, full.pixel_spacing_mm) == ("MR017260F", (0.49, 0.49))
    assert pydicom.dcmread(path).ContrastBolusAgent == "Gd-DTPA"


def test_a_sheet_may_label_them(tmp_path: Path, capsys: Capture) -> None:
    src = tmp_path / "src"
    for number in range(2):
        save_mat(src / f"{number}.mat", picture(number), str(number))
    sheet = write_csv(tmp_path / "s.csv", [["file", "motion"], ["0.mat", 1], ["1", 0]])
    report = imported(capsys, src, tmp_path / "out", "--labels", sheet)
    assert report["sites"][0]["labels"] == {"motion": {"present": 1, "absent": 1}}


def test_what_is_damaged_or_leads_elsewhere(tmp_path: Path, capsys: Capture) -> None:
    """HDF5 may point into other files: nothing outside the file is read."""
    src = tmp_path / "src"
    good = save_mat(src / "good.mat", picture())
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["image"] = picture(5)
    (src / "cut.mat").write_bytes(good.read_bytes()[:3000])
    (src / "old.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b" " * 109 + b"\0\1IM")
    changes: dict[str, Any] = {
        "link.mat": h5py.ExternalLink(secret, "/image"),
        "flat.mat": np.zeros((2, 2, 2), np.int16),
        "nan.mat": np.full((8, 8), np.nan),
        "huge.mat": None,
        "none.mat": "",
    }
    for name, image in changes.items():
        path = save_mat(src / name, picture())
        with h5py.File(path, "r+") as file:
            del file["cjdata/image"]
            if image is None:
                file["cjdata"].create_dataset("image", (10**5, 10**5), np.int16)
            elif not isinstance(image, str):
                file["cjdata/image"] = image
    path = save_mat(src / "outside.mat", picture())
    with h5py.File(path, "r+") as file:
        del file["cjdata/image"]
        file["cjdata"].create_dataset("image", (8, 8), np.uint8, external=[(str(secret), 0, 64)])
    code, said, talk = ran(capsys, src, tmp_path / "out")
    assert (code, said, len(talk.splitlines())) == (2, "", 2)
    assert not (tmp_path / "out").exists()
    report = imported(capsys, src, tmp_path / "out", "--accept-quarantine")
    assert {one["file"]: one["code"] for one in report["not_imported"]} == {
        "cut.mat": "unreadable",
        "link.mat": "unreadable",
        "outside.mat": "unreadable",
        "none.mat": "unreadable",
        "flat.mat": "bad-geometry",
        "nan.mat": "non-finite",
        "huge.mat": "too-large",
    }
    assert report["left_out"] == {"no-cjdata": 1}
    assert report["sites"][0]["images"] == 1


def test_without_the_library_the_command_that_installs_it(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = save_mat(tmp_path / "src" / "1.mat", picture()).parent
    monkeypatch.setitem(sys.modules, "h5py", None)
    code, _, talk = ran(capsys, src, tmp_path / "out")
    assert (code, "[missing-extra]" in talk, "pip install 'fedqc[import]'" in talk) == (2, True, True)
