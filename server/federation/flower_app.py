"""Build the Flower app bundle that `flwr run` submits. It carries no code of its own.

Flower unpacks a bundle's modules in front of the installed ones. This bundle only names the *installed*
`server.app` and `client.app`, and holds the digest of the code that was installed. So no host runs code that
a coordinator ships, and each version still makes a different bundle: a hospital's node serves only the bundle
whose SHA-256 is in its kit.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from common.cli import SILENT
from common.errors import ConfigError, InternalError
from common.files import write_bytes

BUNDLE, BUNDLE_HASH = "bundle", "bundle.sha256"
ROOMS = ("server", "client", "common")
INSTALLED = Path(__file__).parents[2]
"""Folder that holds the three packages: a checkout, or the environment's site-packages."""

_PROJECT = """\
[project]
name = "fedqc"
version = "{version}"
description = "Federated quality control of CT and MRI images under differential privacy"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[tool.flwr.app]
publisher = "fedqc"
fab-include = ["/fedqc_bundle/*.py"]

[tool.flwr.app.components]
serverapp = "fedqc_bundle.coordinator:app"
clientapp = "fedqc_bundle.hospital:app"

[tool.flwr.app.config]
plan = ""
run-dir = ""
"""


def bundle_files() -> dict[str, bytes]:
    """Path inside the bundle to content."""
    digest = f'INSTALLED_SHA256 = "{installed_sha256()}"\n'
    texts = {
        "pyproject.toml": _PROJECT.format(version=version("fedqc")),
        "fedqc_bundle/__init__.py": f'"""Runs what is installed."""\n\n{digest}',
        "fedqc_bundle/coordinator.py": "from server import app as installed\n\napp = installed.app\n",
        "fedqc_bundle/hospital.py": "from client import app as installed\n\napp = installed.app\n",
    }
    return {name: text.encode() for name, text in texts.items()}


def installed_sha256() -> str:
    """Digest of the installed packages' Python files: names and contents, in order of name."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((INSTALLED / room).rglob("*.py")):
            digest.update(
                f"{path.relative_to(INSTALLED).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
            )
    return digest.hexdigest()


def write_bundle(folder: Path) -> str:
    """Write FOLDER/bundle and FOLDER/bundle.sha256 from what is installed.

    Returns:
        SHA-256 of the file that Flower makes of it, as every node sees it.
    Raises:
        ConfigError: `flwr` is not there (code `no-program`).
        InternalError: Flower does not take the bundle (code `bundle-refused`).
    """
    files = bundle_files()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".bundle.") as scratch:
        written = Path(scratch) / BUNDLE
        for name, content in files.items():
            (written / name).parent.mkdir(parents=True, exist_ok=True)
            (written / name).write_bytes(content)
        digest = hashlib.sha256(_build(written)).hexdigest()
        (folder / BUNDLE_HASH).unlink(missing_ok=True)  # never a hash beside files that it is not of
        if (folder / BUNDLE).exists():
            os.rename(folder / BUNDLE, Path(scratch) / "before")
        os.rename(written, folder / BUNDLE)
    write_bytes(folder / BUNDLE_HASH, f"{digest}\n".encode())
    return digest


def is_current(folder: Path) -> bool:
    """Whether FOLDER/bundle is what this installation makes. Byte code beside the sources does not count."""
    bundle = folder / BUNDLE
    sources = {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    return sources == bundle_files()


def find_program(name: str) -> str:
    """Path of a program of this environment, or else of PATH.

    Raises:
        ConfigError: it is not installed (code `no-program`).
    """
    path = shutil.which(name, path=search_path())
    if path is None:
        hint = "it is part of flwr; install it into the environment of fedqc: pip install 'flwr>=1.41,<1.42'"
        raise ConfigError(f"{name}: program not found on PATH", code="no-program", hint=hint)
    return path


def search_path() -> str:
    """PATH with this environment's programs first: Flower's services start each other by name."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _build(app: Path) -> bytes:
    """The bundle file that Flower makes of a folder."""
    program = find_program("flwr")
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | SILENT | {"FLWR_HOME": scratch, "PATH": search_path()}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # Flower imports the app: no byte code into the bundle
        command = [program, "build", "--app", str(app)]
        try:
            result = subprocess.run(
                command,
                cwd=scratch,
                env=environment,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=300,
                check=False,
            )
        except OSError as error:
            hint = "its interpreter must be readable by this user"
            raise ConfigError(
                f"{program}: cannot be run ({error.strerror})", code="no-program", hint=hint
            ) from None
        made = list(Path(scratch).glob("*.fab"))
        if result.returncode or len(made) != 1:
            why = " ".join((result.stderr or result.stdout).split())[:300]
            raise InternalError(f"Flower refused the bundle: {why}", code="bundle-refused")
        return made[0].read_bytes()
