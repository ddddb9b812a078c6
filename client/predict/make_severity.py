"""Make the packaged maps from the public start's logits to severity, from views of public people.

    fedqc data inject SOURCES... DIR --views 400 --seed 616161 [--labels CSV]
    python -m client.predict.make_severity DIR/people [--check]

It writes `severity_small_cnn_real.json` beside this file; its hash then goes into client/predict/severity.py.
--check compares instead: the maps that are packaged are those that these views give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from client.data.cohort import load_cohort
from client.predict.model import START, find_model, score
from client.predict.severity import PACKAGED, severity_maps
from common.errors import DataError
from common.files import write_bytes
from common.learning import set_threads
from common.public_slices import Slices
from common.terminal import print

DIGITS = 4


def maps_of(site: Path) -> dict[str, Any]:
    """The content of the packaged file.

    Raises:
        DataError: the label sheet of the site says no severity often enough (`no-severities`).
    """
    model = find_model(START, None)
    cohort = load_cohort(site / "site.yaml", size=model.size, labels=model.labels)
    slices = Slices(
        images=cohort.images,
        modality=cohort.modality,
        labels=cohort.labels,
        patients=cohort.patients,
        severities=cohort.severities,
    )
    logits = score(model, slices.images, slices.modality, np.arange(len(slices.labels)))
    maps = severity_maps(logits, slices, "people", model.labels)
    if not maps:
        raise DataError(
            f"{site}: no artifact of known severity in enough slices of enough people",
            code="no-severities",
            hint="fedqc data inject SOURCES... DIR --views 400 writes such a site",
        )
    return {
        "model": START,
        "model_sha256": model.sha256,
        "maps": {name: _rounded(asdict(one)) for name, one in maps.items()},
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Fewer digits, and no two points of one logit."""
    short = {
        name: round(value, DIGITS) if isinstance(value, float) else value for name, value in values.items()
    }
    logits, first = np.unique(np.round(values["logits"], DIGITS), return_index=True)
    severities = np.round(np.asarray(values["severities"])[first], DIGITS)
    return short | {"logits": logits.tolist(), "severities": severities.tolist()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path, metavar="SITE")
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    arguments = parser.parse_args()
    set_threads(1)
    content = (json.dumps(maps_of(arguments.site), sort_keys=True) + "\n").encode("ascii")
    if arguments.check:
        same = content == PACKAGED.read_bytes()
        print(f"{PACKAGED.name}: {'is what these views give' if same else 'differs'}")
        return 0 if same else 1
    write_bytes(PACKAGED, content)
    print(f"{PACKAGED.name}: sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
