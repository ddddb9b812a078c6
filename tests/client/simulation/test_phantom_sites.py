"""Generated hospitals: the same arguments give the same files, whole or not at all, and intake takes all of
them.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pydicom
import pytest
import yaml

from client.data.cohort import check_site, load_cohort
from client.simulation.phantom_sites import appearances_for, write_consortium, write_site
from client.site.config import BUCKETS, nominal_bucket, read_site
from common.artifacts import DEFAULT_LABELS, can_occur
from common.errors import ConfigError
from common.files import whole_folder
from common.physics.appearance import PUBLIC_APPEARANCES, SITE_APPEARANCES
from tests.helpers.consortium import PATIENTS, SITES


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pair") / "data"
    write_consortium(out, sites=2, patients=3, seed=11, say=lambda _: None)
    return out


def test_the_same_arguments_give_the_same_files(pair: Path, tmp_path: Path) -> None:
    write_consortium(tmp_path / "again", sites=2, patients=3, seed=11, say=lambda _: None)
    assert digests(tmp_path / "again") == digests(pair)


def test_another_seed_gives_other_patients_and_another_key(pair: Path, tmp_path: Path) -> None:
    write_site(tmp_path / "hospital-a", "hospital-a", appearances_for(2)[0], patients=3, seed=12)
    mine, theirs = digests(tmp_path / "hospital-a"), digests(pair / "hospital-a")
    for name in ("images/p0000_0.dcm", "labels.csv", "state/site.key"):
        assert mine[name] != theirs[name]


def test_two_sites_share_no_image_and_no_identifier(pair: Path) -> None:
    first, second = (pair / site / "images" for site in ("hospital-a", "hospital-b"))
    assert not set(digests(first).values()) & set(digests(second).values())
    uids = [
        {str(pydicom.dcmread(path).SOPInstanceUID) for path in folder.iterdir()} for folder in (first, second)
    ]
    assert not uids[0] & uids[1]


def test_a_site_says_that_nobody_is_behind_it(pair: Path) -> None:
    for name in ("hospital-a", "hospital-b"):
        site, folder = read_site(pair / name)
        assert (site.name, site.kind, folder) == (name, "synthetic", pair / name)
        assert "phantom" in (site.stand_in or "")
        header = pydicom.dcmread(next((pair / name / "images").iterdir()))
        assert str(header.PatientID).startswith("PHANTOM-")
        assert "PatientBirthDate" not in header or not header.PatientBirthDate


def test_its_key_is_readable_by_its_owner_only(pair: Path) -> None:
    key = pair / "hospital-a" / "state" / "site.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700


def test_intake_uses_every_image_and_every_label(data: Path) -> None:
    for name in SITES:
        found = check_site(data / name, size=32)
        assert found["used"] == found["found"] == len(list((data / name / "images").iterdir()))
        assert found["patients"] == PATIENTS
        assert found["quarantined"] == []
        assert found["label_problems"]["images_without_label"] == 0


def test_every_site_has_every_modality_and_every_artifact_with_and_without(data: Path) -> None:
    for name in SITES:
        cohort = load_cohort(data / name, size=32)
        assert set(cohort.modality.tolist()) == {0, 1}
        for column in range(len(DEFAULT_LABELS)):
            assert {0.0, 1.0} <= set(cohort.labels[:, column].tolist())


def test_labels_are_blank_where_the_artifact_cannot_occur(pair: Path) -> None:
    with (pair / "hospital-a" / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        modality = pydicom.dcmread(pair / "hospital-a" / "images" / row["file"]).Modality
        for name in DEFAULT_LABELS:
            assert (row[name] == "") == (not can_occur(name, modality))
        assert "ct_motion" not in row


@pytest.mark.parametrize(
    ("patients", "bucket"), [(0.5, 1), (1, 1), (49.9, 20), (50, 50), (204, 200), (10**6, 10000)]
)
def test_the_nominal_number_is_a_public_bucket_not_above_the_patients(patients: float, bucket: int) -> None:
    assert nominal_bucket(patients) == bucket
    assert bucket in BUCKETS


def test_the_last_site_looks_like_none_of_the_others() -> None:
    for sites in (2, 4, 9):
        *ordinary, outside = appearances_for(sites)
        assert len(ordinary) == sites - 1
        assert outside.manufacturer not in {appearance.manufacturer for appearance in ordinary}


def test_no_site_looks_like_the_coordinators_public_set() -> None:
    assert not {appearance.manufacturer for appearance in SITE_APPEARANCES} & {
        appearance.manufacturer for appearance in PUBLIC_APPEARANCES
    }


@pytest.mark.parametrize("sites", [-1, 0, 1, 27])
def test_a_number_of_sites_without_meaning_is_refused(sites: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_consortium(tmp_path / "x", sites=sites, patients=3, seed=1, say=lambda _: None)
    assert caught.value.code == "bad-argument"
    assert list(tmp_path.iterdir()) == []


def test_what_lies_there_is_never_overwritten(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    before = digests(pair)
    for out in (pair, tmp_path / "file"):
        with pytest.raises(ConfigError) as caught:
            write_consortium(out, sites=2, patients=3, seed=1, say=lambda _: None)
        assert caught.value.code == "output-exists"
    assert digests(pair) == before


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / "x") as staging:
            (staging / "half").write_text("written", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with whole_folder(tmp_path / "x") as staging:
        (staging / "whole").write_text("written", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o755


def test_site_yaml_is_plain_yaml(pair: Path) -> None:
    values = yaml.safe_load((pair / "hospital-a" / "site.yaml").read_text(encoding="utf-8"))
    assert list(values) == ["name", "kind", "cohort", "nominal_patients", "stand_in"]


def test_patients_of_several_series_have_them_in_one_study(tmp_path: Path) -> None:
    appearance = appearances_for(2)[0]
    write_site(tmp_path / "hospital-a", "hospital-a", appearance, patients=3, seed=12, series=2)
    headers = [pydicom.dcmread(path) for path in sorted((tmp_path / "hospital-a" / "images").iterdir())]
    patients = {str(header.PatientID) for header in headers}
    assert len(patients) == len({str(header.StudyInstanceUID) for header in headers}) == 3
    assert len({str(header.SeriesInstanceUID) for header in headers}) == 6
    assert len({str(header.SOPInstanceUID) for header in headers}) == len(headers)
    with pytest.raises(ConfigError, match="--series 9: must be 1 to 4"):
        write_consortium(tmp_path / "many", sites=2, patients=3, seed=1, say=lambda _: None, series=9)
