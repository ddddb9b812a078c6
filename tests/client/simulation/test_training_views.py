"""Views to train a public start on: what is added is labelled, and nothing else tells the label."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.cohort import load_cohort
from client.dicom.dicom import read_header
from client.simulation.domain_randomization import CT_NUISANCES, MR_SCALE, other_protocol, randomized
from client.simulation.people import Deal, find_people
from client.simulation.real_slices import RealSlice
from client.simulation.training_views import MAX_OF_SLICE, STAND_IN, clean_slices, inject_views, view_of
from client.views.corruption import MIN_CHANGED
from common.artifacts import DEFAULT_LABELS
from common.errors import FedqcError
from common.physics.acquisition import acquire
from common.preprocess import CT_RANGE_HU
from common.progress_bar import silent
from tests.helpers.command_line import typed
from tests.helpers.injected import ct_slice, digests, mr_slice, write

MADE = 24


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sources")
    for person in range(3):
        for number in range(2):
            write(
                root / "mr one" / f"{person}-{number}.dcm",
                mr_slice(person + number, person),
                f"P-{person}",
                number,
            )
    for number in range(2):
        write(root / "ct" / f"{number}.dcm", ct_slice(number), "SECRET", number, ct=True)
    return [root / "mr one", root / "ct"]


@pytest.fixture(scope="module")
def made(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    inject_views(sources, out, MADE, seed=5, say=lambda text: None, progress=silent)
    return out


def clean_slice(sources: list[Path], which: int) -> RealSlice:
    people, _ = find_people([sources[which]], Deal(sites=1, seed=1), say=lambda text: None, progress=silent)
    return next(clean_slices(people[0], {}, Counter()))


def test_every_source_gives_as_many_views_and_its_people_take_turns(made: Path, sources: list[Path]) -> None:
    files = sorted(path.name for path in (made / "people" / "images").iterdir())
    by_source = {re.sub(r"-\d+\.dcm$", "", name) for name in files}
    assert by_source == {"01-mr-one", "02-ct"}
    headers = {name: read_header(made / "people" / "images" / name) for name in files}
    names = [headers[name].patient_id for name in files]
    assert len(files) == 2 * MADE
    assert {names.count(name) for name in set(names[:MADE])} == {MADE // 3}
    assert len(set(names[MADE:])) == 1
    assert not any("P-" in name or "SECRET" in name for name in names)


def test_the_site_is_public_and_its_cohort_has_the_labels_that_were_made(made: Path) -> None:
    cohort = load_cohort(made / "people" / "site.yaml")
    assert cohort.site.kind == "public"
    assert cohort.site.stand_in == STAND_IN
    with (made / "people" / "labels.csv").open(newline="", encoding="utf-8") as handle:
        rows = {row["file"]: row for row in csv.DictReader(handle)}
    labels = np.asarray(cohort.labels)
    assert len(labels) == len(rows) == 2 * MADE
    for record, row in zip(cohort.records, labels, strict=True):
        written = rows[record.file]
        for place, name in enumerate(DEFAULT_LABELS):
            assert written[name] == ("" if np.isnan(row[place]) else str(int(row[place])))
            assert bool(written[f"{name}_severity"]) == (row[place] == 1)
    assert 0 < np.nansum(labels) < 2 * MADE


def test_the_same_arguments_give_the_same_files(made: Path, sources: list[Path], tmp_path: Path) -> None:
    inject_views(sources, tmp_path / "again", MADE, seed=5, say=lambda text: None, progress=silent)
    again = digests(tmp_path / "again")
    assert again == {name: digest for name, digest in digests(made).items() if "/cache/" not in name}
    inject_views(sources, tmp_path / "other", 2, seed=6, say=lambda text: None, progress=silent)
    first = "people/images/01-mr-one-00001.dcm"
    assert (tmp_path / "other" / first).read_bytes() != (made / first).read_bytes()


@pytest.mark.parametrize("which", [0, 1], ids=["MR", "CT"])
def test_a_view_differs_from_its_clean_slice_exactly_where_it_is_labelled(
    sources: list[Path], which: int
) -> None:
    clean = clean_slice(sources, which)
    views = [view_of(clean, seed) for seed in range(40)]
    assert {0, 1} <= {len(view.severities) for view in views} <= {0, 1, 2}
    for view in views:
        assert np.array_equal(view.clean, view.image) == (not view.severities)
        for name, severity in view.severities.items():
            assert 0.05 <= severity <= 1
            assert view.changed[name] >= MIN_CHANGED[name] * min(1.0, severity / 0.75)
    assert len({view.clean.tobytes() for view in views}) > len(views) / 2, "looks differ"


@pytest.mark.parametrize("which", [0, 1], ids=["MR", "CT"])
def test_a_look_follows_from_its_seed_alone_and_keeps_what_the_modality_can_hold(
    sources: list[Path], which: int
) -> None:
    clean = clean_slice(sources, which)
    image = torch.from_numpy(clean.image)
    for seed in range(12):
        look, spacing = randomized(image, clean.modality, clean.spacing_mm, seed)
        again, _ = randomized(image, clean.modality, clean.spacing_mm, seed)
        assert torch.equal(look, again)
        assert look.shape[0] == look.shape[1]
        assert bool(torch.isfinite(look).all())
        assert 0.5 < spacing * look.shape[0] / (clean.spacing_mm * image.shape[0]) < 1.6
        if clean.modality == "CT":
            assert CT_RANGE_HU[0] <= float(look.min()) <= float(look.max()) <= CT_RANGE_HU[1]
        else:
            assert float(look.min()) >= 0
            assert float(look.max()) < 20 * MR_SCALE


def test_what_has_a_label_is_no_nuisance(sources: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a view would move without its label."""
    clean = clean_slice(sources, 1)
    monkeypatch.setitem(CT_NUISANCES, "ct_motion", 1.0)
    for seed in range(4):
        looks = [
            randomized(torch.from_numpy(clean.image), "CT", clean.spacing_mm, seed, labelled)[0]
            for labelled in ((), ("metal",), ("metal", "ct_motion"))
        ]
        assert torch.equal(looks[0], looks[1])
        assert not torch.equal(looks[1], looks[2])
    untouched = [
        view
        for seed in range(30)
        if not (view := view_of(clean, seed, artifacts=("metal", "ct_motion"))).severities
    ]
    expected, _ = randomized(
        torch.from_numpy(clean.image), "CT", clean.spacing_mm, _look_of(untouched[0].seed), ("ct_motion",)
    )
    assert np.array_equal(untouched[0].clean, expected.numpy())


def _look_of(seed: int) -> int:
    return int(torch.randint(2**31 - 1, (), generator=torch.Generator().manual_seed(seed)))


def test_what_is_epi_stays_epi_and_another_sequence_does_not_become_it() -> None:
    image = torch.rand(32, 32)
    for seed in range(20):
        epi = other_protocol(acquire(image, "MR", sequence="EPI", spin_echo=True), "MR", seed)
        assert epi.sequence == "EPI"
        assert epi.spin_echo
        assert other_protocol(acquire(image, "MR", sequence="SE"), "MR", seed).sequence in ("SE", "GRE")


def test_slices_that_a_sheet_does_not_call_clean_are_left_out(sources: list[Path], tmp_path: Path) -> None:
    sheet = sources[0].parent / "sheet.csv"
    sheet.write_text(
        "file,label\nmr one/0-0.dcm,motion\nmr one/0-1.dcm,no_artifact\nmr one/1-0.dcm,\n", encoding="utf-8"
    )
    found = inject_views(
        [sources[0]], tmp_path / "out", 1000, seed=5, labels=sheet, say=lambda text: None, progress=silent
    )
    assert found["skipped"] == {"marked": 1}
    (one,) = found["sources"]
    assert (one["people"], one["slices"], one["views"]) == (3, 5, 5 * MAX_OF_SLICE)


def test_images_without_a_patient_id_are_one_person(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / "in" / f"{number}.dcm", mr_slice(number, 0), "", number)
    found = inject_views(
        [tmp_path / "in"], tmp_path / "out", 4, seed=5, say=lambda text: None, progress=silent
    )
    assert found["sources"][0]["people"] == 1
    assert found["skipped"] == {}


@pytest.mark.parametrize(
    ("options", "code", "shown"),
    [
        ("--views 0", "bad-argument", "--views 0"),
        ("--views 2 --severity 1.5", "bad-argument", "--severity 1.5"),
        ("--views 2 --sites 3", "bad-argument", "--sites not allowed"),
        ("--labels x.csv", "bad-argument", "--views missing"),
        ("--views 2 --labels none.csv", "labels-missing", "cannot be read"),
    ],
)
def test_wrong_options_are_one_line(
    sources: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    code: str,
    shown: str,
) -> None:
    status, out, err = typed(capsys, "data", "inject", sources[0], tmp_path / "out", *options.split())
    assert (status, out) == (2, "")
    assert f"[{code}]" in err
    assert shown in err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("FEDQC_REAL_PEOPLE" not in os.environ, reason="FEDQC_REAL_PEOPLE is not set")
def test_views_of_real_people_show_every_artifact() -> None:
    folder = Path(os.environ["FEDQC_REAL_PEOPLE"]) / "ct_tcga_50"
    clean = clean_slice([folder], 0)
    shown = {name for seed in range(30) for name in view_of(clean, seed).severities}
    assert shown == {"metal", "beam_hardening"}


def test_an_error_names_no_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(FedqcError):
        inject_views([tmp_path / "in"], tmp_path / "out", 1, seed=1, say=print, progress=silent)
    assert not (tmp_path / "out").exists()
