"""A site of real people: one version each, a pseudonym in place of the PatientID, nobody in two places."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
import yaml

from client.data.cohort import load_cohort
from client.dicom.dicom import exclusion, read_header, read_pixels
from client.simulation.injection import STAND_IN_SEVERAL, inject
from client.simulation.people import STAND_IN, Deal, deal_of, inject_people
from client.simulation.real_slices import as_square
from client.views.acquisition import acquisition_of, body_of
from client.views.corruption import MIN_CHANGED, changed_share
from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError, FedqcError
from common.physics import SIMULATORS, replay
from common.physics.acquisition import acquire
from tests.helpers.command_line import typed
from tests.helpers.injected import (
    BOTH,
    X,
    Y,
    ct_slice,
    digests,
    mr_slice,
    rows_of,
    run,
    write,
    write_map,
)

PEOPLE = os.environ.get("FEDQC_REAL_PEOPLE")
needs_people = pytest.mark.skipif(PEOPLE is None, reason="FEDQC_REAL_PEOPLE is not set")
IDS = [f"SECRET-{number:03d}" for number in range(14)]


def head(person: int, number: int) -> np.ndarray:
    return mr_slice(3 * person + number, person % 3) + 2.0 * person


def folder_of(root: Path, ids: list[str] = IDS, slices: int = 2) -> Path:
    for person, patient in enumerate(ids):
        for number in range(slices):
            # files of a person do not lie together
            write(root / f"{number}" / f"{person}.dcm", head(person, number), patient, number)
    return root


def made_of(sources: list[Path], out: Path, deal: Deal, **more: Any) -> dict[str, Any]:
    return inject_people(sources, out, deal, say=lambda _: None, progress=lambda *_: None, **more)


def patients_of(out: Path) -> dict[str, set[str]]:
    """PatientID → the sites with images of it."""
    found: dict[str, set[str]] = {}
    for path in out.rglob("images/*.dcm"):
        patient = str(pydicom.dcmread(path, stop_before_pixels=True).PatientID)
        found.setdefault(patient, set()).add(path.parts[-3])
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of people, and three sites of it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("people")
    src = folder_of(root / "src")
    made_of([src], root / "out", Deal(sites=3, seed=7))
    return src, root / "out"


def test_as_many_patients_as_people_each_at_one_site_and_in_one_part(made: tuple[Path, Path]) -> None:
    patients = patients_of(made[1])
    assert len(patients) == len(IDS)
    assert all(len(sites) == 1 for sites in patients.values())
    for site in sorted(made[1].iterdir()):
        cohort = load_cohort(site)
        assert cohort.report.intake.found == len(cohort.records)
        parts: dict[str, set[int]] = {}
        for record, part in zip(cohort.records, cohort.part, strict=True):
            parts.setdefault(record.patient, set()).add(int(part))
        assert all(len(of_patient) == 1 for of_patient in parts.values())


def test_a_person_has_one_version_in_all_slices(made: tuple[Path, Path]) -> None:
    versions: Counter[tuple[str, ...]] = Counter()
    for site in sorted(made[1].iterdir()):
        by_patient: dict[str, set[tuple[str, ...]]] = {}
        lines = [json.loads(line) for line in (site / "injected.jsonl").read_text().splitlines()]
        for row, line in zip(rows_of(site), lines, strict=True):
            assert row["file"] == line["file"]
            assert "part" not in row
            assert [row["metal"], row["beam_hardening"]] == ["", ""]  # cannot occur in MR
            present = [name for name in DEFAULT_LABELS if row[name] == "1"]
            assert present == [name for name in DEFAULT_LABELS if row[f"{name}_severity"]]
            assert len(present) <= 1
            by_patient.setdefault(line["patient"], set()).add(
                tuple(f"{name} {row[f'{name}_severity']}" for name in present)
            )
        assert all(len(of_person) == 1 for of_person in by_patient.values())
        versions.update(next(iter(of_person)) for of_person in by_patient.values())
    assert len({version[0].split()[0] for version in versions if version}) == 3
    assert () in versions


def test_the_site_says_what_its_patients_are(made: tuple[Path, Path]) -> None:
    for site in sorted(made[1].iterdir()):
        fields = yaml.safe_load((site / "site.yaml").read_text())
        people = len({path.name.split("-")[0] for path in (site / "images").iterdir()})
        assert fields["kind"] == "public"
        assert fields["stand_in"] == STAND_IN
        assert fields["nominal_patients"] <= people < 2.5 * fields["nominal_patients"] + 1


def test_no_original_identifier_is_written_and_the_pseudonym_has_a_key(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    content = [path.read_bytes() for path in made[1].rglob("*") if path.is_file()]
    assert not any(b"SECRET" in one for one in content)
    made_of([made[0]], tmp_path / "other", Deal(sites=1, seed=8))
    assert not set(patients_of(tmp_path / "other")) & set(patients_of(made[1]))


def test_same_seed_same_files_and_people_stay_where_they_are_when_others_come(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    src, out = made
    made_of([src], tmp_path / "again", Deal(sites=3, seed=7))
    same = {name: value for name, value in digests(out).items() if "/state/cache/" not in name}
    assert digests(tmp_path / "again") == {n: v for n, v in same.items() if "cache" not in n}
    more = folder_of(tmp_path / "more", [f"NEW-{number}" for number in range(4)])
    made_of([src, more], tmp_path / "larger", Deal(sites=3, seed=7))
    larger = digests(tmp_path / "larger")
    images = {name: value for name, value in same.items() if name.endswith(".dcm")}
    assert images.items() <= larger.items()
    assert len(patients_of(tmp_path / "larger")) == len(IDS) + 4


def test_one_person_in_two_folders_and_two_spellings_is_one_patient(tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a", ["abc1", "B2"], slices=1)
    b = folder_of(tmp_path / "b", ["C3", " ABC1"], slices=1)
    said: list[str] = []
    inject_people([a, b], tmp_path / "out", Deal(sites=1, seed=1), say=said.append, progress=lambda *_: None)
    assert len(patients_of(tmp_path / "out")) == 3
    assert any("more than one folder" in line for line in said)


def test_a_slice_twice_is_written_once_and_one_without_a_patient_is_left_out(tmp_path: Path) -> None:
    src = folder_of(tmp_path / "src", ["A", "B"])
    write(src / "twice.dcm", head(0, 0), "A", 9)
    write(src / "whose.dcm", head(5, 0), "", 9)
    counts = made_of([src], tmp_path / "out", Deal(sites=1, seed=1))
    assert counts["skipped"] == {"duplicate": 1, "no-patient-id": 1}
    assert counts["sites"][0]["slices"] == 4


def test_shares_artifacts_severities_and_slices_are_chosen(tmp_path: Path) -> None:
    src = folder_of(tmp_path / "src", slices=3)
    deal = deal_of(sites=1, seed=3, artifacts=["motion"], severities=[0.5, 0.8], clean_share=0.0, slices=2)
    counts = made_of([src], tmp_path / "out", deal)
    assert counts["sites"][0] == {
        "site": "hospital-a",
        "people": len(IDS),
        "slices": 2 * len(IDS),
        "versions": {"motion": len(IDS)},
    }
    severities = [float(row["motion_severity"]) for row in rows_of(tmp_path / "out" / "hospital-a")]
    assert 0.5 <= min(severities) < max(severities) <= 0.8
    counts = made_of([src], tmp_path / "clean", deal_of(sites=1, seed=3, clean_share=1.0))
    assert counts["sites"][0]["versions"] == {"clean": len(IDS)}


def test_versions_are_drawn_in_equal_shares() -> None:
    deal = Deal(sites=3, seed=7)
    drawn = Counter(deal.versions_for(f"person {number}", "MR")[0] for number in range(4000))
    assert set(drawn) == {"clean", "motion", "susceptibility", "chemical_shift"}
    assert all(900 < count < 1100 for count in drawn.values())
    sites = Counter(deal.site_of(f"person {number}") for number in range(3000))
    assert all(900 < count < 1100 for count in sites.values())


def test_a_person_who_cannot_show_the_artifact_gets_another_version(tmp_path: Path) -> None:
    water = np.where((Y / 0.5) ** 2 + (X / 0.5) ** 2 < 1, 0.0, -1000.0)  # no bone: nothing hardens the beam
    write(tmp_path / "src" / "1.dcm", water, "A", 1, ct=True)
    deal = deal_of(sites=1, seed=1, artifacts=["beam_hardening"], clean_share=0.0)
    counts = made_of([tmp_path / "src"], tmp_path / "out", deal)
    assert counts["replaced"] == {"beam_hardening": 1}
    assert rows_of(tmp_path / "out" / "hospital-a")[0]["beam_hardening"] == "0"


def test_the_manifest_makes_the_image_again(made: tuple[Path, Path]) -> None:
    site = next(made[1].iterdir())
    line = next(
        line
        for line in map(json.loads, (site / "injected.jsonl").read_text().splitlines())
        if line["artifacts"]
    )
    written = read_pixels(site / "images" / line["file"])
    clean = next(
        image
        for person in range(len(IDS))
        for number in range(2)
        for image in [torch.from_numpy(head(person, number)).float()]
        for ((_, one),) in [tuple(line["artifacts"].items())]
        if np.allclose(
            SIMULATORS[one["simulator"]].apply(image, replay(one["simulator"], one["params"]))[0].numpy(),
            written,
            atol=1.0,
        )
    )
    assert not np.allclose(clean.numpy(), written, atol=5)


def test_the_command_writes_sites_counts_and_a_contact_sheet(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "inject", str(made[0]), str(tmp_path / "out"), "--per-person", "--sites", "2"]
    status, out, _ = typed(capsys, *words, "--gallery", str(tmp_path / "sheet.png"), "--format", "json")
    printed = json.loads(out)
    assert status == 0
    assert sum(site["people"] for site in printed["sites"]) == len(IDS)
    assert printed["written"] == [str(tmp_path / "out"), str(tmp_path / "sheet.png")]
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_names_no_person(made: tuple[Path, Path], tmp_path: Path) -> None:
    made_of([made[0]], tmp_path / "out", Deal(sites=1, seed=7), gallery=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "hospital-a, person 1" in page
    assert not any(name in page for name in patients_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("SRC --per-person", "bad-argument", "OUT missing"),
        ("SRC OUT --sites 3", "bad-argument", "--per-person missing"),
        ("SRC OUT --per-person --map m.yaml", "bad-argument", "--map not allowed here"),
        ("SRC OUT --per-person --sites 0", "bad-argument", "--sites 0"),
        ("SRC OUT --per-person --sites 26", "bad-argument", "no patient"),
        ("SRC OUT --per-person --artifact ring", "unknown-artifact", "ring"),
        ("SRC OUT --per-person --artifact metal", "bad-argument", "cannot occur in MR"),
        ("SRC OUT --per-person --clean-share 2", "bad-argument", "--clean-share 2"),
        ("SRC OUT --per-person --severity 0", "bad-argument", "--severity 0"),
        ("SRC OUT --per-person --gallery g.pdf", "bad-argument", "expected .html or .png"),
        ("SRC SRC/out --per-person", "bad-argument", "folder of images"),
        ("NONE OUT --per-person", "no-such-folder", "NONE"),
    ],
)
def test_a_wrong_command_is_one_line_and_a_hint(
    made: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = typed(capsys, "data", "inject", *words.replace("SRC", str(made[0])).split())
    assert (status, out) == (2, "")
    error, hint = [line for line in err.splitlines() if line.startswith("fedqc: ")]
    assert error.startswith(f"fedqc: error [{code}]: ")
    assert said in error
    assert hint.startswith("fedqc: hint: ")
    assert list(tmp_path.iterdir()) == []


# a map's folder of several people


def test_a_block_of_a_map_holds_one_person_and_a_person_is_in_one_part(tmp_path: Path) -> None:
    src = tmp_path / "src"
    rows = ["file,label"]
    for person in range(4):
        for number in range(3):
            file = f"scanner_ct/{person}{number}.dcm"
            # people lie at the same positions
            write(src / file, ct_slice(5 * person + number), f"P{person}", number, ct=True)
            rows.append(f"{file},no_artifact")
    (src / "labels.csv").write_text("\n".join(rows) + "\n")
    map_file = write_map(tmp_path / "map.yaml", {"h1": BOTH["h1"][:1]}, slices=1, gap=1)
    said = run(src, tmp_path / "out", map_file)
    assert any(line.startswith("warning: scanner_ct holds 4 patients") for line in said)
    site = tmp_path / "out" / "h1"
    assert yaml.safe_load((site / "site.yaml").read_text())["stand_in"] == STAND_IN_SEVERAL
    parts: dict[int, set[str]] = {}
    for row in rows_of(site):
        block = int(row["file"].split("-b")[1][:2])
        parts.setdefault((block - 1) // 2, set()).add(row["part"])  # two blocks a person
    assert len(parts) == 4
    assert all(len(of_person) == 1 for of_person in parts.values())
    assert {part for of_person in parts.values() for part in of_person} == {"train", "test"}
    clean = [read_pixels(site / "images" / row["file"]) for row in rows_of(site) if row["metal"] == "0"]
    assert len(clean) >= 8
    with pytest.raises(ConfigError):
        inject(src, tmp_path / "out", map_file=map_file, seed=7, say=said.append)


# beam hardening in chests


def chest(side: int = 128) -> np.ndarray:
    """A chest with thin ribs and a porous spine, as people have them: HU."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    level = np.sqrt((y / 0.65) ** 2 + (x / 0.9) ** 2)
    image = np.where(level < 1, 30.0, -1000.0)
    for centre in (-0.42, 0.42):
        image[(y / 0.4) ** 2 + ((x - centre) / 0.3) ** 2 < 1] = -850.0
    angle = np.arctan2(y, x)
    image[(level > 0.8) & (level < 0.87) & (np.sin(9 * angle) > 0.2)] = 300.0
    image[((y - 0.38) / 0.13) ** 2 + (x / 0.14) ** 2 < 1] = 180.0
    image[(((y - 0.38) / 0.13) ** 2 + (x / 0.14) ** 2 < 1.15) & (image == 30.0)] = 350.0
    return image.astype(np.float32)


def test_beam_hardening_is_visible_in_a_chest_at_severity_one(tmp_path: Path) -> None:
    write(tmp_path / "chest.dcm", chest(), "A", 1, ct=True)
    header = read_header(tmp_path / "chest.dcm")
    image, body = torch.from_numpy(chest()), body_of(torch.from_numpy(chest()), "CT")
    simulator = SIMULATORS["beam_hardening"]
    shares = []
    for acquisition in (acquisition_of(image, header, 3.0), acquire(image, "CT", pixel_spacing_mm=3.0)):
        params = simulator.draw(1.0, torch.Generator().manual_seed(1), acquisition)
        changed, mask = simulator.apply(image, params)
        shares.append(changed_share(image, changed, mask & body, "CT"))
    assert shares[0] >= MIN_CHANGED["beam_hardening"] > shares[1]


@needs_people
def test_beam_hardening_is_drawn_in_nine_of_ten_real_chests() -> None:
    assert PEOPLE is not None
    simulator, drawn = SIMULATORS["beam_hardening"], []
    for path in sorted((Path(PEOPLE) / "ct_tcga_17").glob("*.dcm"))[::4]:
        header = read_header(path)
        if exclusion(header):
            continue
        small, spacing = as_square(read_pixels(path), header)
        image = torch.from_numpy(small)
        params = simulator.draw(1.0, torch.Generator().manual_seed(1), acquisition_of(image, header, spacing))
        changed, mask = simulator.apply(image, params)
        share = changed_share(image, changed, mask & body_of(image, "CT"), "CT")
        drawn.append(share >= MIN_CHANGED["beam_hardening"])
    assert sum(drawn) >= 0.9 * len(drawn)


@needs_people
@pytest.mark.parametrize(("folder", "people"), [("mr_cheng_a", 75), ("ct_tcga_17", 22)])
def test_real_people_are_patients(folder: str, people: int, tmp_path: Path) -> None:
    assert PEOPLE is not None
    deal = deal_of(sites=3, seed=7, slices=1)
    made_of([Path(PEOPLE) / folder], tmp_path / "out", deal)
    patients = patients_of(tmp_path / "out")
    assert len(patients) == people
    assert all(len(sites) == 1 for sites in patients.values())
    for site in sorted((tmp_path / "out").iterdir()):
        report = load_cohort(site).report.intake
        assert len(report.quarantined) == 0


def test_errors_are_ours() -> None:
    for more in ({"sites": 27}, {"artifacts": ["gost"]}, {"severities": [0.1, 0.2, 0.3]}):
        with pytest.raises(FedqcError) as refused:
            deal_of(**{"sites": 1, "seed": 1} | more)
        assert refused.value.hint
