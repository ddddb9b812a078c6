"""Commands of a hospital, and those that make data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.cli import Format, FormatOption, say

data = typer.Typer(add_completion=False, no_args_is_help=True)


@data.callback()
def _data_group() -> None:
    """Make, check and inject image data."""


@data.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to make, one subfolder a site.")],
    sites: Annotated[int, typer.Option(help="How many hospitals; the last is unlike the others.")] = 4,
    patients: Annotated[int, typer.Option(min=2, help="Patients per site, 2 or 3 slices each.")] = 340,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 7,
) -> None:
    """Write a consortium of phantoms as DICOM, with labels and site.yaml."""
    from client.generate import write_consortium

    write_consortium(out, sites=sites, patients=patients, seed=seed, say=say)


@data.command()
def inject(
    src: Annotated[Path, typer.Argument(help="Folder of real images, with the folders that the map names.")],
    out: Annotated[Path, typer.Argument(help="Folder to make, one subfolder a site.")],
    map_file: Annotated[Path, typer.Option("--map", help="Which folders make up which hospital, for example configs/real_hospitals.yaml.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 7,
    gallery: Annotated[Path | None, typer.Option(help="Also write a PNG of clean and corrupted slices side by side.")] = None,
) -> None:
    """Write real clean slices, and the same slices with simulated artifacts, as site folders."""
    from client.inject import inject as write_hospitals

    write_hospitals(src, out, map_file=map_file, seed=seed, say=say, gallery=gallery)


@data.command()
def check(
    site: Annotated[Path, typer.Argument(help="Site folder, or its site.yaml.")],
    format: FormatOption = Format.text,
) -> None:
    """Say what of a site's images and labels can be used, and why the rest cannot. Changes nothing but the site's own cache."""
    from client.cohort import check_site

    found = check_site(site)
    print(json.dumps(found, ensure_ascii=False) if format is Format.json else check_text(found))


def check_text(found: dict[str, Any]) -> str:
    """The intake report for a terminal."""
    lines = [
        f"{found['found']} files found: {found['used']} used, {len(found['quarantined'])} quarantined,"
        f" {found['duplicates']} duplicates, {sum(found['excluded'].values())} excluded by rule",
        f"{found['patients']} patients",
    ]
    lines += [f"  excluded: {count} × {code}" for code, count in sorted(found["excluded"].items())]
    codes = [problem["code"] for problem in found["quarantined"]]
    for code in sorted(set(codes)):
        files = [str(problem["file"]) for problem in found["quarantined"] if problem["code"] == code]
        shown = ", ".join(files[:8]) + (", …" if len(files) > 8 else "")
        lines.append(f"  quarantined: {len(files)} × {code} (file {shown} of the sorted list)")
    for artifact, counts in found["labels"].items():
        numbers = f"{counts['present']:5d} present {counts['absent']:6d} absent {counts['not_assessed']:6d} not assessed"
        lines.append(f"  {artifact:15s} {numbers}")
    problems = found["label_problems"]
    titles = {"rows_without_image": "label rows without an image", "wrong-modality": "labels of an artifact the modality cannot show"}
    for at, title in titles.items():
        if problems[at]["count"]:
            rows = ", ".join(str(row) for row in problems[at]["rows"][:8])
            lines.append(f"  {problems[at]['count']} {title} (row {rows}{', …' if problems[at]['count'] > 8 else ''})")
    if problems["images_without_label"]:
        lines.append(f"  {problems['images_without_label']} images without a label row")
    if problems["disputed"]:
        lines.append(f"  {problems['disputed']} labels in dispute between readers, not used until they are decided")
    if problems["incomplete"]:
        lines.append(f"  {problems['incomplete']} labels read by too few, not used")
    lines.append(f"split: {found['split']}")
    return "\n".join(lines)
