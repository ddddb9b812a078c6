"""`fedqc data prepare`: says what will be done, settles what to do about the unreadable, and names nobody."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml

from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from tests.helpers.command_line import typed

SITE = {"name": "site-a", "kind": "hospital", "cohort": "trial", "nominal_patients": 50}


def site(folder: Path, *, slices: int = 24, bad: int = 0) -> Path:
    for number in range(slices):
        path = folder / "images" / f"{number:03}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(number).uniform(0, 900, (24, 24))
        write_slice(
            path,
            image,
            HeaderFacts(
                modality="CT",
                pixel_spacing_mm=1.0,
                patient_id=f"P-{number // 2}",
                study_uid=make_uid(b"s"),
                series_uid=make_uid(b"r"),
                sop_uid=make_uid(str(path).encode()),
                instance_number=number,
            ),
        )
    for number in range(bad):
        (folder / "images" / f"bad-{number}").write_bytes(bytes(300))
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    return typed(capsys, "data", "prepare", *words)


def test_it_forecasts_reconciles_and_counts_the_flow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path, bad=1)
    status, out, err = run(capsys, folder)
    assert status == 0
    assert "25 slices to decode, 0.8 MiB in the cache" in err, "a file is a slice until it is opened"
    assert out.startswith("25 files found = 24 used + 1 quarantined + 0 duplicates + 0 excluded by rule\n")
    assert "  quarantined: 1 × not-dicom" in out
    assert "24 slices of 12 patients" in out
    status, out, err = run(capsys, folder, "--format", "json")
    found = json.loads(out)
    assert "to decode" not in err
    assert (status, found["used"], found["patients"], found["site"]) == (0, 24, 12, "site-a")
    assert [step["patients"] for step in found["flow"]] == [12] * 5


def test_many_unreadable_files_are_listed_refused_and_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path, bad=2)
    status, out, err = run(capsys, folder, "--show-paths")
    assert status == 2
    assert "[too-many-quarantined]" in err
    assert f"{folder}/images/bad-1" in out  # the list to look at comes before the refusal
    assert run(capsys, folder)[0] == 2
    assert run(capsys, folder, "--accept-quarantine")[0] == 0
    assert run(capsys, folder)[0] == 0


def test_no_marker_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = site(tmp_path / "ZQ90XK", slices=4)
    keywords = (
        "PatientID",
        "PatientName",
        "StudyDescription",
        "SeriesDescription",
        "AccessionNumber",
        "InstitutionName",
        "StationName",
    )
    secrets = ["20240115", "ZQ90XK", "ZQ91XK", "ZQ92XK", "ZQ93XK"]
    for path in sorted((folder / "images").iterdir()):
        dataset = pydicom.dcmread(path)
        for number, keyword in enumerate(keywords):
            setattr(dataset, keyword, f"ZQ{number:02}XK")
        dataset.StudyDate = "20240115"
        block = dataset.private_block(0x0019, "ZQ91XK", create=True)
        block.add_new(0x01, "LO", "ZQ92XK")
        dataset.save_as(path)
        secrets += [
            str(dataset[keyword].value)
            for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
        ]
    secrets += [f"ZQ{number:02}XK" for number in range(len(keywords))]
    (folder / "images/ZQ93XK").write_bytes(b"ZQ93XK" * 60)
    (folder / "images/cut.dcm").write_bytes((folder / "images/000.dcm").read_bytes()[:-9])
    (folder / "cohort.yaml").write_text("opt_out: [ZQ00XK-not]\nexclude: {series_description: [NONE]}\n")
    said = [
        text
        for words in ((), ("--format", "json"), ("--accept-quarantine",))
        for text in run(capsys, folder, *words)[1:]
    ]
    together = "\n".join([*said, caplog.text]).replace(str(folder), "").lower()
    assert "quarantined" in together
    for secret in secrets:
        raw = secret.encode()
        for form in (
            secret,
            raw.hex(),
            base64.b64encode(raw).decode().rstrip("="),
            raw.decode().encode("utf-16-le").hex(),
        ):
            assert form.lower() not in together, secret


def test_a_killed_preparation_goes_on(tmp_path: Path) -> None:
    """The command itself, killed while it decodes: what is left is finished by the next, byte for byte as if
    nothing had been.
    """
    folder, control = site(tmp_path / "a", slices=60), tmp_path / "b"
    command = [sys.executable, "-m", "common.cli", "data", "prepare"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*command, str(folder)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        assert process.stderr is not None
        # a busy machine tells of the headers first
        assert any(line.startswith(b"60 slices to decode") for line in process.stderr)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (control / "state").mkdir(parents=True)
    for name in ("site.yaml", "state/site.key"):
        (control / name).write_bytes((folder / name).read_bytes())
    (control / "images").symlink_to(folder / "images")
    said = [
        json.loads(
            subprocess.run(
                [*command, str(path), "--format", "json"], env=environment, capture_output=True, check=True
            ).stdout
        )
        for path in (folder, control)
    ]
    assert said[0] == said[1]
    packs = [next((path / "state/cache").glob("slices-*")).read_bytes() for path in (folder, control)]
    assert packs[0] == packs[1]
