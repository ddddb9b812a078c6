"""Series of a site become studies: slices in their order, patients apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from client.data.cohort import load_cohort
from client.data.series import series_of_records
from client.data.studies import cohort_samples
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from common.plan import Model
from common.studies import StudyImages

STUDY = Model(name="study", args={"slices": 4})


def record(number: int, **facts: Any) -> Any:
    known = {"patient": "p", "study": "x", "series": "s", "modality": "CT", "number": number, "frame": 0}
    return SimpleNamespace(**(known | {"slice_position_mm": None, "instance_number": None} | facts))


def in_order(*records: Any) -> list[list[int]]:
    """File numbers by series."""
    series, order, _ = series_of_records(records)
    assert sorted(order) == list(range(len(records)))
    return [[records[at].number for at in order if series[at] == one] for one in range(series.max() + 1)]


def test_slices_lie_along_their_normal_whatever_their_files_and_instance_numbers_say() -> None:
    records = [record(i, slice_position_mm=p, instance_number=9 - i) for i, p in enumerate([5.0, -2.5, 0.0])]
    assert in_order(*records) == [[1, 2, 0]]


@pytest.mark.parametrize("positions", [(None, None, None), (4.0, None, 1.0)])
def test_without_all_positions_instance_numbers_decide(positions: tuple[float | None, ...]) -> None:
    records = [record(i, slice_position_mm=p, instance_number=3 - i) for i, p in enumerate(positions)]
    assert in_order(*records) == [[2, 1, 0]]


def test_without_either_files_and_frames_decide() -> None:
    records = [record(4), record(2, instance_number=7), record(2, frame=1), record(1)]
    assert in_order(*records) == [[1, 2, 2, 4]]


def test_echoes_of_one_place_are_ordered_by_instance_number() -> None:
    records = [record(i, slice_position_mm=i % 2, instance_number=n) for i, n in enumerate([4, 2, 1, 3])]
    assert in_order(*records) == [[2, 0, 1, 3]]


def test_patients_modalities_and_series_are_apart_and_a_slice_without_series_stands_alone() -> None:
    records = [
        record(0),
        record(1, patient="q"),
        record(2, modality="MR"),
        record(3, series="t"),
        record(4, series=""),
        record(5, series=""),
        record(6),
    ]
    assert in_order(*records) == [[0, 6], [1], [2], [3], [4], [5]]


def test_series_of_one_patient_study_and_modality_are_a_study() -> None:
    records = [
        record(0),
        record(1, series="t"),
        record(2, series="u", study="y"),
        record(3, series="v", patient="q"),
        record(4, series="w", modality="MR"),
        record(5, series="z", study=""),
        record(6, series="z", study=""),
        record(7, series="", study=""),
        record(8),
    ]
    assert series_of_records(records).study.tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 0]


def test_a_site_of_dicom_files_becomes_studies(data: Path) -> None:
    """Phantoms have one series a patient; its slices lie at rising positions."""
    cohort = load_cohort(data / "hospital-a" / "site.yaml", size=32)
    samples = cohort_samples(cohort, STUDY)
    assert isinstance(samples.images, StudyImages)
    assert len(samples.images) == len(set(cohort.patients)) < len(cohort.images)
    assert sorted(samples.images.rows[samples.images.rows >= 0]) == list(range(len(cohort.images)))
    for number, rows in enumerate(samples.images.rows):
        own = rows[rows >= 0]
        assert set(cohort.patients[own]) == {samples.patients[number]}
        assert set(cohort.part[own]) == {samples.part[number]}
        assert set(cohort.modality[own]) == {samples.modality[number]}
        positions = [cohort.records[row].slice_position_mm for row in own]
        assert positions == sorted(positions) == [5.0 * place for place in range(len(own))]  # type: ignore[type-var]
        known = ~np.isnan(cohort.labels[own]).all(axis=0)
        assert np.array_equal(samples.labels[number, known], np.nanmax(cohort.labels[own][:, known], axis=0))
        assert np.isnan(samples.labels[number, ~known]).all()
    of_slices = cohort_samples(cohort, Model())
    assert of_slices.images is cohort.images
    assert np.array_equal(of_slices.part, cohort.part)


def test_names_of_files_do_not_decide_the_order(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for place, name in enumerate(("c", "a", "b")):
        write_slice(
            images / f"{name}.dcm",
            np.full((16, 16), 100.0 * place) + np.eye(16) * 50,
            HeaderFacts(
                modality="CT",
                pixel_spacing_mm=1.0,
                patient_id="P",
                study_uid=make_uid(b"study"),
                series_uid=make_uid(b"series"),
                sop_uid=make_uid(name.encode()),
                instance_number=3 - place,
                slice_position_mm=5.0 * place,
                slice_thickness_mm=5.0,
                manufacturer="ACME",
            ),
        )
    (tmp_path / "labels.csv").write_text("file,metal\na.dcm,1\nb.dcm,0\nc.dcm,0\n")
    (tmp_path / "site.yaml").write_text(
        "name: site-a\nkind: synthetic\ncohort: phantoms\nnominal_patients: 50\n"
    )
    samples = cohort_samples(load_cohort(tmp_path / "site.yaml", size=16), STUDY)
    assert isinstance(samples.images, StudyImages)
    assert samples.images.rows.tolist() == [[2, 0, 1, -1]]
    assert samples.images.slices[samples.images.rows[0, :3], 0, -1].tolist() == [0, 100, 200]
