"""Predictions as DICOM structured reports, one a study."""

from __future__ import annotations

from pathlib import Path

from client.dicom.structured_report import Said, SeriesSaid, headers_of, write_report
from client.predict.predict import Predictions
from client.site.config import read_site
from common.errors import ImagingError


def write_reports(found: Predictions, path: Path, out: Path) -> tuple[list[Path], list[int]]:
    """Write `out`/study-N.dcm for each study with a judged image.

    Args:
        path: what was judged.
    Returns:
        the files, and the numbers of studies whose headers lack what a report must repeat.
    Raises:
        ConfigError: `missing-extra`.
    """
    if path.name == "site.yaml" or (path / "site.yaml").is_file():
        config, folder = read_site(path)
        path = folder / config.images
    files = [series.images[0].file for study in found.studies for series in study.series if series.judged]
    headers = headers_of(path, files)
    origins = found.points.origins
    basis = "; ".join(f"{origin}: {', '.join(own)}" for origin, own in origins.items()) or "no thresholds"
    written, impossible = [], []
    out.mkdir(mode=0o700)
    for study in found.studies:
        judged = [series for series in study.series if series.judged]
        if not judged:
            continue
        said = [
            SeriesSaid(
                file=series.images[0].file,
                said=tuple(
                    Said(artifact=one.artifact, present=one.positive, probability=one.probability)
                    for one in series.findings
                ),
            )
            for series in judged
        ]
        target = out / f"study-{study.number}.dcm"
        try:
            write_report(
                target,
                [headers[one.file] for one in said],
                said,
                models=found.model.hashes,
                basis=f"thresholds {basis}",
            )
            written.append(target)
        except (ImagingError, KeyError):
            impossible.append(study.number)
    return written, impossible
