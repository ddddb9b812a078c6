"""People see what simulators do: a page without identifiers, and a reading in which nobody but the organiser
knows what is real.
"""

from __future__ import annotations

import base64
import io
import json
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openpyxl
import pydicom
import pytest
import torch
from PIL import Image

from client.dicom.dicom import read_header, read_pixels
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.labels.reader_agreement import wilson
from client.reader_study.realism import KEY_FILE, acceptance, acceptance_text, hand_out
from client.simulation.gallery import params_text, write_gallery
from client.simulation.gallery_text import LANGUAGES
from client.simulation.real_slices import find_slices, halving, simulate, wish
from client.views.acquisition import pulse_sequence
from common.artifacts import ARTIFACTS
from common.errors import ConfigError, DataError, FedqcError
from common.physics import SIMULATORS, replay
from tests.helpers.command_line import typed
from tests.helpers.dicom_files import REAL, needs_real_data
from tests.helpers.translations import assert_same_sentences

SIDE = 64
SECRETS = ("SECRETFOLDER", "SECRETID", "SECRETMAKER", "SECRETNAME", "20190423", "1.2.3.4.5")
Y, X = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]


def quiet(_: str) -> None:
    """Nobody listens."""


def ct_slice(number: int) -> np.ndarray:
    """A body with two dense bones."""
    image = np.where((Y / 0.7) ** 2 + (X / 0.9) ** 2 < 1, 40.0 + number, -1000.0)
    for centre in (-0.5, 0.5):
        image[(Y / 0.15) ** 2 + ((X - centre) / 0.12) ** 2 < 1] = 1200.0
    return image


def mr_slice(number: int) -> np.ndarray:
    """A head: fat, skull, brain."""
    radius = np.sqrt((Y / 0.8) ** 2 + (X / 0.7) ** 2)
    return np.select(
        [radius > 1, radius > 0.86, radius > 0.78],
        [0.0, 900.0, 60.0],
        300.0 + 40 * np.sin(9 * X + number) * np.cos(7 * Y),
    )


def images(root: Path, *, ct: int = 6, mr: int = 6) -> Path:
    for modality, count in (("CT", ct), ("MR", mr)):
        for number in range(count):
            path = root / f"SECRETFOLDER-{modality}" / f"{number}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_slice(
                path,
                ct_slice(number) if modality == "CT" else mr_slice(number),
                HeaderFacts(
                    modality=modality,
                    pixel_spacing_mm=5.0,
                    patient_id="SECRETID",
                    study_uid="1.2.3.4.5.1",
                    series_uid=f"1.2.3.4.5.{ord(modality[0])}",
                    sop_uid=make_uid(f"{modality}{number}".encode()),
                    instance_number=number,
                    slice_position_mm=4.0 * number,
                    manufacturer="SECRETMAKER",
                ),
            )
            dataset = pydicom.dcmread(path)
            dataset.PatientName, dataset.StudyDate = "SECRETNAME", "20190423"
            dataset.save_as(path)
    return root


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return images(tmp_path_factory.mktemp("gallery") / "src")


@pytest.fixture(scope="module")
def page(src: Path) -> str:
    path = src.parent / "page.html"
    write_gallery(src, path, wish([], [0.5, 1.0], slices=1, seed=7), language="en", say=quiet)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return path.read_text(encoding="utf-8")


# slices


def test_slices_are_spread_over_series_from_their_middle(src: Path) -> None:
    assert halving(7) == [3, 1, 5, 0, 2, 4, 6]
    found = list(find_slices(src).slices("CT"))
    assert [one.name for one in found] == [f"CT slice {number}" for number in range(1, 7)]
    assert sorted(one.header.instance_number or 0 for one in found) == list(range(6))
    assert found[0].header.instance_number == 3


def test_tiles_and_frames_and_members_of_archives_are_slices_and_derived_ones_are_not(
    src: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.write(src / "SECRETFOLDER-CT" / "0.dcm", "a/b.dcm")
    assert [one.name for one in find_slices(tmp_path / "export.zip").slices("CT")] == ["CT slice 1"]
    one = src / "SECRETFOLDER-MR" / "2.dcm"
    assert len(list(find_slices(one).slices("MR"))) == 1
    (tmp_path / "made").mkdir()
    write_slice(
        tmp_path / "made" / "x.dcm",
        ct_slice(0),
        HeaderFacts(
            modality="CT",
            pixel_spacing_mm=5.0,
            patient_id="P",
            study_uid="1.2",
            series_uid="1.3",
            sop_uid="1.4",
            instance_number=1,
            derived=True,
        ),
    )
    assert read_header(tmp_path / "made" / "x.dcm").simulated
    with pytest.raises(DataError, match="1 × derived"):
        find_slices(tmp_path / "made")


def test_what_a_row_says_makes_the_image_again(src: Path) -> None:
    clean = next(find_slices(src).slices("MR"))
    made = simulate(clean, "motion", 0.5, 11)
    again, _ = SIMULATORS["motion"].apply(
        torch.from_numpy(clean.image), replay("motion", json.loads(json.dumps(made.params["motion"])))
    )
    np.testing.assert_array_equal(again.numpy(), made.corrupted)
    np.testing.assert_array_equal(simulate(clean, "metal", 0.0, 3).corrupted, clean.image)


# the page


def test_every_simulator_and_severity_is_shown_with_its_difference_mask_and_parameters(page: str) -> None:
    for artifact in ARTIFACTS:
        if artifact.name in SIMULATORS:
            assert artifact.definition.replace("'", "&#39;") in page
    sections = page.split("<section")[1:]
    assert len(sections) == len(SIMULATORS)
    for section in sections:
        # clean; corrupted, difference and outline of each severity
        assert len(re.findall(r"<img ", section)) == 1 + 2 * 3
        assert re.findall(r"severity ([\d.]+)", section) == ["0.5", "1"]
        assert re.search(r"difference: −[\d.]+<.*>\+[\d.]+ (HU|%)", section)
    assert "<dt>photons</dt>" in page
    assert "<dt>angles_deg</dt>" in page


def test_the_page_stands_alone_and_says_nothing_of_whose_images_it_shows(page: str, src: Path) -> None:
    assert not any(secret in page for secret in (*SECRETS, str(src), src.parent.name, ".dcm"))
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:image/png|#)", page)
    for encoded in re.findall(r"data:image/png;base64,([^\"]+)", page):
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert max(picture.size) <= 256
        assert not picture.info.keys() - {"transparency"}


def test_the_difference_is_signed_and_shows_where(src: Path, tmp_path: Path) -> None:
    """Metal is brighter and its streaks are darker: both ends of the palette occur, and the middle where
    nothing changed.
    """
    path = tmp_path / "p.html"
    write_gallery(src, path, wish(["metal"], [1.0], slices=1, seed=7), language="en", say=quiet)
    encoded = re.findall(r"data:image/png;base64,([^\"]+)", path.read_text())
    indices = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[2]))))
    assert (indices.min(), indices.max()) == (1, 255)
    assert indices[0, 0] == 128
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[3])))) == 255).any()


def test_languages_have_the_same_sentences() -> None:
    assert_same_sentences(LANGUAGES)


def test_the_page_speaks_chinese(src: Path, tmp_path: Path) -> None:
    write_gallery(
        src, tmp_path / "p.html", wish(["metal"], [1.0], slices=1, seed=7), language="zh", say=quiet
    )
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "金属伪影" in text
    assert "CT 切片 1" in text
    assert "严重程度 1" in text


def test_parameters_are_short() -> None:
    params = {
        "severity": 0.5,
        "angles": [-1.25, 0.0, 2.0, 3.0, 4.0],
        "rods": [{"y": 150.2, "x": 1.0}, {"y": 3.0, "x": 2.0}],
        "photons": 1.06e6,
    }
    assert params_text(params) == [
        ("angles", "5: −1.25 … 4"),
        ("rods", "y 150, x 1\ny 3, x 2"),
        ("photons", "1.06e+06"),
    ]


# the blinded reading


@pytest.fixture(scope="module")
def blind(src: Path) -> Path:
    folder = src.parent / "blind"
    paths = hand_out(
        src, folder, wish(["metal", "motion"], [0.5, 1.0], slices=2, seed=7), readers=3, say=quiet
    )
    assert [path.name for path in paths] == [
        "realism-reader-1.xlsx",
        "realism-reader-2.xlsx",
        "realism-reader-3.xlsx",
        KEY_FILE,
    ]
    return folder


def copied(blind: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in blind.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def key_of(folder: Path) -> dict[str, dict[str, object]]:
    """Key of a row in any workbook → what it is."""
    rows = json.loads((folder / KEY_FILE).read_text())["rows"]
    return {key: row for row in rows for key in row["rows"].values()}


def fill(
    path: Path,
    answer: Callable[[dict[str, object]], str | None],
    seen: Callable[[dict[str, object]], str | None] = lambda _: None,
) -> None:
    book = openpyxl.load_workbook(path)
    sheet, key = book.worksheets[0], key_of(path.parent)
    for row in range(2, sheet.max_row + 1):
        what = key[sheet.cell(row, 1).value]
        sheet.cell(row, 5).value, sheet.cell(row, 6).value = answer(what), seen(what)
    book.save(path)


def keys_in(path: Path) -> list[str]:
    sheet = openpyxl.load_workbook(path).worksheets[0]
    return [sheet.cell(row, 1).value for row in range(2, sheet.max_row + 1)]


def test_the_key_lies_apart_and_every_reader_has_another_order(blind: Path) -> None:
    key = json.loads((blind / KEY_FILE).read_text())
    assert stat.S_IMODE((blind / KEY_FILE).stat().st_mode) == 0o600
    places = {row["rows"]["1"]: at for at, row in enumerate(key["rows"])}
    orders = []
    for reader in "123":
        places = {row["rows"][reader]: at for at, row in enumerate(key["rows"])}
        orders.append([places[one] for one in keys_in(blind / f"realism-reader-{reader}.xlsx")])
    assert all(sorted(order) == list(range(len(places))) for order in orders)
    assert len({tuple(order) for order in (*orders, range(len(places)))}) == 4
    counted = Counter((row["artifact"], row["severity"]) for row in key["rows"])
    assert counted == {
        ("metal", 0.5): 2,
        ("metal", 1.0): 2,
        ("motion", 0.5): 2,
        ("motion", 1.0): 2,
        (None, 0.0): 2,
    }
    touched = {row["slice"] for row in key["rows"] if row["artifact"]}
    assert touched.isdisjoint(row["slice"] for row in key["rows"] if not row["artifact"])


def test_a_workbook_tells_the_reader_nothing(blind: Path, src: Path) -> None:
    path = blind / "realism-reader-1.xlsx"
    with zipfile.ZipFile(path) as archive:
        text = (
            b"\n".join(archive.read(name) for name in archive.namelist() if not name.endswith(".png"))
            .decode()
            .lower()
        )
    for word in (*SECRETS, "metal", "motion", "severity", "slice 1", str(src), ".dcm", "seed"):
        assert word.lower() not in text, word
    sheet = openpyxl.load_workbook(path).worksheets[0]
    assert {
        sheet.cell(row, column).value for row in range(2, sheet.max_row + 1) for column in (3, 5, 6, 7)
    } == {None}
    assert sheet.data_validations.dataValidation[0].formula1 == '"realistic,not realistic"'
    assert len(sheet._images) == sheet.max_row - 1


def test_the_key_makes_a_row_again(blind: Path, src: Path) -> None:
    row = next(
        row for row in json.loads((blind / KEY_FILE).read_text())["rows"] if row["artifact"] == "metal"
    )
    clean = next(one for one in find_slices(src).slices("CT") if one.name == row["slice"])
    again = simulate(clean, "metal", row["severity"], row["seed"])
    assert json.loads(json.dumps(again.params["metal"])) == row["params"]


def test_rows_and_orders_hang_on_no_seed(src: Path, tmp_path: Path) -> None:
    wanted = wish(["metal"], [1.0], slices=1, seed=7)
    for name in ("a", "b"):
        hand_out(src, tmp_path / name, wanted, readers=1, say=quiet)
    assert set(key_of(tmp_path / "a")).isdisjoint(key_of(tmp_path / "b"))
    same = [
        [row["params"] for row in json.loads((tmp_path / name / KEY_FILE).read_text())["rows"]]
        for name in ("a", "b")
    ]
    assert same[0] == same[1]


def test_acceptance_by_hand(blind: Path, tmp_path: Path) -> None:
    """Reader 1 takes all for real; 2 refuses metal at severity 1; 3 does as 2, refuses an untouched CT, and
    leaves motion blank.
    """
    folder = copied(blind, tmp_path / "b")

    def second(what: dict[str, object]) -> str:
        return "not realistic" if (what["artifact"], what["severity"]) == ("metal", 1.0) else "realistic"

    def third(what: dict[str, object]) -> str | None:
        if what["artifact"] == "motion":
            return None
        return "不真实" if what["artifact"] is None and what["modality"] == "CT" else second(what)

    fill(
        folder / "realism-reader-1.xlsx",
        lambda _: "Realistic ",
        lambda what: "金属伪影" if what["artifact"] else None,
    )
    fill(folder / "realism-reader-2.xlsx", second)
    fill(folder / "realism-reader-3.xlsx", third, lambda what: "Dr SECRETREADER saw a thing")
    found = acceptance(folder)
    assert found["rows"] == {"simulated": 8, "untouched": 2}
    assert found["not_filled_in"] == {"1": 0, "2": 0, "3": 4}
    metal = found["artifacts"]["metal"]
    assert metal["readers"]["2"] == {"realistic": 2, "answered": 4, "rate": 0.5, "low": 0.15, "high": 0.85}
    assert metal["unanimous"] == metal["readers"]["2"]
    assert list(metal["bands"]) == ["moderate", "severe"]
    assert metal["bands"]["severe"]["readers"]["1"] == {
        "realistic": 2,
        "answered": 2,
        "rate": 1.0,
        "low": 0.3424,
        "high": 1.0,
    }
    assert metal["bands"]["severe"]["unanimous"]["rate"] == 0.0
    motion = found["artifacts"]["motion"]
    assert motion["readers"]["3"] == {"realistic": 0, "answered": 0, "rate": None, "low": None, "high": None}
    assert motion["unanimous"]["answered"] == 0  # not every reader answered
    assert [found["untouched"]["readers"][reader]["rate"] for reader in "123"] == [1.0, 1.0, 0.5]
    assert found["untouched"]["unanimous"]["realistic"] == 1
    # readers 2 and 3 on metal and untouched: 3 realistic both, 2 not both, 1 in dispute: (5/6 - 1/2) / (1 -
    # 1/2) = 2/3
    pair = found["agreement"]["pairs"]["2-3"]
    assert (pair["n"], pair["kappa"], pair["observed"]) == (6, 0.6667, 0.8333)
    assert found["agreement"]["pairs"]["1-2"]["kappa"] == 0.0
    # three readers, 6 rows: 3 agree wholly, 3 by a third; P = 2/3; 13 of 18 realistic
    assert found["agreement"]["all"]["kappa"] == round(
        (2 / 3 - (13**2 + 5**2) / 18**2) / (1 - (13**2 + 5**2) / 18**2), 4
    )
    assert found["named"] == {"right": 4, "another": 4, "other_words": 8}
    for language in LANGUAGES:
        text = acceptance_text(found, language)
        assert "2/4 50% (15%–85%)" in text
        assert "SECRETREADER" not in text + json.dumps(found)


def test_a_reader_who_has_not_answered_is_not_missed(blind: Path, tmp_path: Path) -> None:
    folder = copied(blind, tmp_path / "b")
    (folder / "realism-reader-3.xlsx").unlink()
    fill(folder / "realism-reader-1.xlsx", lambda _: "realistic")
    found = acceptance(folder)
    assert found["readers"] == {"handed_out": 3, "answered": [1]}
    assert found["not_filled_in"] == {"1": 0, "2": 10, "3": 10}
    assert found["agreement"] == {"pairs": {}, "all": None}
    assert "reader 2: 10" in acceptance_text(found, "en")


def test_wilson_by_hand() -> None:
    """Newcombe (1998), Table I: 81 of 263 and 0 of 20."""
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson(0, 20), (0.0, 0.1611), atol=5e-5)
    assert np.isnan(wilson(0, 0)).all()


def test_everything_wrong_is_said_at_once_and_no_cell_is_shown(
    blind: Path, src: Path, tmp_path: Path
) -> None:
    folder = copied(blind, tmp_path / "b")
    hand_out(src, tmp_path / "other", wish(["metal"], [1.0], slices=1, seed=7), readers=1, say=quiet)
    (folder / "realism-reader-2.xlsx").write_bytes(
        (tmp_path / "other" / "realism-reader-1.xlsx").read_bytes()
    )
    (folder / "realism-reader-3 copy.xlsx").write_bytes((folder / "realism-reader-3.xlsx").read_bytes())
    (folder / "~$realism-reader-3.xlsx").write_bytes(b"a lock file")
    (folder / "z.xlsx").write_bytes(b"no workbook")
    book = openpyxl.load_workbook(folder / "realism-reader-1.xlsx")
    sheet = book.worksheets[0]
    sheet.cell(2, 5).value = "SECRETNAME maybe"
    sheet.cell(3, 1).value = sheet.cell(4, 1).value
    sheet.cell(5, 1).value = "SECRETID"
    book.save(folder / "realism-reader-1.xlsx")
    with pytest.raises(DataError) as caught:
        acceptance(folder)
    said = caught.value.message
    for words in (
        "realism-reader-1.xlsx: row 2: expected realistic, not realistic or blank",
        "realism-reader-1.xlsx: row 4: the same as row 3",
        "realism-reader-1.xlsx: row 5: expected the key of a row",
        "realism-reader-1.xlsx: 2 rows of 10 missing",
        f"realism-reader-2.xlsx: handed out with another {KEY_FILE}",
        "reader 3 again",
        "z.xlsx: not a workbook of --blind",
    ):
        assert words in said, words
    assert "\n" not in said
    assert "SECRET" not in said
    assert caught.value.code == "bad-label"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: None, "no-answers"),
        (lambda folder: (folder / KEY_FILE).unlink(), "no-answer-key"),
        (lambda folder: (folder / KEY_FILE).write_text("{}"), "no-answer-key"),
        (
            lambda folder: (folder / KEY_FILE).write_text(
                (folder / KEY_FILE).read_text().replace('"metal"', '"mettle"')
            ),
            "no-answer-key",
        ),
    ],
)
def test_a_folder_that_cannot_be_counted_is_refused(
    blind: Path, tmp_path: Path, spoil: Callable[[Path], object], code: str
) -> None:
    folder = copied(blind, tmp_path / "b")
    spoil(folder)
    with pytest.raises(DataError) as caught:
        acceptance(folder)
    assert caught.value.code == code
    assert caught.value.hint


# the command


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("", "bad-argument", "no output requested"),
        ("SRC", "bad-argument", "no output requested"),
        ("SRC OUT", "bad-argument", "--map missing"),
        ("SRC --map m.yaml", "bad-argument", "OUT missing"),
        ("SRC OUT --gallery g.html", "bad-argument", "--map missing"),
        ("SRC OUT --map m.yaml --severity 1", "bad-argument", "--severity not allowed here"),
        ("--gallery g.html", "bad-argument", "SRC missing"),
        ("SRC --gallery g.png", "bad-argument", "expected .html"),
        ("SRC --gallery g", "bad-argument", "expected .html"),
        ("SRC --gallery g.html --readers 2", "bad-argument", "--readers not allowed here"),
        ("SRC --gallery g.html --artifact gost", "unknown-artifact", "gost"),
        ("SRC --gallery g.html --severity 0", "bad-argument", "--severity 0"),
        ("SRC --gallery SRC/g.html", "bad-argument", "folder of images"),
        ("SRC --gallery OUT/no/g.html", "no-such-folder", "existing folder"),
        ("SRC --gallery g.html --lang fr", "bad-argument", "fr"),
        ("OUT/none --gallery g.html", "no-such-folder", "none"),
        ("SRC --blind b --gallery g.html", "bad-argument", "--gallery not allowed here"),
        ("SRC --blind b --readers 0", "bad-argument", "--readers 0"),
        ("SRC --blind SRC/b", "bad-argument", "folder of images"),
        ("SRC --blind b --slices 100 --severity 0.1", "too-many-rows", "rows"),
        ("--acceptance b --blind b", "bad-argument", "--blind not allowed here"),
        ("--acceptance OUT/none", "no-such-folder", "none"),
    ],
)
def test_a_wrong_command_is_one_line_and_a_hint(
    src: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if code == "too-many-rows":
        monkeypatch.setattr("client.reader_study.workbooks.MAX_ROWS", 10)
    status, out, err = typed(
        capsys, "data", "inject", *words.replace("SRC", str(src)).replace("OUT", str(tmp_path)).split()
    )
    assert (status, out) == (2, "")
    error, hint = [line for line in err.splitlines() if line.startswith("fedqc: ")]
    assert error.startswith(f"fedqc: error [{code}]: ")
    assert said in error
    assert hint.startswith("fedqc: hint: ")
    assert list(tmp_path.iterdir()) == []


def test_a_gallery_a_reading_and_its_count_are_typed(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--severity", "0.5", "--artifact", "motion", "--slices", "1")
    status, out, _ = typed(capsys, "data", "inject", src, "--gallery", tmp_path / "g.html", *common)
    assert (status, out) == (0, f"{tmp_path / 'g.html'}\n")
    status, out, err = typed(
        capsys,
        "data",
        "inject",
        src,
        "--blind",
        tmp_path / "b",
        *common,
        "--readers",
        "1",
        "--format",
        "json",
    )
    assert (status, len(json.loads(out)["written"])) == (0, 2)
    assert "SECRET" not in err
    fill(tmp_path / "b" / "realism-reader-1.xlsx", lambda _: "realistic")
    status, out, _ = typed(capsys, "data", "inject", "--acceptance", tmp_path / "b", "--format", "json")
    assert (status, json.loads(out)["artifacts"]["motion"]["unanimous"]["rate"]) == (0, 1.0)
    status, out, _ = typed(capsys, "data", "inject", "--acceptance", tmp_path / "b", "--lang", "zh")
    assert "运动伪影" in out


def test_a_folder_without_the_modality_says_so(tmp_path: Path) -> None:
    source = images(tmp_path / "src", ct=1, mr=0)
    with pytest.raises(FedqcError) as caught:
        write_gallery(
            source, tmp_path / "g.html", wish(["motion"], [], slices=1, seed=7), language="en", say=quiet
        )
    assert caught.value.code == "no-usable-images"
    with pytest.raises(ConfigError):
        wish(["nothing"], [], slices=1, seed=7)


@needs_real_data
def test_real_mosaics_are_cut_into_slices_and_their_identifiers_do_not_go_on(tmp_path: Path) -> None:
    assert REAL is not None
    folder = Path(REAL) / "site_mr_siemens_trio_usc"
    first = next(find_slices(folder).slices("MR"))
    assert first.image.shape == (64, 64)  # 384 x 384 holds 36 of them
    assert first.header.number_of_frames > 1
    write_gallery(
        folder, tmp_path / "g.html", wish(["motion"], [1.0], slices=1, seed=7), language="en", say=quiet
    )
    page = (tmp_path / "g.html").read_text(encoding="utf-8")
    path = next(one for one in sorted(folder.rglob("*")) if one.is_file())
    header = pydicom.dcmread(path, stop_before_pixels=True)
    for keyword in (
        "PatientID",
        "PatientName",
        "StudyInstanceUID",
        "SOPInstanceUID",
        "StudyDate",
        "InstitutionName",
        "StationName",
    ):
        value = str(header.get(keyword, ""))
        assert len(value) < 4 or value not in page, keyword
    assert read_pixels(path, 3).shape == (64, 64)


@pytest.mark.parametrize(
    ("sequence", "description", "expected"),
    [
        ("EP SK *epfid2d1_64", "ax_asc_35sl", "EPI"),
        ("SE SK", "DT_HIGH_32DIR", "EPI"),
        ("EP NONE epi_dti", "dti_tra_dir16_AP", "EPI"),
        ("SE SK fse", "FSE PD AXIAL OBL", "SE"),
        ("SE", "T2 EPIGASTRIC DIFFERENTIAL", "SE"),
        ("GR\\IR SK\\SP\\MP tfl3d1_35", "", "GRE"),
        ("GR\\IR NONE gre_fsp", "t1_gre_fsp_3d_sag", "GRE"),
    ],
)
def test_a_header_says_how_lines_were_acquired(sequence: str, description: str, expected: str) -> None:
    assert pulse_sequence(SimpleNamespace(sequence=sequence, series_description=description)) == expected
