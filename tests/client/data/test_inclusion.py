"""cohort.yaml decides slice by slice, by the slice's own header, and names nobody when it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from client.data.inclusion import ADMISSION_CODES, has_old_age_keys, read_admission
from client.dicom.index import SliceRecord, patient_pseudonyms
from common.errors import ConfigError

KEY = bytes(range(32))
RECORD = SliceRecord(
    number=1,
    file="a.dcm",
    root=Path("images"),
    place="a.dcm",
    frame=0,
    row=0,
    content="",
    study="",
    series="",
    patient=min(patient_pseudonyms("P1", KEY)),
    image="",
    accession="",
    scanner="",
    series_number=None,
    instance_number=None,
    modality="MR",
    rows=8,
    columns=8,
    bits=12,
    pixel_spacing_mm=None,
    slice_thickness_mm=None,
    slice_position_mm=None,
    phase_encoding=None,
    manufacturer="",
    model="",
    field_strength_t=None,
    kvp=None,
    kernel="",
    sequence="",
    echo_time_ms=None,
    repetition_time_ms=None,
    study_date="20200615",
    series_description="Ax T1 MPRAGE",
    body_part="Brain",
    age_years=44.0,
)


def code(folder: Path, rules: dict[str, Any], **header: Any) -> str:
    (folder / "cohort.yaml").write_text(yaml.safe_dump(rules, allow_unicode=True), encoding="utf-8")
    return read_admission(folder, KEY)(replace(RECORD, **header))


def test_without_rules_everybody_is_admitted(tmp_path: Path) -> None:
    assert read_admission(tmp_path, KEY)(RECORD) == ""
    assert (
        code(tmp_path, {"name": "trial", "ethics_approval": "2024-1", "consent_basis": "broad consent"}) == ""
    )


@pytest.mark.parametrize(
    ("rules", "header", "expected"),
    [
        ({"include": {"modality": ["CT"]}}, {}, "rule-modality"),
        ({"include": {"modality": ["CT", "MR"]}}, {}, ""),
        ({"include": {"body_part": ["HEAD", "BRAIN"]}}, {}, ""),
        ({"include": {"body_part": ["HEAD"]}}, {}, "rule-body-part"),
        ({"include": {"body_part": ["HEAD"]}}, {"body_part": ""}, "rule-body-part"),
        ({"exclude": {"body_part": ["brain"]}}, {}, "rule-body-part"),
        ({"include": {"study_date": {"first": "2020-06-15", "last": "2020-06-15"}}}, {}, ""),
        ({"include": {"study_date": {"first": "2020-06-16"}}}, {}, "rule-date"),
        ({"include": {"study_date": {"last": "2020-06-14"}}}, {}, "rule-date"),
        ({"include": {"study_date": {"last": "2020-06-14"}}}, {"study_date": ""}, "rule-date"),
        ({"include": {"age_years": {"min": 18}}}, {"age_years": 17.9}, "rule-age"),
        ({"include": {"age_years": {"least": 18}}}, {"age_years": None}, "rule-age"),
        ({"include": {"age_years": {"min": 18, "max": 44}}}, {}, ""),
        ({"include": {"series_description": ["t2", "mprage"]}}, {}, ""),
        ({"include": {"series_description": ["T2"]}}, {}, "rule-description"),
        ({"exclude": {"series_description": ["t1"]}}, {}, "rule-description"),
        ({"opt_out": ["P0", "P1"]}, {}, "opted-out"),
        ({"opt_out": ["P11"]}, {}, ""),
    ],
)
def test_each_rule_and_what_a_silent_header_means(
    tmp_path: Path, rules: dict[str, Any], header: dict[str, Any], expected: str
) -> None:
    assert code(tmp_path, rules, **header) == expected
    assert expected in {"", *ADMISSION_CODES}


def test_an_imported_image_is_used_at_every_site_but_a_hospital(tmp_path: Path) -> None:
    record = replace(RECORD, imported=True)
    assert read_admission(tmp_path, KEY)(record) == "imported"
    assert read_admission(tmp_path, KEY, kind="hospital")(record) == "imported"
    for kind in ("public", "synthetic"):
        assert read_admission(tmp_path, KEY, kind=kind)(record) == ""
    kinds = {read_admission(tmp_path, KEY, kind=kind).digest() for kind in ("hospital", "public")}
    assert len(kinds) == 2  # another kind is another index
    assert "imported" in ADMISSION_CODES


def test_a_list_of_its_own_may_name_who_opted_out(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("# since 2024\n\n P1 \n", encoding="utf-8-sig")
    assert code(tmp_path, {"opt_out_file": "out.txt"}) == "opted-out"


def test_the_digest_tells_rules_apart_and_holds_no_patient(tmp_path: Path) -> None:
    digests = set()
    for rules in (
        {},
        {"opt_out": ["P1"]},
        {"opt_out": ["P2"]},
        {"include": {"modality": ["MR"]}},
        {"exclude": {"body_part": ["HEAD"]}},
    ):
        code(tmp_path, rules)
        digests.add(read_admission(tmp_path, KEY).digest())
    assert len(digests) == 5
    assert all(len(digest) == 64 for digest in digests)


def test_the_old_keys_of_ages_are_read_and_digested_as_ever(tmp_path: Path) -> None:
    """A cache made under the old keys stays valid under the new ones."""
    assert not has_old_age_keys(tmp_path)
    digests = []
    for ages in ({"least": 18, "most": 44}, {"min": 18, "max": 44}):
        assert code(tmp_path, {"include": {"age_years": ages}}, age_years=17.0) == "rule-age"
        digests.append(read_admission(tmp_path, KEY).digest())
        assert has_old_age_keys(tmp_path) == ("least" in ages)
    assert digests == ["7af4ede62c7f9feb16a64197a8049e9daf38e8a708337b05e73317c5eae23607"] * 2
    with pytest.raises(ConfigError, match="least"):
        code(tmp_path, {"include": {"age_years": {"least": 18, "min": 18}}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("include: {modality: [XA]}", "include.modality"),
        ("include: {age_years: {min: 90, max: 20}}", "min is above max"),
        ("include: {study_date: {first: 2021-01-01, last: 2020-01-01}}", "first is after last"),
        ("includes: {}", "includes"),
        ("opt_out: SECRET-ID", "opt_out"),
        ("opt_out: [{a: SECRET-ID}]", "opt_out"),
        ("opt_out_file: absent.txt", "cannot read"),
        ("- a list", "must be a valid dictionary"),
        ("a: [", "line"),
    ],
)
def test_a_bad_file_is_refused_by_field_and_names_no_patient(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "cohort.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_admission(tmp_path, KEY)
    assert caught.value.code == "bad-cohort"
    assert says in caught.value.message
    assert "SECRET-ID" not in caught.value.message


@given(
    st.lists(st.sampled_from(["P1", "P2", "病人3", "P 4"]), max_size=4, unique=True),
    st.sampled_from(["P1", "P2", "病人3", "P 4"]),
)
def test_whether_a_patient_is_admitted_does_not_depend_on_the_others(
    opted_out: list[str], patient: str
) -> None:
    from client.data.inclusion import Admission, CohortRules

    listed = frozenset(name for one in opted_out for name in patient_pseudonyms(one, KEY))
    admission = Admission(rules=CohortRules(), opted_out=listed)
    record = replace(RECORD, patient=min(patient_pseudonyms(patient, KEY)))
    assert (admission(record) == "opted-out") == (patient in opted_out)


def test_the_cache_keeps_of_date_and_description_what_the_rules_need(tmp_path: Path) -> None:
    (tmp_path / "cohort.yaml").write_text(
        "include: {study_date: {first: 2024-03-15, last: 2024-05-10}}\n"
        "exclude: {series_description: [loc, T1]}\n"
    )
    rules = read_admission(tmp_path, KEY)
    kept = {
        day: rules.kept_text({"study_date": day, "series_description": "T1 of Mrs Smith"})["study_date"]
        for day in ("20240314", "20240315", "20240320", "20240430", "20240510", "20240511", "20240601", "")
    }
    assert list(kept.values()) == [
        *("20240301", "20240315", "20240315", "20240401", "20240501", "20240511", "20240601", "")
    ]
    assert rules.kept_text({"study_date": "", "series_description": "t1 of Mrs Smith"}) == {
        "series_description": "T1",
        "study_date": "",
    }
    assert rules.text_digest()


def test_loss_is_a_policy_of_the_cohort(tmp_path: Path) -> None:
    assert read_admission(tmp_path, KEY).rules.lossy == "exclude"
    default = read_admission(tmp_path, KEY).digest()
    (tmp_path / "cohort.yaml").write_text("lossy: use\n")
    assert read_admission(tmp_path, KEY).digest() != default
    (tmp_path / "cohort.yaml").write_text("lossy: exclude\n")
    assert read_admission(tmp_path, KEY).digest() == default
    (tmp_path / "cohort.yaml").write_text("lossy: maybe\n")
    with pytest.raises(ConfigError):
        read_admission(tmp_path, KEY)
