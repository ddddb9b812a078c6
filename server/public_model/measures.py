"""Make common/measures.json: mean and standard deviation of image-quality metrics over a public MRIQC table.

    python -m server.public_model.measures TABLE.tsv "name and licence of the table"

The packaged one is of ds030 (UCLA Consortium for Neuropsychiatric Phenomics, OpenNeuro, CC0), the table
`mriqc_learn/datasets/ds030.tsv` of mriqc-learn 0.0.3. Columns that are no metric are left out, and so are
`size_*` and `spacing_*`, which tell scanners apart, not good scans from bad.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np

import common.measures
from common.files import write_bytes
from common.terminal import print

NO_METRICS = ("subject_id", "participant_id", "bids_name", "site", "has_ghost")
LEFT_OUT = ("size_", "spacing_", "rater_")


def scaling_of(table: Path, source: str) -> dict[str, object]:
    """The content of measures.json, from the rows whose metrics are all finite numbers."""
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    names = [name for name in rows[0] if name not in NO_METRICS and not name.startswith(LEFT_OUT)]
    values = np.array([[_number(row[name]) for name in names] for row in rows])
    values = values[np.isfinite(values).all(axis=1)]
    deviation = values.std(axis=0, ddof=1)
    kept = np.flatnonzero(deviation > 0)
    return {
        "source": source,
        "scans": len(values),
        "names": [names[place] for place in kept],
        "mean": [float(f"{one:.6g}") for one in values.mean(axis=0)[kept]],
        "deviation": [float(f"{one:.6g}") for one in deviation[kept]],
    }


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def main() -> int:
    found = scaling_of(Path(sys.argv[1]), sys.argv[2])
    path = Path(common.measures.__file__).with_name("measures.json")
    write_bytes(path, (json.dumps(found, indent=1) + "\n").encode())
    print(f"{path}: written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
