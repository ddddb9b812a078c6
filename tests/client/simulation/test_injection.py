"""Real slices become site folders: no block is in two parts, nothing of the original header goes on, a label
says what can be seen.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

from client.data.cohort import load_cohort
from client.dicom.dicom import read_pixels
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.dicom.sources import find_files
from client.simulation.injection import (
    MANIFEST,
    Folder,
    Versions,
    cut,
    inject,
    load,
    read_map,
    read_source_labels,
    take,
    versions_of,
)
from client.site.config import read_site
from client.site.policy import admit_training, default_policy
from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError, DataError, FedqcError, RefusedError
from common.physics import SIMULATORS, replay
from common.physics.acquisition import uniform
from tests.helpers.injected import BOTH, X, Y, ct_slice, digests, mr_slice, rows_of, run, write_map

REAL = os.environ.get("FEDQC_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")
REAL_MAP = Path(__file__).parents[3] / "configs" / "real_hospitals.yaml"
SECRETS = ("SECRET-7", "Clinic of Nowhere", "20190423", "1.2.3.4.5")


def paths_in(folder: Path) -> list[Path]:
    return [source.path for source in find_files(folder)]


def source(root: Path, *, ct: int = 5, mr: int = 8, kinds: int = 3, image: np.ndarray | None = None) -> Path:
    """A folder of "real" images with identifiers, and its label file."""
    rows = ["file,label,confidence,basis"]
    wanted = [("scanner_ct", position, 0) for position in range(ct)]
    wanted += [("scanner_mr", position, kind) for position in range(mr) for kind in range(kinds)]
    for folder, position, kind in wanted:
        path = root / folder / f"{position}_{kind}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        is_ct = folder == "scanner_ct"
        pixels = ct_slice(position) if is_ct else mr_slice(position, kind)
        write_slice(
            path,
            pixels if image is None else image,
            HeaderFacts(
                modality="CT" if is_ct else "MR",
                pixel_spacing_mm=5.0,
                patient_id="SECRET-7",
                study_uid="1.2.3.4.5.1",
                series_uid="1.2.3.4.5.2",
                sop_uid=make_uid(f"1.2.3.4.5/{path}".encode()),
                instance_number=10 * position + kind,
                slice_position_mm=-300 + 4.0 * position,
                manufacturer="ACME",
            ),
        )
        dataset = pydicom.dcmread(path)
        dataset.InstitutionName, dataset.StudyDate = "Clinic of Nowhere", "20190423"
        dataset.save_as(path)
        rows.append(f"{folder}/{path.name},no_artifact,medium,eye")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """SRC, OUT and the map."""
    root = tmp_path_factory.mktemp("inject")
    src, map_file = source(root / "src"), write_map(root / "map.yaml", BOTH)
    torch.set_num_threads(1)
    run(src, root / "out", map_file)
    return src, root / "out", map_file


def test_all_versions_of_a_block_are_in_one_part(made: tuple[Path, Path, Path]) -> None:
    rows = rows_of(made[1] / "h1")
    parts: dict[str, set[str]] = {}
    for row in rows:
        block = re.fullmatch(r"(h1-(?:ct1|mr2)-b\d\d)-v\d\d-\d\.dcm", row["file"])
        assert block is not None
        parts.setdefault(block[1], set()).add(row["part"])
    assert all(len(of_block) == 1 for of_block in parts.values())
    assert {part for of_block in parts.values() for part in of_block} == {"train", "test"}


def test_images_of_one_position_are_one_position_and_no_position_is_used_twice(
    made: tuple[Path, Path, Path],
) -> None:
    src, _, map_file = made
    taken = take(src, read_map(map_file).hospitals["h1"][1], read_source_labels(src / "labels.csv"))
    assert [len(images) for images in taken.positions] == [3] * 8
    blocks = cut(taken.positions, slices=2, gap=1, part=None, test_share=0.4)
    where = [[taken.positions.index(position) for position in block.positions] for block in blocks]
    assert where == [[0, 1], [3, 4], [6, 7]]  # a gap between any two
    assert [block.part for block in blocks] == ["train", "test", "train"]  # the test block is not at an end


@pytest.mark.parametrize(("positions", "tests"), [(2, 0), (3, 0), (5, 1), (14, 2), (20, 3), (24, 3)])
def test_parts_are_about_sixty_to_forty_and_one_block_alone_trains(positions: int, tests: int) -> None:
    blocks = cut([()] * positions, slices=2, gap=1, part=None, test_share=0.4)
    assert [block.part for block in blocks].count("test") == tests
    assert blocks[0].part == "train"


def test_the_folder_is_a_site_and_every_file_is_used(made: tuple[Path, Path, Path]) -> None:
    cohort = load_cohort(made[1] / "h1")
    assert cohort.site.kind == "public"
    assert cohort.site.stand_in is not None
    assert "same person" in cohort.site.stand_in
    assert len(cohort.records) == cohort.report.intake.found == len(rows_of(made[1] / "h1"))
    assert cohort.report.intake.shared_uids == 0
    assert set(cohort.vendors) == {"ACME"}


def test_the_default_policy_refuses_the_private_arm(made: tuple[Path, Path, Path]) -> None:
    site, _ = read_site(made[1] / "h1")
    assert site.nominal_patients == 2  # 1 CT block and 2 MR blocks train: 3, rounded down to a public bucket
    with pytest.raises(RefusedError) as refused:
        admit_training(
            default_policy(site.kind),
            private=True,
            epsilon=8,
            delta=1e-5,
            clip_norm=1,
            nominal_patients=site.nominal_patients,
            rounds=6,
        )
    assert refused.value.code == "too-few-patients"


def test_nothing_of_the_original_header_goes_on(made: tuple[Path, Path, Path]) -> None:
    src, out, _ = made
    uids = [
        str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID)
        for path in paths_in(src)
        if path.suffix == ".dcm"
    ]
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert written
    for secret in [*SECRETS, *uids, "-300"]:
        assert not any(secret.encode() in content for content in written), secret
    one = pydicom.dcmread(next((out / "h1" / "images").iterdir()), stop_before_pixels=True)
    assert one.PatientName == "DERIVED^PUBLIC"
    assert one.ImageType[0] == "DERIVED"
    assert "simulated" in one.SeriesDescription


def test_a_clean_version_is_the_real_slice(made: tuple[Path, Path, Path]) -> None:
    src, out, map_file = made
    taken = take(src, read_map(map_file).hospitals["h1"][0], read_source_labels(src / "labels.csv"))
    (first, *_), *_ = cut(taken.positions, slices=2, gap=1, part=None, test_share=0.4)[0].positions
    real, spacing = load(first, mirrored=False)
    assert spacing == 5.0
    np.testing.assert_allclose(read_pixels(out / "h1" / "images" / "h1-ct1-b01-v01-1.dcm"), real, atol=0.51)


def test_corrupted_versions_differ_and_carry_a_severity(made: tuple[Path, Path, Path]) -> None:
    site = made[1] / "h1"
    metal = [row for row in rows_of(site) if row["metal"] == "1"]
    assert metal
    for row in metal:
        assert 0.6 <= float(row["metal_severity"]) <= 1
        assert row["motion"] == ""  # cannot occur in CT
        assert read_pixels(site / "images" / row["file"]).max() > 2000


def test_a_line_of_the_manifest_makes_the_written_image_again(made: tuple[Path, Path, Path]) -> None:
    src, out, map_file = made
    lines = [json.loads(line) for line in (out / "h1" / MANIFEST).read_text().splitlines()]
    assert [line["file"] for line in lines] == [row["file"] for row in rows_of(out / "h1")]
    folders, labels = read_map(map_file).hospitals["h1"], read_source_labels(src / "labels.csv")
    blocks = [
        cut(take(src, one, labels).positions, slices=2, gap=1, part=None, test_share=0.4) for one in folders
    ]
    for line, row in zip(lines, rows_of(out / "h1"), strict=True):
        assert set(line) == {"file", "patient", "mirrored", "seed", "artifacts"}
        assert {name: f"{one['severity']:.2f}" for name, one in line["artifacts"].items()} == {
            name: row[f"{name}_severity"] for name in DEFAULT_LABELS if row[f"{name}_severity"]
        }
        folder, block, position = map(
            int, re.fullmatch(r"h1-[cm][tr](\d)-b(\d\d)-v\d\d-(\d)\.dcm", line["file"]).groups()
        )
        kinds = blocks[folder - 1][block - 1].positions[position - 1]
        kind = uniform(torch.Generator().manual_seed(line["seed"]), 0, 1)
        clean, _ = load(kinds[int(kind * len(kinds))], mirrored=line["mirrored"])
        image = torch.from_numpy(clean)
        for one in line["artifacts"].values():
            image, _ = SIMULATORS[one["simulator"]].apply(image, replay(one["simulator"], one["params"]))
        np.testing.assert_allclose(
            read_pixels(out / "h1" / "images" / line["file"]), image.numpy(), atol=0.51
        )


def test_same_seed_same_files_and_another_seed_keeps_the_test_list(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    src, out, map_file = made
    run(src, tmp_path / "again", map_file)
    load_cohort(out / "h1")  # writes a cache, which is not part of the comparison
    same = {name: value for name, value in digests(out).items() if "/state/cache/" not in name}
    assert digests(tmp_path / "again") == same
    run(src, tmp_path / "other", map_file, seed=8)
    assert digests(tmp_path / "other") != same

    def tested(root: Path) -> set[str]:
        return {row["file"][:10] for row in rows_of(root / "h1") if row["part"] == "test"}

    assert tested(tmp_path / "other") == tested(out)


def test_an_artifact_that_changes_too_little_is_left_out(tmp_path: Path) -> None:
    water = np.where((Y / 0.5) ** 2 + (X / 0.5) ** 2 < 1, 0.0, -1000.0)  # no bone: nothing hardens the beam
    src = source(tmp_path / "src", ct=2, mr=0, image=water)
    said = run(src, tmp_path / "out", write_map(tmp_path / "map.yaml", {"h1": BOTH["h1"][:1]}))
    assert "1 × beam_hardening" in said[0]
    assert not any(row["beam_hardening"] == "1" for row in rows_of(tmp_path / "out" / "h1"))


def test_versions_pair_artifacts_of_one_modality() -> None:
    assert versions_of("CT", Versions(clean=1, each=1, together=1)) == [
        (),
        ("beam_hardening",),
        ("metal",),
        ("beam_hardening", "metal"),
    ]
    assert len(versions_of("MR", Versions())) == 2 + 3 * 2 + 3
    assert not any("motion" in version for version in versions_of("MR", Versions(), without=["motion"]))


def test_the_gallery_is_a_picture(tmp_path: Path) -> None:
    src = source(tmp_path / "src", ct=2, mr=0)
    map_file = write_map(tmp_path / "map.yaml", {"h1": BOTH["h1"][:1]})
    inject(
        src, tmp_path / "out", map_file=map_file, seed=7, say=lambda _: None, gallery=tmp_path / "sheet.png"
    )
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_a_map_shows_each_kind_of_version(tmp_path: Path) -> None:
    src = source(tmp_path / "src", ct=2, mr=2, kinds=1)
    map_file = write_map(tmp_path / "map.yaml", BOTH, versions={"clean": 1, "each": 1, "together": 1})
    said: list[str] = []
    inject(
        src,
        tmp_path / "out",
        map_file=map_file,
        seed=7,
        say=said.append,
        gallery=tmp_path / "page.html",
        language="zh",
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "磁敏感伪影与运动伪影" in page  # both together
    assert "H1-CT1-B01 train" in page
    assert not any(secret in page for secret in SECRETS)


CT: dict[str, object] = {"folder": "scanner_ct", "accept": ["no_artifact"]}


@pytest.mark.parametrize(
    ("hospitals", "fields", "code", "word"),
    [
        ({"h1": [{**CT, "folder": "scanner_xx"}]}, {}, "no-such-folder", "scanner_xx"),
        ({"h1": [{**CT, "acept": ["x"]}]}, {}, "bad-map", "acept"),
        ({"H 1": [CT]}, {}, "bad-map", "H 1"),
        ({"h1": [CT]}, {"gapp": 1}, "bad-map", "gapp"),
        ({"h1": [CT]}, {"gap": 0}, "bad-map", "gap"),
        ({"h1": [CT], "h2": [CT]}, {}, "bad-map", "twice"),
        ({"h1": [{**CT, "folder": "../src/scanner_ct"}]}, {}, "bad-map", "folder"),
        ({"h1": [{**CT, "accept": ["unlabelled"]}]}, {}, "bad-map", "looked_at"),
        ({"h1": [{**CT, "accept": ["no_artefact"]}]}, {}, "no-usable-images", "scanner_ct"),
        ({"h1": [{**CT, "exclude": {"9.dcm": "blurred"}}]}, {}, "bad-map", "9.dcm"),
        ({"h1": [{**CT, "without": {"metall": "none"}}]}, {}, "bad-map", "metall"),
        ({"h1": [CT]}, {"severity": {"low": 0.9, "high": 0.5}}, "bad-map", "low"),
        ({"h1": [CT]}, {"labels": "no.csv"}, "labels-missing", "no.csv"),
    ],
)
def test_a_wrong_map_is_refused_with_the_word(
    made: tuple[Path, Path, Path],
    tmp_path: Path,
    hospitals: dict[str, object],
    fields: dict[str, object],
    code: str,
    word: str,
) -> None:
    with pytest.raises(FedqcError) as refused:
        run(made[0], tmp_path / "out", write_map(tmp_path / "map.yaml", hospitals, **fields))
    assert isinstance(refused.value, ConfigError | DataError)
    assert refused.value.code == code
    assert word in refused.value.message
    assert "\n" not in refused.value.message
    assert refused.value.hint
    assert not (tmp_path / "out").exists()


def test_missing_source_and_existing_output_are_refused(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    src, out, map_file = made
    for arguments, code in (
        ((tmp_path / "no", tmp_path / "o"), "no-such-folder"),
        ((src, out), "output-exists"),
    ):
        with pytest.raises(ConfigError) as refused:
            run(*arguments, map_file)
        assert refused.value.code == code
    with pytest.raises(ConfigError) as refused:
        run(src, tmp_path / "o", tmp_path / "no.yaml")
    assert refused.value.code == "no-such-map"


@needs_real_data
def test_the_map_of_real_hospitals_names_what_is_there() -> None:
    assert REAL is not None
    wanted, root = read_map(REAL_MAP), Path(REAL)
    labels = read_source_labels(root / wanted.labels)
    assert list(wanted.hospitals) == ["h1", "h2", "h3", "unseen"]
    for name, folders in wanted.hospitals.items():
        for one in folders:
            taken = take(root, one, labels)
            assert taken.found == sum(map(len, taken.positions)) + sum(taken.skipped.values())
            blocks = cut(
                taken.positions,
                slices=one.slices or wanted.slices,
                gap=one.gap or wanted.gap,
                part=one.part,
                test_share=0.4,
            )
            used = [source.path for block in blocks for position in block.positions for source in position]
            assert len(used) == len(set(used))
            parts = {block.part for block in blocks}
            if name == "unseen":
                assert parts == {"test"}
            else:
                assert parts == (
                    {"train"} if one.folder == "site_ct_ge_lightspeed_qiicr" else {"train", "test"}
                )


IDENTIFYING = [
    "PatientID",
    "PatientName",
    "InstitutionName",
    "InstitutionAddress",
    "StationName",
    "OperatorsName",
    "AccessionNumber",
    "DeviceSerialNumber",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
    "StudyDate",
    "SeriesDate",
    "AcquisitionDate",
    "ContentDate",
    "PatientBirthDate",
    "StudyTime",
]


@needs_real_data
def test_real_identifiers_do_not_go_on(tmp_path: Path) -> None:
    """A reduced map: H3's CT, and the Verio as a site that both trains and tests."""
    assert REAL is not None
    wanted = read_map(REAL_MAP)
    folders = [wanted.hospitals["h3"][0], wanted.hospitals["unseen"][0].model_copy(update={"part": None})]
    hospitals = {"h3": [one.model_dump(exclude_none=True) for one in folders]}
    run(Path(REAL), tmp_path / "out", write_map(tmp_path / "map.yaml", hospitals, labels=wanted.labels))
    secrets: set[str] = set()
    for one in folders:
        for path in paths_in(Path(REAL) / one.folder):
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
            secrets |= {str(dataset.get(word, "")) for word in IDENTIFYING} | {path.name, one.folder}
    secrets = {secret for secret in secrets if len(secret) >= 6}
    assert len(secrets) > 30
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in content]
    rows = rows_of(tmp_path / "out" / "h3")
    # 3 files: its test cell is n = 0
    assert {row["part"] for row in rows if row["file"].startswith("h3-ct")} == {"train"}
    assert {row["part"] for row in rows if row["file"].startswith("h3-mr")} == {"train", "test"}
    cohort = load_cohort(tmp_path / "out" / "h3")
    assert cohort.report.slices_by_modality["CT"] >= 6


def test_a_folder_needs_a_label_to_accept() -> None:
    with pytest.raises(ValueError, match="accept"):
        Folder.model_validate({"folder": "a", "accept": []})
