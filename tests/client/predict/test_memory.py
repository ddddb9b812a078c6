"""`fedqc predict` keeps numbers of what it judged, and not the images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command_line import ROOT
from tests.helpers.predicted import write

SLICES = 2
STORED_KIB = 128 * 128 * 2 / 1024


def peak_kib(folder: Path, home: Path) -> int:
    """Of the process of the command, without the children that decode."""
    code = (
        "import resource, sys\n"
        "from common.cli import main\n"
        "try:\n"
        f"    main(['predict', {str(folder)!r}, '--thresholds', 'none'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "FEDQC_SITE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="KiB of resident memory")
def test_memory_over_a_thousand_studies_grows_by_less_than_half_of_their_slices(tmp_path: Path) -> None:
    peaks = {}
    for studies in (100, 1000):
        for study in range(studies):
            for number in range(SLICES):
                folder = tmp_path / str(studies) / f"{study:04d}"
                write(folder / f"{number}.dcm", SLICES * study + number, patient=f"P{study}", modality="MR")
        peaks[studies] = peak_kib(tmp_path / str(studies), tmp_path / "xdg")
    assert peaks[1000] - peaks[100] < 900 * SLICES * STORED_KIB / 2, peaks
