"""What the finished runs of a study say, once it is known that no site trained where it was held out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import Format
from common.errors import RunError
from common.files import write_bytes
from common.terminal import print
from server.evaluation.leave_one_out import compare_hospitals, family_of, hospitals_table
from server.evaluation.tables import PARTIAL
from server.run_folder import RunFolder, write_json

RESULTS, TABLE = "results.json", "table.txt"


def write_results(out: Path, folders: Sequence[RunFolder]) -> dict[str, Any]:
    """Write results.json and table.txt of the study whose members these are; gives what `compare_hospitals`
    does.

    Raises:
        RunError: `held-out-trained`; other sites took part in one member than in another (`other-sites`).
        ConfigError, DataError: as `family_of`.
    """
    family = family_of(folders)
    if family is None:
        raise RunError(
            f"{out}: not the same sites took part in every run of the study",
            code="other-sites",
            hint="fedqc run list shows how many took part in each; run the study again under another name",
        )
    results = compare_hospitals(family)
    _check_exclusion(results)
    write_json(out / RESULTS, results)
    write_bytes(out / TABLE, (hospitals_table(results) + "\n").encode())
    return results


def show_results(results: dict[str, Any], out: Path, format: Format) -> int:
    """Print the results of a study; gives the exit status, 6 where a member is partial."""
    if format is Format.json:
        print(json.dumps(results | {"study_folder": str(out)}, ensure_ascii=False))
    else:
        print(hospitals_table(results))
        print(f"\nstudy folder: {out}")
    return PARTIAL if any(run["status"] == "partial" for run in results["runs"]) else 0


def _check_exclusion(results: Mapping[str, Any]) -> None:
    """Raises RunError (`held-out-trained`) where the records of a run name a held-out site as a trainer."""
    for member in results["members"]:
        if trained := sorted({*member["held_out"]} & {*member["trained"]}):
            raise RunError(
                f"{member['run']}: {trained[0]} was held out, and trained",
                code="held-out-trained",
                hint="the run folder was changed by hand: remove it, and run the study again",
            )
