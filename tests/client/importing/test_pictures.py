"""Pictures with a sheet become site folders; what a picture cannot say is asked for, not guessed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from client.data.cohort import load_cohort, open_slices
from client.dicom.dicom import read_header, read_pixels
from client.importing.collection import EVERY_IMAGE_A_PATIENT
from client.importing.pictures import natural
from client.labels.label_sheet import read_labels
from client.site.config import read_site
from client.site.kind import admit_kind
from common.artifacts import INDEX
from common.errors import RefusedError
from tests.helpers.command_line import typed
from tests.helpers.consortium import settle
from tests.helpers.public_collections import about, grey, rows_of, save, write_csv, write_xlsx

Capture = pytest.CaptureFixture[str]
SAYS = ("--collection", "tiny, CC0")


def folder_of(root: Path, count: int = 6) -> Path:
    for number in range(1, count + 1):
        save(root / f"{number}.png", grey(number))
    return root


def imported(capsys: Capture, src: Path, out: Path, *more: object) -> dict[str, Any]:
    code, said, talk = typed(capsys, "data", "import", "pictures", src, out, *SAYS, "--format", "json", *more)
    assert code == 0, talk
    report: dict[str, Any] = json.loads(said)
    return report


def refused(capsys: Capture, src: Path, out: Path, *more: object) -> tuple[str, str]:
    """The code and the line of an error; nothing is left behind."""
    code, said, talk = typed(capsys, "data", "import", "pictures", src, out, *SAYS, *more)
    assert code == 2, talk
    assert said == ""
    lines = talk.splitlines()
    assert len(lines) == 2, talk
    assert lines[1].startswith("fedqc: hint: ")
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))
    return lines[0].partition("[")[2].partition("]")[0], talk


def test_a_sheet_with_a_column_an_artifact(tmp_path: Path, capsys: Capture) -> None:
    sheet = write_csv(
        tmp_path / "s.csv",
        [
            ["file", "patient", "site", "motion", "motion_severity", "part", "pixel_spacing_mm", "GA"],
            ["1.png", "A-1", "North", 1, 0.5, "train", 0.8, 31],
            ["2.png", "A-1", "North", 0, "", "train", 0.8, 31],
            ["3.png", "A-2", "North", "", "", "test", "", ""],
            ["4.png", "B-1", "Süd & Ost", 0, "", "val", "", 20],
        ],
    )
    src, out = folder_of(tmp_path / "src"), tmp_path / "out"
    report = imported(capsys, src, out, "--labels", sheet, "--modality", "MR")
    assert [(site["site"], site["patients"], site["images"]) for site in report["sites"]] == [
        ("north", 2, 3),
        ("sud-ost", 1, 1),
    ]
    assert report["left_out"] == {"not-in-sheet": 2}
    assert report["columns_not_used"] == ["GA"]
    assert json.loads((out / "import.json").read_text()) == report
    first = about(out / "north")["1.png"]
    assert (first["patient"], first["about"]) == ("A-1", {"GA": "31"})
    path = out / "north" / "images" / first["file"]
    header = read_header(path)
    assert (header.patient_id, header.pixel_spacing_mm, header.imported) == ("A-1", (0.8, 0.8), True)
    assert np.array_equal(read_pixels(path), grey(1))
    table = read_labels(out / "north" / "labels.csv")
    row = next(row for row in table.rows if row.key.file == first["file"])
    assert (row.present[INDEX["motion"]], row.severity[INDEX["motion"]], row.part) == (1.0, 0.5, "train")
    assert read_labels(out / "sud-ost" / "labels.csv").rows[0].part == "validation"
    cohort = load_cohort(out / "north")
    assert (len(cohort.records), int(cohort.patients.max()) + 1) == (3, 2)


def test_the_layout_of_a_publication(tmp_path: Path, capsys: Capture) -> None:
    """JPEG by number; a workbook with patient, gestational age, plane, key slice, one column of 1 and 0."""
    src = tmp_path / "src"
    for number in range(1, 5):
        save(src / f"{number}.jpg", grey(number))
    titles = ["image", "patient id", "GA", "plane", "key slice", "label"]
    rows = [[n, 100 + n // 2, 24, "axial", 1, int(n > 2)] for n in range(1, 5)]
    sheet = write_xlsx(tmp_path / "s.xlsx", [titles, *rows])
    report = imported(
        capsys, src, tmp_path / "out", "--labels", sheet, "--label", "motion", "--modality", "MR"
    )
    assert report["sites"][0]["labels"] == {"motion": {"present": 2, "absent": 2}}
    assert report["columns_not_used"] == ["GA", "plane", "key slice"]
    site = tmp_path / "out" / "src"
    assert {line["patient"] for line in about(site).values()} == {"100", "101", "102"}
    dataset = pydicom.dcmread(next((site / "images").iterdir()))
    assert (dataset.LossyImageCompression, dataset.LossyImageCompressionMethod) == ("01", "ISO_10918_1")
    assert "lossy: use" in (site / "cohort.yaml").read_text()
    assert len(load_cohort(site).records) == 4
    (site / "cohort.yaml").unlink()  # the rule of the project holds for them as for every image
    codes = {problem.code for problem in left_out_of(site)}
    assert codes == {"lossy"}


def left_out_of(site: Path) -> Sequence[Any]:
    return open_slices(site).slices.intake.excluded


def test_a_jpeg_by_another_name_is_one(tmp_path: Path, capsys: Capture) -> None:
    src = folder_of(tmp_path / "src", 1)
    save(tmp_path / "a.jpg", grey(2)).rename(src / "2.png")
    imported(capsys, src, tmp_path / "out", "--modality", "MR", "--every-image-a-patient")
    site = tmp_path / "out" / "src"
    lossy = {
        source: read_header(site / "images" / line["file"]).lossy for source, line in about(site).items()
    }
    assert lossy == {"1.png": False, "2.png": True}


def test_several_readers_of_one_picture(tmp_path: Path, capsys: Capture) -> None:
    """Who read what goes to the site, whose rule settles it."""
    rows: list[list[object]] = [
        ["file", "patient", "阅片人", "运动伪影"],
        ["1", "a", "Li", "是"],
        ["1", "a", "Wu", "否"],
        ["2", "b", "Li", 0],
    ]
    sheet = write_csv(tmp_path / "s.csv", [*rows, ["2", "b", "Wu", 0]])
    imported(capsys, folder_of(tmp_path / "src", 2), tmp_path / "out", "--labels", sheet, "--modality", "MR")
    site = tmp_path / "out" / "src"
    assert [row["reader"] for row in rows_of(site)] == ["Li", "Wu"] * 2
    motion = load_cohort(site).labels[:, INDEX["motion"]]
    assert (int(np.isnan(motion).sum()), int((motion == 0).sum())) == (1, 1)  # disputed, settled


def test_artifacts_by_name_in_one_column(tmp_path: Path, capsys: Capture) -> None:
    """Assessed is what the column names anywhere; a blank cell is not assessed."""
    rows = [["1", "a", "motion"], ["2", "a", "Motion + 磁敏感伪影"], ["3", "b", "clean"], ["4", "b", ""]]
    sheet = write_csv(tmp_path / "s.csv", [["name", "patient", "class"], *rows])
    src = folder_of(tmp_path / "src", 4)
    assert (
        refused(capsys, src, tmp_path / "out", "--labels", sheet, "--modality", "MR")[0] == "labels-missing"
    )
    sheet = write_csv(tmp_path / "s.csv", [["file", "patient", "class"], *rows])
    imported(capsys, src, tmp_path / "out", "--labels", sheet, "--modality", "MR")
    site = tmp_path / "out" / "src"
    found = {row["file"]: (row["motion"], row["susceptibility"]) for row in rows_of(site)}
    by_picture = {source: found[line["file"]] for source, line in about(site).items()}
    assert by_picture == {
        "1.png": ("1", "0"),
        "2.png": ("1", "1"),
        "3.png": ("0", "0"),
        "4.png": ("", ""),
    }
    assert "chemical_shift" not in rows_of(site)[0]


def test_a_score_becomes_an_answer_where_the_person_says_from_where(tmp_path: Path, capsys: Capture) -> None:
    rows = [[f"{n}.png", f"p{n}", n] for n in (1, 2, 3)]
    sheet = write_csv(tmp_path / "s.csv", [["file", "patient", "score"], *rows])
    src, words = (
        folder_of(tmp_path / "src", 3),
        ("--modality", "MR", "--label", "motion", "--label-column", "score"),
    )
    for number, (limits, expected) in enumerate(
        (
            (("--present-from", 2), ["0", "1", "1"]),
            (("--present-from", 3, "--absent-to", 1), ["0", "", "1"]),
        )
    ):
        out = tmp_path / f"out{number}"
        imported(capsys, src, out, "--labels", sheet, *words, *limits)
        assert [row["motion"] for row in rows_of(out / "src")] == expected
    code, _ = refused(capsys, src, tmp_path / "out", "--labels", sheet, *words)
    assert code == "bad-label"  # 2 and 3 are neither 1 nor 0


def test_ct_needs_the_window_and_keeps_the_picture(tmp_path: Path, capsys: Capture) -> None:
    image = np.linspace(0, 255, 400).reshape(20, 20).astype(np.uint8)
    src = save(tmp_path / "src" / "a.png", image).parent
    words = ("--modality", "CT", "--every-image-a-patient")
    code, _ = refused(capsys, src, tmp_path / "out", *words)
    assert code == "not-hounsfield"
    imported(capsys, src, tmp_path / "out", *words, "--window", 40, 400)
    site = tmp_path / "out" / "src"
    path = next((site / "images").iterdir())
    hu = read_pixels(path)
    assert (hu.min(), hu.max()) == (-160.0, 240.0)
    assert np.abs(hu - (image / 255.0 * 400 - 160)).max() < 1e-3
    assert np.array_equal(pydicom.dcmread(path).pixel_array, image)  # lossless
    assert read_site(site)[0].stand_in == EVERY_IMAGE_A_PATIENT
    for window in ((40, 0), (0, 1e9)):
        assert refused(capsys, src, tmp_path / "o", *words, "--window", *window)[0] == "bad-argument"


def test_sixteen_bits_grey_in_colour_and_what_is_no_grey_picture(tmp_path: Path, capsys: Capture) -> None:
    src = tmp_path / "src"
    deep = grey(1).astype(np.uint16) * 200
    save(src / "deep.png", deep)
    save(src / "rgb.png", np.repeat(grey(2)[..., None], 3, axis=2))
    save(src / "rgb.jpg", np.repeat(grey(2)[..., None], 3, axis=2), quality=90)
    colour = np.repeat(grey(3)[..., None], 3, axis=2)
    colour[..., 0] //= 2
    save(src / "colour.png", colour)
    glass = np.dstack(
        [colour[..., 1], colour[..., 1], colour[..., 1], np.full(colour.shape[:2], 128, np.uint8)]
    )
    save(src / "glass.png", glass)
    Image.fromarray(grey(4) > 100).save(src / "black.png")
    (src / "cut.png").write_bytes((src / "deep.png").read_bytes()[:400])
    (src / "text.png").write_text("no picture")
    (src / "notes.txt").write_text("not an ending of pictures")
    words = ("--modality", "MR", "--every-image-a-patient")
    code, line = refused(capsys, src, tmp_path / "out", *words)
    assert code == "too-many-quarantined"
    assert "2 × colour" in line
    report = imported(capsys, src, tmp_path / "out", *words, "--accept-quarantine")
    assert {one["file"]: one["code"] for one in report["not_imported"]} == {
        "colour.png": "colour",
        "glass.png": "colour",
        "black.png": "bad-geometry",
        "cut.png": "truncated",
        "text.png": "unreadable",
    }
    site = tmp_path / "out" / "src"
    paths = {source: site / "images" / line["file"] for source, line in about(site).items()}
    assert np.array_equal(read_pixels(paths["deep.png"]), deep)
    assert np.array_equal(read_pixels(paths["rgb.png"]), grey(2))
    assert (read_header(paths["deep.png"]).bits, read_header(paths["rgb.png"]).bits) == (16, 8)
    assert np.abs(read_pixels(paths["rgb.jpg"]) - grey(2)).mean() < 5


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hosts", "C:\\x.png", "a/../../x.png", "..\\x.png"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, capsys: Capture, name: str) -> None:
    save(tmp_path / "secret.png", grey())
    sheet = write_csv(tmp_path / "s.csv", [["file", "patient"], ["1.png", "a"], [name, "b"]])
    code, line = refused(
        capsys, folder_of(tmp_path / "src"), tmp_path / "out", "--labels", sheet, "--modality", "MR"
    )
    assert code == "bad-label"
    assert "row 3" in line


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path / "secret.png", grey())
    src = folder_of(tmp_path / "src", 3)
    (src / "link.png").symlink_to(tmp_path / "secret.png")
    words = ("--modality", "MR", "--every-image-a-patient", "--accept-quarantine")
    report = imported(capsys, src, tmp_path / "out", *words)
    assert report["not_imported"] == [{"file": "link.png", "code": "unsafe-path"}]


def test_rows_without_a_file_are_counted_and_many_stop_the_import(tmp_path: Path, capsys: Capture) -> None:
    src = folder_of(tmp_path / "src", 30)
    rows = [["file", "patient", "motion"], *([f"{n}.png", f"p{n}", n % 2] for n in range(1, 32))]
    sheet = write_csv(tmp_path / "s.csv", rows)
    report = imported(capsys, src, tmp_path / "out", "--labels", sheet, "--modality", "MR")
    assert report["not_imported"] == [{"file": "31.png", "code": "missing-file"}]
    rows += [[f"other{n}.png", f"q{n}", 0] for n in range(5)]
    sheet = write_csv(tmp_path / "s.csv", rows)
    code, line = refused(capsys, src, tmp_path / "o", "--labels", sheet, "--modality", "MR")
    assert code == "too-many-quarantined"
    assert "6 × missing-file" in line


def test_a_patient_at_two_sites(tmp_path: Path, capsys: Capture) -> None:
    rows = [["file", "patient", "site"], ["1.png", "7", "a"], ["2.png", "7", "b"], ["3.png", "8", "b"]]
    src, sheet = folder_of(tmp_path / "src", 3), write_csv(tmp_path / "s.csv", rows)
    words = ("--labels", sheet, "--modality", "MR")
    code, line = refused(capsys, src, tmp_path / "out", *words)
    assert code == "patient-at-two-sites"
    assert "7 (a, b)" in line
    report = imported(capsys, src, tmp_path / "out", *words, "--per-site-ids")
    assert [site["patients"] for site in report["sites"]] == [1, 2]


@pytest.mark.parametrize(
    ("rows", "words", "code"),
    [
        ([["file", "patient", "label"], ["1", "a", 1]], (), "bad-argument"),  # about which artifact?
        ([["file", "patient", "label"], ["1", "a", "ghost"]], (), "bad-label"),
        ([["file", "patient", "motion"], ["1", "a", 7]], (), "bad-label"),
        ([["file", "patient", "motion"], ["1", "a", 1], ["1", "a", 0]], (), "duplicate-label"),
        ([["file", "patient", "motion"], ["1", "a", 1], ["1.png", "b", 1]], (), "bad-label"),
        ([["file", "patient", "motion"]], (), "labels-missing"),
        ([["patient", "motion"], ["a", 1]], (), "labels-missing"),
        ([["file", "patient", "modality"], ["1", "a", "US"]], (), "bad-label"),
        ([["file", "patient", "part"], ["1", "a", "later"]], (), "bad-label"),
        ([["file", "patient", "echo_time_ms"], ["1", "a", -3]], (), "bad-label"),
        ([["file", "motion"], ["1", 1]], (), "bad-argument"),  # whose?
        ([["file", "patient"], ["1", "x" * 65]], (), "bad-patient-id"),
        ([["file", "patient"], ["1", "a"]], ("--label", "motion"), "bad-argument"),
        ([["file", "patient"], ["1", "a"]], ("--label", "ghost"), "unknown-artifact"),
        ([["file", "patient"], ["1", "a"]], ("--label-column", "score"), "bad-argument"),
        ([["file", "patient"], ["1", "a"]], ("--present-from", 2), "bad-argument"),
        ([["file", "patient"], ["1", "a"]], ("--pattern", "("), "bad-argument"),
        ([["file", "patient"], ["1", "a"]], ("--pattern", "(?P<who>.)"), "bad-argument"),
    ],
)
def test_each_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: Capture, rows: list[list[object]], words: tuple[object, ...], code: str
) -> None:
    src, sheet = folder_of(tmp_path / "src", 2), write_csv(tmp_path / "s.csv", rows)
    found, _ = refused(capsys, src, tmp_path / "out", "--labels", sheet, "--modality", "MR", *words)
    assert found == code


def test_no_folder_no_sheet_no_place_and_no_pictures(tmp_path: Path, capsys: Capture) -> None:
    src, words = folder_of(tmp_path / "src", 1), ("--modality", "MR", "--every-image-a-patient")
    assert refused(capsys, tmp_path / "none", tmp_path / "out", *words)[0] == "no-such-folder"
    assert refused(capsys, src, src / "out", *words)[0] == "bad-argument"
    assert (
        refused(capsys, src, tmp_path / "out", "--labels", tmp_path / "no.csv", *words)[0] == "labels-missing"
    )
    (tmp_path / "empty").mkdir()
    assert refused(capsys, tmp_path / "empty", tmp_path / "out", *words)[0] == "no-usable-images"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    code, _, talk = typed(capsys, "data", "import", "pictures", src, tmp_path / "full", *SAYS, *words)
    assert (code, "output-exists" in talk) == (2, True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


def test_names_tell_patients_and_sites_apart(tmp_path: Path, capsys: Capture) -> None:
    src = tmp_path / "src"
    for name in ("north_p1_s1", "north_p1_s2", "south_p2_s1"):
        save(src / f"{name}.png", grey())
    pattern = r"(?P<site>[a-z]+)_(?P<patient>p\d+)_"
    report = imported(capsys, src, tmp_path / "out", "--modality", "MR", "--pattern", pattern)
    assert [(site["site"], site["patients"], site["images"]) for site in report["sites"]] == [
        ("north", 1, 2),
        ("south", 1, 1),
    ]
    assert read_site(tmp_path / "out" / "north")[0].labels == "none"


def test_imported_images_are_no_hospitals(tmp_path: Path, capsys: Capture) -> None:
    """A site is public by the operator's word in site.yaml, not by its files; a hospital uses none."""
    src, words = folder_of(tmp_path / "src", 3), ("--modality", "MR", "--every-image-a-patient")
    imported(capsys, src, tmp_path / "out", *words)
    site = tmp_path / "out" / "src"
    assert "tiny, CC0" in admit_kind(*read_site(site))
    assert len(load_cohort(site).records) == 3
    values = (site / "site.yaml").read_text()
    (site / "site.yaml").write_text(values.partition("declared_not_hospital")[0])
    with pytest.raises(RefusedError):
        admit_kind(*read_site(site))
    settle(site, kind="hospital")
    assert {problem.code for problem in left_out_of(site)} == {"imported"}


def test_the_same_arguments_give_the_same_images(tmp_path: Path, capsys: Capture) -> None:
    src, words = folder_of(tmp_path / "src", 3), ("--modality", "MR", "--every-image-a-patient")
    for name in ("one", "two"):
        imported(capsys, src, tmp_path / name, *words)
    files = [sorted((tmp_path / name / "src" / "images").iterdir()) for name in ("one", "two")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    keys = [(tmp_path / name / "src" / "state" / "site.key").read_text() for name in ("one", "two")]
    assert keys[0] == keys[1]


def test_pictures_are_numbered_as_people_count() -> None:
    assert sorted(["10.jpg", "2.jpg", "a/3.jpg", "1.jpg"], key=natural) == [
        "1.jpg",
        "2.jpg",
        "10.jpg",
        "a/3.jpg",
    ]
