"""What a bundle holds is listed: packages, hashes, licences; and how to report a weakness is said."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.command_line import ROOT

BSD = "Classifier: License :: OSI Approved :: BSD License"
SBOM = ROOT / "docker" / "sbom.py"


def wheel(folder: Path, name: str, version: str, *fields: str) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    text = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *fields, "", "Text."])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", text)
        archive.writestr(f"{name}/vendored.dist-info/other", "")
    return path


def listed(wheels: Path, out: Path) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-I", str(SBOM), str(wheels), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_bill_names_every_wheel_with_hash_and_licence(tmp_path: Path) -> None:
    paths = [
        wheel(tmp_path, "Zope_Thing", "1.0", "License-Expression: Apache-2.0 OR MIT"),
        wheel(tmp_path, "torch", "2.13.0+cpu", "License: BSD 3", BSD),
        wheel(tmp_path, "plain", "3", "License: Some\n        text of\n        its own"),
        wheel(tmp_path, "silent", "4"),
    ]
    assert listed(tmp_path, tmp_path / "out").returncode == 0
    bill = json.loads((tmp_path / "out" / "sbom.cdx.json").read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.5", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    found = {one["purl"]: one for one in bill["components"]}
    assert list(found) == [
        "pkg:pypi/plain@3",
        "pkg:pypi/silent@4",
        "pkg:pypi/torch@2.13.0%2Bcpu",
        "pkg:pypi/zope-thing@1.0",
    ]
    for path, purl in zip(
        paths, ("zope-thing@1.0", "torch@2.13.0%2Bcpu", "plain@3", "silent@4"), strict=True
    ):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found[f"pkg:pypi/{purl}"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    with (tmp_path / "out" / "LICENCES.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["package"]: row["licence"] for row in csv.DictReader(file)}
    assert rows == {
        "Zope_Thing": "Apache-2.0 OR MIT",
        "torch": "BSD License",
        "plain": "Some text of its own",
        "silent": "not stated",
    }


def test_the_same_wheels_give_the_same_bytes(tmp_path: Path) -> None:
    wheel(tmp_path, "one", "1")
    for name in ("a", "b"):
        assert listed(tmp_path, tmp_path / name).returncode == 0
    for file in ("sbom.cdx.json", "LICENCES.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_is_no_wheel_ends_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x-1-py3-none-any.whl", "w") as archive:
        archive.writestr("nothing", "")
    ended = listed(tmp_path, tmp_path / "out")
    assert ended.returncode != 0
    assert "not a wheel" in ended.stderr


def test_make_offline_writes_both_and_covers_them_by_its_sums() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = makefile[makefile.index("\noffline:") :]
    assert "docker/sbom.py $(OFFLINE)/wheels $(OFFLINE)" in target
    sums = next(line for line in target.splitlines() if "> SHA256SUMS" in line)
    assert {"sbom.cdx.json", "LICENCES.csv"} <= set(sums.split())


def test_make_audit_looks_up_every_version_that_is_pinned_and_resolves_nothing() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = makefile[makefile.index("\naudit:") : makefile.index("\n# Trains the public start")]
    assert "--requirement constraints.txt --no-deps --disable-pip" in target
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 50
    unpinned = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert unpinned == [], "pip-audit --disable-pip takes exact versions only"


@pytest.mark.parametrize("words", ["## Report", "## What to expect", "## Dependencies", "docs/security.md"])
def test_the_project_says_how_to_report_a_weakness(words: str) -> None:
    assert words in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
