"""Make the packaged thresholds of the public start, from views of public people.

    fedqc data inject SOURCES... DIR --views 400 --seed 616161 [--labels CSV]
    python -m client.predict.make_thresholds DIR/people [--check]

It writes `thresholds_small_cnn_real.json` beside this file; its hash then goes into
client/predict/operating_point.py. --check compares instead. The start has seen such people, so the figures
are optimistic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.data.cohort import load_cohort
from client.predict.model import START, find_model
from client.predict.operating_point import LEAST_PATIENTS, PACKAGED, Point, points_of
from common.errors import DataError
from common.files import write_bytes
from common.learning import set_threads
from common.public_slices import Slices
from common.terminal import print

DIGITS = 4


def thresholds_of(site: Path) -> dict[str, Any]:
    """The content of the packaged file.

    Raises:
        DataError: too few people have an artifact, or have not (`no-thresholds`).
    """
    model = find_model(START, None)
    cohort = load_cohort(site / "site.yaml", size=model.size, labels=model.labels)
    slices = Slices(
        images=cohort.images, modality=cohort.modality, labels=cohort.labels, patients=cohort.patients
    )
    points = points_of(model, slices, "people")
    if not points.patients:
        raise DataError(
            f"{site}: no artifact in {LEAST_PATIENTS} people and not in as many others",
            code="no-thresholds",
            hint="fedqc data inject SOURCES... DIR --views 400 writes such a site",
        )
    return {
        "model": START,
        "model_sha256": model.sha256,
        "images": {name: _rounded(point) for name, point in points.images.items()},
        "patients": {name: _rounded(point) for name, point in points.patients.items()},
    }


def _rounded(point: Point) -> dict[str, Any]:
    return {
        name: round(value, DIGITS) if isinstance(value, float) else value
        for name, value in asdict(point).items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path, metavar="SITE")
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    arguments = parser.parse_args()
    set_threads(1)
    content = (json.dumps(thresholds_of(arguments.site), sort_keys=True) + "\n").encode("ascii")
    if arguments.check:
        same = PACKAGED.is_file() and content == PACKAGED.read_bytes()
        print(f"{PACKAGED.name}: {'is what these views give' if same else 'differs'}")
        return 0 if same else 1
    write_bytes(PACKAGED, content)
    print(f"{PACKAGED.name}: sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
