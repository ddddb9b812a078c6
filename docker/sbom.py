"""List what a folder of wheels holds: a CycloneDX 1.5 bill of materials, and the licence of each package.

    python docker/sbom.py WHEELS OUT       writes OUT/sbom.cdx.json and OUT/LICENCES.csv

Standard library only: `make offline` runs it, and whoever checks a bundle can. The same wheels give the same
bytes. Format: CycloneDX 1.5 (ECMA-424), JSON.
"""

from __future__ import annotations

import csv
import email.message
import email.parser
import hashlib
import io
import json
import re
import sys
import uuid
import zipfile
from dataclasses import dataclass
from pathlib import Path

UNKNOWN = "not stated"
MAX_SHOWN = 120
"""Characters of a licence field: some packages put the whole text there."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One wheel."""

    name: str
    version: str
    licence: str
    sha256: str

    @property
    def purl(self) -> str:
        """The package URL, by which advisories name it."""
        return f"pkg:pypi/{re.sub(r'[-_.]+', '-', self.name).lower()}@{self.version.replace('+', '%2B')}"


def read_wheel(path: Path) -> Package:
    """Name, version and licence of a wheel, from its METADATA.

    Raises:
        ValueError: it is no wheel.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        if len(names) != 1:
            raise ValueError(f"{path}: not a wheel")
        metadata = email.parser.BytesParser().parsebytes(archive.read(names[0]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(
        name=str(metadata["Name"]),
        version=str(metadata["Version"]),
        licence=licence_of(metadata),
        sha256=digest,
    )


def licence_of(metadata: email.message.Message) -> str:
    """What a package says of its licence: the expression (PEP 639), else the classifiers, else free text."""
    classifiers = [
        str(one).rpartition(" :: ")[2]
        for one in metadata.get_all("Classifier", [])
        if str(one).startswith("License :: ") and str(one).count(" :: ") > 1
    ]
    stated = metadata.get("License-Expression") or "; ".join(classifiers) or metadata.get("License") or ""
    return " ".join(str(stated).split())[:MAX_SHOWN] or UNKNOWN


def bill(packages: list[Package]) -> str:
    """The bill of materials, JSON."""
    parts = [
        {
            "type": "library",
            "bom-ref": one.purl,
            "name": one.name,
            "version": one.version,
            "purl": one.purl,
            "hashes": [{"alg": "SHA-256", "content": one.sha256}],
            "licenses": [{"license": {"name": one.licence}}],
        }
        for one in packages
    ]
    # as the format has it, and the same for the same wheels
    number = uuid.uuid5(uuid.NAMESPACE_URL, " ".join(f"{one.purl} {one.sha256}" for one in packages))
    head = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
    }
    return json.dumps(head | {"components": parts}, indent=1, ensure_ascii=False) + "\n"


def licences(packages: list[Package]) -> str:
    """One line a package, CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("package", "version", "licence"))
    writer.writerows((one.name, one.version, one.licence) for one in packages)
    return text.getvalue()


def main(wheels: Path, out: Path) -> None:
    packages = sorted(map(read_wheel, wheels.glob("*.whl")), key=lambda one: one.purl)
    (out / "sbom.cdx.json").write_text(bill(packages), encoding="utf-8")
    (out / "LICENCES.csv").write_text(licences(packages), encoding="utf-8")
    print(f"{out}/sbom.cdx.json, {out}/LICENCES.csv: {len(packages)} packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
