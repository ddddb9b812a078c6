"""Read, decode and verify a site's images before a run (`fedqc data prepare`).

What is written goes into the site's state folder. Sources are read, never changed, moved or deleted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.data.cohort import SiteSlices, admit_assessed, admit_quarantine, load_cohort, site_slices
from client.data.inclusion import ADMISSION_CODES
from client.dicom.index import meaning
from client.dicom.patients import without_id
from client.site.config import read_site
from client.site.kind import admit_kind
from common.errors import DataError
from common.plan import RunPlan
from common.progress_bar import Progress, progress_shown, say


def prepare(
    site: Path, *, size: int, accept: Callable[[DataError], bool]
) -> tuple[SiteSlices, DataError | None]:
    """Bring a site's cache up to date: what could not be read is tried again, what is stored is verified.

    Args:
        accept: asked where more files are quarantined than a run takes unseen; whether to go on with the
            rest.
    Returns:
        the slices, and the refusal (`too-many-quarantined`) where nobody accepted.
    Raises:
        DataError, ConfigError: as `site_slices`.
    """
    with _forecasting(size) as progress:
        found = site_slices(site, size=size, progress=progress, again=True, verify=True)
    try:
        admit_quarantine(found, accept=False)
    except DataError as refusal:
        if not accept(refusal):
            return found, refusal
        admit_quarantine(found, accept=True)
    return found, None


def index_to_freeze(site_yaml: Path, plan: RunPlan) -> str:
    """The index version that runs of a plan begin with if it is approved now. What a first round would do
    with the data is done, so that the operator sees what it would refuse.

    Raises:
        DataError, ConfigError: as `load_cohort`; where the site trains as `admit_assessed`.
        RefusedError: `split-differs`, `kind-undeclared`.
    """
    site, folder = read_site(site_yaml)
    admit_kind(site, folder, again=True)
    with _forecasting(plan.image_size) as progress:
        site_slices(site_yaml, size=plan.image_size, progress=progress)
    trains = plan.trains_at(site.name)
    cohort = load_cohort(
        site_yaml,
        size=plan.image_size,
        plan_split=plan.split_at(site.name),
        labels=plan.model.labels,
    )
    if trains:
        admit_assessed(cohort, injects=plan.training.inject is not None)
    return cohort.fingerprint


def report(found: SiteSlices, *, size: int, show_paths: bool) -> dict[str, Any]:
    """What was prepared. No path unless `show_paths`, which is for the hospital's own terminal."""
    intake = found.slices.intake
    said: dict[str, Any] = {
        "site": found.site.name,
        "index": found.slices.fingerprint,
        "size": size,
        "cache_bytes": len(intake.records) * size * size * 2,
        "patients": len({record.patient for record in intake.records}),
        "opt_out": asdict(found.admission.opt_outs(found.slices)),
        "patient_id_missing": without_id(intake.records, found.site.patients),
        **intake.public(),
    }
    if show_paths:
        said["quarantined"] = [
            {"file": problem.number, "code": problem.code, "detail": problem.detail}
            for problem in intake.quarantined
        ]
    return said


def report_text(said: dict[str, Any]) -> str:
    """The report for a terminal: the flow of counts, then each code with what it means."""
    excluded, quarantined = said["excluded"], Counter(problem["code"] for problem in said["quarantined"])
    lines = [
        f"{said['found']} files found = {said['used']} used + {len(said['quarantined'])} quarantined + "
        f"{said['duplicates']} duplicates"
        f" + {sum(excluded.values())} excluded by rule",
        f"{'':36s}{'files':>9s}{'slices':>9s}{'patients':>10s}",
    ]
    lines += [
        f"  {step['step']:34s}{step['files']:9d}{step['slices']:9d}{step['patients']:10d}"
        for step in said["flow"]
    ]
    lines += [f"  excluded: {count} × {code} ({_meaning(code)})" for code, count in sorted(excluded.items())]
    for code, count in sorted(quarantined.items()):
        files = [problem["file"] for problem in said["quarantined"] if problem["code"] == code]
        shown = ", ".join(map(str, files[:8])) + (", …" if len(files) > 8 else "")
        lines.append(f"  quarantined: {count} × {code} ({_meaning(code)}): file {shown} of the sorted list")
    lines += [
        f"    {problem['file']}: {problem['detail']}"
        for problem in said["quarantined"]
        if "detail" in problem
    ]
    opt_out = said["opt_out"]
    lines.append(f"opt-out list: listed {opt_out['listed']}, found {opt_out['found']} in this folder")
    if opt_out["near"]:
        lines.append(f"  [opt-out-alike] {opt_out['near']} patients in use: see fedqc data check")
    if opt_out["without_id"]:
        lines.append(f"  [opt-out-without-id] {opt_out['without_id']} slices: see fedqc data check")
    if said["patient_id_missing"]:
        lines.append(f"  [patient-id-missing] {said['patient_id_missing']} slices: see fedqc data check")
    lines.append(
        f"index {said['index']}: {said['slices']['used']} slices of {said['patients']} patients, "
        f"{said['cache_bytes'] >> 20} MiB"
    )
    return "\n".join(lines)


def _meaning(code: str) -> str:
    return ADMISSION_CODES.get(code) or meaning(code)


@contextmanager
def _forecasting(size: int) -> Iterator[Progress]:
    """Progress that says, before slices are decoded, how many there are and what they will take at `size`."""
    with progress_shown() as shown:

        def show(stage: str, done: int, total: int) -> None:
            if (stage, done) == ("slices", 0):
                say(f"{total} slices to decode, {total * size * size * 2 / (1 << 20):.1f} MiB in the cache")
            shown(stage, done, total)

        yield show
