"""Commands of a hospital, and those that make data."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import Format, FormatOption, confirmed, say
from common.errors import ConfigError

if TYPE_CHECKING:
    from client.sheets import SheetProblems


class Per(StrEnum):
    image = "image"
    series = "series"


data = typer.Typer(add_completion=False, no_args_is_help=True)


@data.callback()
def _data_group() -> None:
    """Make, check, prepare, label and inject image data."""


@data.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to make, one subfolder a site.")],
    sites: Annotated[int, typer.Option(help="How many hospitals; the last is unlike the others.")] = 4,
    patients: Annotated[int, typer.Option(min=2, help="Patients per site, 2 or 3 slices each.")] = 340,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 7,
    public: Annotated[bool, typer.Option("--public", help="Instead: one site, `public`, for configs/plans/pretrain_phantom.yaml.")] = False,
) -> None:
    """Write a consortium of phantoms as DICOM, with labels and site.yaml."""
    from client.generate import write_consortium, write_public

    if public:
        write_public(out, patients=patients, seed=seed, say=say)
    else:
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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Site folder, its site.yaml, or any folder with images.")],
    format: FormatOption = Format.text,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with contact sheets. It shows images.")] = None,
    against_training: Annotated[
        bool, typer.Option("--against-training", help="Compare with the patients that this site's model was trained on.")
    ] = False,
    training_profile: Annotated[
        Path | None, typer.Option("--training-profile", help="Compare with this profile, or with the newest one of this site folder.")
    ] = None,
    show_paths: Annotated[
        bool, typer.Option("--show-paths", help="List the quarantined files, and what is behind names like other-3f2a, on stderr.")
    ] = False,
    lang: Annotated[str, typer.Option("--lang", help="Language of text and page: en or zh.")] = "en",
) -> int:
    """Say what images and labels are good for: ready, ready with warnings (status 0) or not ready (2), and what to do. Changes nothing but
    the site's own state; of a folder without site.yaml, a private folder in the user's cache directory."""
    from client.progress import progress_shown
    from client.readiness.check import examine, look, paths_text
    from client.readiness.text import report_text
    from client.readiness.words import speaker

    speak = speaker(lang)
    with progress_shown() as progress:
        subject = look(folder, progress=progress)
    if subject.found is None:
        say(f"no site.yaml: images only; the cache is {subject.state}")
    against: Any = training_profile or ("own" if against_training else "nothing")
    found = examine(subject, against=against)
    print(json.dumps(found.public(), ensure_ascii=False) if format is Format.json else report_text(found, speak))
    if show_paths:
        for line in paths_text(subject):
            say(line)
    if html is not None:
        from client.readiness.page import write_page

        write_page(html, found, lang)
        say(f"written: {html}; it shows images and stays in the hospital")
    return 2 if found.verdict == "not ready" else 0


@data.command()
def prepare(
    site: Annotated[Path, typer.Argument(help="Site folder, or its site.yaml.")],
    plan: Annotated[Path | None, typer.Option(help="Plan whose image size to prepare for.")] = None,
    accept_quarantine: Annotated[bool, typer.Option("--accept-quarantine", help="Go on although many files cannot be read.")] = False,
    show_paths: Annotated[bool, typer.Option("--show-paths", help="Name the files that cannot be read. For this terminal only.")] = False,
    format: FormatOption = Format.text,
) -> None:
    """Read, decode and verify a site's images now, so that a run need not. Goes on where it stopped; changes no image."""
    from client import preparation
    from common.imaging.preprocess import DEFAULT_SIZE
    from common.plan import read_plan

    size = read_plan(plan).image_size if plan else DEFAULT_SIZE
    found, refusal = preparation.prepare(site, size=size, accept=lambda found: accept_quarantine or confirmed(found))
    said = preparation.report(found, size=size, show_paths=show_paths)
    print(json.dumps(said, ensure_ascii=False) if format is Format.json else preparation.report_text(said))
    if refusal is not None:
        raise refusal


@data.command()
def labels(
    site: Annotated[Path, typer.Argument(help="Site folder, or its site.yaml.")],
    sheets: Annotated[int | None, typer.Option("--sheets", help="Write this many workbooks to fill in, one a reader.")] = None,
    merge: Annotated[list[Path] | None, typer.Option("--merge", help="A filled workbook or a label sheet; once for each file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for what is written; by default sheets/, or where the labels are.")] = None,
    per: Annotated[Per, typer.Option(help="What a row of a workbook shows.")] = Per.image,
    seed: Annotated[int, typer.Option(min=0, help="Of the workbooks' keys and orders, and of the intervals.")] = 7,
    force: Annotated[bool, typer.Option("--force", help="Let --merge replace the site's label sheet.")] = False,
    format: FormatOption = Format.text,
) -> None:
    """Check a site's label sheet and how far its readers agree; write workbooks for readers; merge what they filled in."""
    from client import readers
    from client.sheets import SheetProblems

    if sheets is not None and merge:
        raise ConfigError("--sheets and --merge together", code="bad-argument", hint="first hand the workbooks out, then merge them")
    if sheets is not None:
        paths = readers.hand_out(site, readers=sheets, out=out, per="series" if per is Per.series else "image", seed=seed)
        print(json.dumps({"written": [str(path) for path in paths]}) if format is Format.json else "\n".join(map(str, paths)))
        return
    try:
        found, refusal = (readers.merge(site, merge, out=out, force=force, seed=seed), None) if merge else readers.check(site, seed=seed)
    except SheetProblems as error:
        _show_problems(error, format)
        raise
    print(json.dumps(found, ensure_ascii=False) if format is Format.json else readers.report_text(found))
    if refusal is not None:
        raise refusal


def _show_problems(error: SheetProblems, format: Format) -> None:
    from client.readers import problem_text

    problems = [problem.public() for problem in error.problems]
    print(json.dumps({"problems": problems}, ensure_ascii=False) if format is Format.json else "\n".join(map(problem_text, problems)))
