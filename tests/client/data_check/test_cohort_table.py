"""Table 1 and flow of a small cohort, counted by hand; and what of it never stands in a run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml

from client.data.cohort import load_cohort
from client.data_check.check import Readiness, examine, look
from client.data_check.cohort_table import quartiles, table_of_cohort
from client.data_check.page import render
from client.data_check.text import report_text
from client.data_check.vocabulary import body_part
from client.data_check.words import LANGUAGES
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.site.kind import _generated
from common.cohort_table import CHINESE, ENGLISH, checked_tables, flow_rows, num_scored, table_rows
from common.errors import ConfigError
from common.i18n import speaker
from common.plan import Split
from tests.helpers.translations import assert_same_sentences

SAY = speaker("en", LANGUAGES)
SECRET = "DR JANE MILLER"
# patient, sex, age, modality, body part, vendor, part
PATIENTS = [
    ("a", "F", "030Y", "CT", "HEAD", "SIEMENS", "train"),
    ("b", "M", "050Y", "CT", "HEAD", "SIEMENS", "train"),
    ("c", "F", "040Y", "CT", SECRET, SECRET, "train"),
    ("d", "F", "", "MR", "", "SIEMENS", "train"),
    ("e", "M", "060Y", "CT", "CHEST", "Philips", "test"),
    ("f", "", "070Y", "MR", "KNEE", "Philips", "test"),
    ("g", "M", "080Y", "CT", "CHEST", "Philips", "test"),
    ("h", "M", "090Y", "CT", "CHEST", "Philips", "test"),
]
# two readers of metal, one of motion; a: they differ; c: no answer; h opted out
LABELS = """file,reader,metal,motion,metal_severity,part
a.dcm,one,1,,,train
a.dcm,two,0,,,train
b.dcm,one,1,,0.5,train
c.dcm,one,,,,train
d.dcm,one,,0,,train
e.dcm,one,1,,0.75,test
f.dcm,one,,1,,test
g.dcm,one,0,,,test
b.dcm,two,1,,0.5,train
e.dcm,two,1,,0.75,test
g.dcm,two,0,,,test
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = tmp_path / "site"
    images = folder / "images"
    images.mkdir(parents=True)
    for number, (name, sex, age, modality, part, vendor, _) in enumerate(PATIENTS):
        path = images / f"{name}.dcm"
        facts = HeaderFacts(
            modality=modality,
            pixel_spacing_mm=1.0,
            patient_id=f"ID-{name}",
            study_uid=make_uid(name.encode()),
            series_uid=make_uid(name.encode() + b"r"),
            sop_uid=make_uid(name.encode() + b"i"),
            instance_number=1,
            manufacturer=vendor,
            model="Verio",
            kvp=120.0 if modality == "CT" else None,
        )
        write_slice(path, np.random.default_rng(number).uniform(0, 900, (16, 16)), facts)
        header = pydicom.dcmread(path)
        header.PatientSex, header.PatientAge, header.BodyPartExamined = sex, age, part
        if modality == "MR":
            header.MagneticFieldStrength = 3.0
        header.save_as(path)
    shutil.copy(images / "b.dcm", images / "copy.dcm")
    (images / "broken.dcm").write_bytes(b"no image")
    (folder / "labels.csv").write_text(LABELS)
    about = {"name": "site-a", "kind": "synthetic", "cohort": "phantoms", "nominal_patients": 50}
    (folder / "site.yaml").write_text(yaml.safe_dump(about))
    (folder / "cohort.yaml").write_text("name: small\nopt_out: [ID-h]\n")
    return folder


def examined(site: Path) -> Readiness:
    return examine(look(site, size=32))


def test_table_1_counted_by_hand(site: Path) -> None:
    columns = examined(site).table["columns"]
    assert list(columns) == ["all", "train", "test"]
    every, train, test = columns.values()
    assert (every["patients"], every["studies"], every["slices"]) == (7, 7, 7)
    assert (train["patients"], test["patients"]) == (4, 3)
    assert train["age_years"] == {"n": 3, "median": 40.0, "q1": 35.0, "q3": 45.0}
    assert train["sex"] == {"female": 3, "male": 1}
    assert test["sex"] == {"male": 2, "not stated": 1}
    assert every["modality"] == {"CT": 5, "MR": 2}
    assert every["vendor"] == {"Siemens": 3, "other": 1, "Philips": 3}
    assert (every["kvp"], every["field_strength_t"]) == ({"120": 5}, {"3.0": 2})
    assert every["body_part"] == {"HEAD": 2, "other": 1, "not stated": 1, "CHEST": 2, "KNEE": 1}
    metal = every["artifacts"]["metal"]
    assert (metal["present"], metal["assessed"]) == (2, 3), "the disputed one is not assessed"
    assert metal["severity"] == {"n": 2, "median": 0.625, "q1": 0.5625, "q3": 0.6875}
    assert test["artifacts"]["motion"]["present"] == 1


def test_flow_counted_by_hand(site: Path) -> None:
    table = examined(site).table
    steps = {step["step"]: step for step in table["files"]}
    assert [step["files"] for step in table["files"]] == [10, 9, 8, 7]
    assert steps["readable"]["lost"] == {"not-dicom": 1}
    assert steps["in the cohort"]["lost"] == {"opted-out": 1}
    assert steps["used"]["lost"] == {"duplicate": 1}
    assert table["parts"]["train"] | {"slices": 4} == {
        "patients": 4,
        "slices": 4,
        "unlabelled": 1,
        "disputed": 1,
        "labelled": 2,
    }
    assert table["parts"]["test"]["labelled"] == num_scored(table) == 3
    files = [step["files"] for step in table["files"]]
    for before, step, after in zip(files, table["files"][1:], files[1:], strict=False):
        assert before - after == sum(step["lost"].values()), step["step"]


def test_the_check_shows_both_and_names_nobody(site: Path) -> None:
    found = examined(site)
    shown = [render(found, "en"), render(found, "zh"), report_text(found, SAY), json.dumps(found.public())]
    assert "40 [35–45]" in shown[0]
    assert "40 [35–45]" in shown[2]
    assert "opted-out" in shown[0]
    for text in shown:
        assert not any(word in text for word in (SECRET, "JANE", "ID-a"))
    rows = table_rows(list(found.table["columns"].values()), SAY)
    assert not any("other-" in row.label for row in rows)


def test_a_run_folder_holds_it_of_a_synthetic_site_only(site: Path) -> None:
    def table(everyone: bool = False) -> Any:
        cohort = load_cohort(site, size=32, plan_split=Split(), quarantine="accept", labels=["metal"])
        return table_of_cohort(cohort, everyone=everyone)

    found = table()
    assert checked_tables({"site-a": found}, "cohorts.json") == {"site-a": found}
    assert list(found["columns"]["all"]["artifacts"]) == ["metal"]
    assert (num_scored(found), num_scored(table(everyone=True))) == (2, 3), "f has no label of metal"
    path = site / "images" / "a.dcm"
    header = pydicom.dcmread(path)
    header.file_meta.ImplementationVersionName = "ARCHIVE"
    header.save_as(path)
    _generated.cache_clear()
    assert table() is None, "images that fedqc did not write, and nobody declared to be no hospital's"
    text = (site / "site.yaml").read_text().replace("synthetic", "hospital")
    (site / "site.yaml").write_text(text)
    assert table() is None


def test_a_damaged_table_is_one_line(site: Path) -> None:
    table = examined(site).table
    damaged: list[Any] = [[], {"site-a": {}}]
    damaged += [{"site-a": table | changes} for changes in ({"left_out": -1}, {"scored": "a\nb"})]
    for wrong in damaged:
        with pytest.raises(ConfigError) as caught:
            checked_tables(wrong, "cohorts.json")
        assert caught.value.code == "damaged-run"
        assert "\n" not in caught.value.message


def test_rare_values_are_added_up(site: Path) -> None:
    column = examined(site).table["columns"]["all"]
    column["studies"] = 23
    column["kvp"] = {str(80 + number): 1 + (number < 8) for number in range(15)}
    rows = [row for row in table_rows([column], SAY) if row.group.startswith("Tube voltage")]
    assert len(rows) == 9
    assert rows[-1].label == "other"
    assert rows[-1].cells == ("7 (30 %)",)


def test_a_folder_without_site_has_one_column_and_no_parts(site: Path) -> None:
    found = examine(look(site / "images", size=32)).table
    assert (list(found["columns"]), found["parts"], found["left_out"]) == (["all"], {}, 0)
    assert found["columns"]["all"]["patients"] == 8, "without site.yaml nobody is opted out"
    assert flow_rows([found], SAY)[-1].cells == ("0",)


@pytest.mark.parametrize(
    ("text", "word"),
    [("Head", "HEAD"), ("c spine", "CSPINE"), ("HEAD OF DR X", None), ("", None), ("Schädel", None)],
)
def test_a_body_part_is_a_term_or_nothing(text: str, word: str | None) -> None:
    assert body_part(text) == word


def test_quartiles_of_nothing() -> None:
    assert quartiles([]) == {"n": 0, "median": None, "q1": None, "q3": None}


def test_both_languages_say_the_same() -> None:
    assert_same_sentences({"en": ENGLISH, "zh": CHINESE})
