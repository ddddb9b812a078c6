"""The `fedqc data` commands."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from client.cli.importing import importing
from common.cli import Format, FormatOption, confirmed
from common.errors import ConfigError
from common.progress_bar import say
from common.terminal import print

if TYPE_CHECKING:
    from client.labels.spreadsheet import SheetProblems


class Per(StrEnum):
    image = "image"
    series = "series"


data = typer.Typer(add_completion=False, no_args_is_help=True)
data.add_typer(importing, name="import")


@data.callback()
def _data_group() -> None:
    """Generate, import, check, prepare and label image data; simulate artifacts."""


@data.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="New folder, one subfolder per site.")],
    sites: Annotated[int, typer.Option(help="Number of hospitals; the last differs from the others.")] = 4,
    patients: Annotated[int, typer.Option(min=2, help="Patients per site, 2 or 3 slices each.")] = 340,
    seed: Annotated[int, typer.Option(min=0, help="Random seed; the same seed gives the same files.")] = 7,
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Write one site, `public`, for configs/plans/pretrain_phantom.yaml, instead."
        ),
    ] = False,
    series: Annotated[
        int, typer.Option(help="Series of each patient: an artifact may be in some of them.")
    ] = 1,
    ct_motion: Annotated[
        bool,
        typer.Option(
            "--ct-motion", help="Label patient movement in CT, too; hospitals have patients who move."
        ),
    ] = False,
) -> None:
    """Write site folders of phantoms: DICOM images, labels and site.yaml."""
    from client.simulation.phantom_sites import write_consortium, write_public

    if public:
        if series != 1:
            raise ConfigError("--series with --public", code="bad-argument", hint="--series is of hospitals")
        write_public(out, patients=patients, seed=seed, say=say, ct_motion=ct_motion)
    else:
        write_consortium(
            out, sites=sites, patients=patients, seed=seed, say=say, series=series, ct_motion=ct_motion
        )


@data.command()
def inject(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SRC... [OUT]",
            help="SRC, real images: a folder, a zip archive or a file; with --map, a folder; with "
            "--per-person and --views, one or more. OUT (--map, --per-person, --views): new folder, one "
            "subfolder per site.",
        ),
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map", help="YAML file that assigns folders to hospitals, such as configs/real_hospitals.yaml."
        ),
    ] = None,
    per_person: Annotated[
        bool,
        typer.Option(
            "--per-person",
            help="Write each person (PatientID) once, clean or with one artifact; needs no map.",
        ),
    ] = False,
    views: Annotated[
        int | None,
        typer.Option(
            help="Write this many views of each SRC in varied looks, to train public starting weights on."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="With --views: CSV file (file, label); slices that it does not call clean are left out."
        ),
    ] = None,
    sites: Annotated[
        int | None, typer.Option(help="With --per-person: number of sites, 1 to 26. Default: 1.")
    ] = None,
    clean_share: Annotated[
        float | None,
        typer.Option(
            help="With --per-person: share of clean people. Default: as many as with each artifact."
        ),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            help="Write an HTML page of simulated artifacts; with --map and --per-person, of the images "
            "written (.html or .png)."
        ),
    ] = None,
    blind: Annotated[
        Path | None,
        typer.Option(help="New folder with workbooks in which readers rate realism, and their answer key."),
    ] = None,
    acceptance: Annotated[
        Path | None,
        typer.Option(help="Evaluate the filled workbooks in the folder written by --blind."),
    ] = None,
    artifact: Annotated[
        list[str] | None,
        typer.Option(
            help="Use only this simulator, with --per-person and --views only this artifact; repeatable. "
            "Default: all, with --per-person and --views those of plans without model.labels."
        ),
    ] = None,
    severity: Annotated[
        list[float] | None,
        typer.Option(
            help="Above 0, at most 1; repeatable. Default: 0.25, 0.5, 0.75 and 1. With --per-person and "
            "--views: lowest and highest; default 0.6 and 1, with --views 0.05 and 1."
        ),
    ] = None,
    slices: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="Slices per modality. Default: 2, with --blind 4. With --per-person: at most this many of a "
            "person; default all.",
        ),
    ] = None,
    readers: Annotated[int | None, typer.Option(help="With --blind: number of readers. Default: 3.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed; the same seed gives the same images.")] = 7,
    lang: Annotated[str, typer.Option("--lang", help="Language of page and report: en or zh.")] = "en",
    format: FormatOption = Format.text,
) -> None:
    """Simulate artifacts on real slices: write a gallery, a blinded reader study and its evaluation, or site
    folders (OUT with --map, --per-person or --views).
    """
    sources, out = list(paths or []), None
    if map_file or per_person or views or len(sources) > 1:
        sources, out = (sources[:-1], sources[-1]) if len(sources) > 1 else (sources, None)
    src = sources[0] if sources else None
    kind = _kind_of_injection(
        {
            "SRC": src,
            "a second SRC": sources[1:],
            "OUT": out,
            "--map": map_file,
            "--per-person": per_person or None,
            "--views": views,
            "--labels": labels,
            "--sites": sites,
            "--clean-share": clean_share,
            "--gallery": gallery,
            "--blind": blind,
            "--acceptance": acceptance,
        }
        | {"--artifact": artifact, "--severity": severity, "--slices": slices, "--readers": readers}
    )
    counts: dict[str, Any] = {}
    if kind == "acceptance":
        from client.reader_study import realism
        from client.simulation.gallery_text import gallery_speaker

        gallery_speaker(lang)
        found = realism.acceptance(_given(acceptance), seed=seed)
        print(
            json.dumps(found, ensure_ascii=False)
            if format is Format.json
            else realism.acceptance_text(found, lang)
        )
        return
    if kind == "map":
        from client.simulation.injection import inject as write_hospitals

        write_hospitals(
            _given(src),
            _given(out),
            map_file=_given(map_file),
            seed=seed,
            say=say,
            gallery=gallery,
            language=lang,
        )
        written = [_given(out), *([] if gallery is None else [gallery])]
    elif kind == "views":
        from client.simulation.training_views import inject_views
        from common.progress_bar import progress_shown

        with progress_shown() as progress:
            counts = inject_views(
                sources,
                _given(out),
                views or 0,
                seed=seed,
                severities=severity or [],
                artifacts=artifact or [],
                labels=labels,
                say=say,
                progress=progress,
            )
        written = [_given(out)]
    elif kind == "person":
        from client.simulation.people import deal_of, inject_people
        from common.progress_bar import progress_shown

        deal = deal_of(
            sites=1 if sites is None else sites,
            seed=seed,
            artifacts=artifact or [],
            severities=severity or [],
            clean_share=clean_share,
            slices=slices,
        )
        with progress_shown() as progress:
            counts = inject_people(
                sources, _given(out), deal, say=say, progress=progress, gallery=gallery, language=lang
            )
        written = [_given(out), *([] if gallery is None else [gallery])]
    else:
        from client.simulation.real_slices import wish

        wanted = wish(
            artifact or [], severity or [], slices=slices or (2 if kind == "gallery" else 4), seed=seed
        )
        if kind == "blind":
            from client.reader_study.realism import hand_out

            written = hand_out(
                _given(src), _given(blind), wanted, readers=3 if readers is None else readers, say=say
            )
        else:
            from client.simulation.gallery import write_gallery

            write_gallery(_given(src), _given(gallery), wanted, language=lang, say=say)
            written = [_given(gallery)]
    print(
        json.dumps({"written": [str(path) for path in written], **counts})
        if format is Format.json
        else "\n".join(map(str, written))
    )


def _given(value: Path | None) -> Path:
    """An argument that `_kind_of_injection` requires."""
    assert value is not None
    return value


# kind → usage, required options, further options
_INJECTIONS: dict[str, tuple[str, set[str], set[str]]] = {
    "acceptance": ("--acceptance DIR", {"--acceptance"}, set()),
    "blind": ("SRC --blind DIR", {"SRC", "--blind"}, {"--artifact", "--severity", "--slices", "--readers"}),
    "person": (
        "SRC... OUT --per-person",
        {"SRC", "OUT", "--per-person"},
        {"a second SRC", "--sites", "--clean-share", "--gallery", "--artifact", "--severity", "--slices"},
    ),
    "views": (
        "SRC... OUT --views N",
        {"SRC", "OUT", "--views"},
        {"a second SRC", "--labels", "--artifact", "--severity"},
    ),
    "map": ("SRC OUT --map MAP", {"SRC", "OUT", "--map"}, {"--gallery"}),
    "gallery": ("SRC --gallery FILE.html", {"SRC", "--gallery"}, {"--artifact", "--severity", "--slices"}),
}


def _kind_of_injection(words: dict[str, Any]) -> str:
    """The kind of output requested.

    Raises:
        ConfigError: `bad-argument`, naming the options that are missing or not allowed.
    """
    typed = {word for word, value in words.items() if value not in (None, [])}
    kinds = {
        "--acceptance": "acceptance",
        "--blind": "blind",
        "--per-person": "person",
        "--map": "map",
        "--views": "views",
        "--labels": "views",
        "--sites": "person",
        "--clean-share": "person",
        "OUT": "map",
        "--gallery": "gallery",
    }
    kind = next((kind for word, kind in kinds.items() if word in typed), None)
    if kind is None:
        forms = "; ".join(form for form, _, _ in _INJECTIONS.values())
        raise ConfigError("no output requested", code="bad-argument", hint=f"fedqc data inject {forms}")
    form, needed, also = _INJECTIONS[kind]
    missing, wrong = (
        [word for word in words if word in needed - typed],
        [word for word in words if word in typed - needed - also],
    )
    if missing or wrong:
        problems = [f"{', '.join(missing)} missing"] * bool(missing) + [
            f"{', '.join(wrong)} not allowed here"
        ] * bool(wrong)
        extra = "".join(f" [{word} …]" for word in words if word in also and word.startswith("--"))
        if kind == "map" and missing == ["--map"]:
            extra += "; or, without a map, SRC... OUT --per-person"
        raise ConfigError(
            f"{form}: {'; '.join(problems)}", code="bad-argument", hint=f"fedqc data inject {form}{extra}"
        )
    suffixes = {"gallery": (".html",), "map": (".html", ".png"), "person": (".html", ".png")}.get(kind, ())
    if (gallery := words["--gallery"]) is not None and gallery.suffix.lower() not in suffixes:
        why = (
            "a contact sheet (.png) needs --map or --per-person"
            if gallery.suffix.lower() == ".png"
            else "the file name must end in .html"
        )
        raise ConfigError(
            f"--gallery {gallery}: expected {' or '.join(suffixes)}", code="bad-argument", hint=why
        )
    return kind


@data.command()
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Site folder, its site.yaml, or any folder with images.")
    ],
    format: FormatOption = Format.text,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Also write an HTML page with contact sheets. It shows patient images."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Check for this plan: its image size and split.")] = None,
    against_training: Annotated[
        bool,
        typer.Option("--against-training", help="Compare with the patients this site last trained on."),
    ] = False,
    training_profile: Annotated[
        Path | None,
        typer.Option(
            "--training-profile",
            help="Compare with this profile file, or the newest profile of this site folder.",
        ),
    ] = None,
    show_paths: Annotated[
        bool,
        typer.Option(
            "--show-paths",
            help="List on stderr: quarantined files, files of patients whose IDs need a look, header texts "
            "behind names like other-3f2a.",
        ),
    ] = False,
    lang: Annotated[str, typer.Option("--lang", help="Language of text and page: en or zh.")] = "en",
) -> int:
    """Check whether images and labels are ready for training, and what to correct.

    Exit status: 0 ready or ready with warnings, 2 not ready. Images are not changed. The cache is kept in the
    site's state folder; for a folder without site.yaml, in the user's cache directory.
    """
    from client.data_check.check import examine, look, paths_text
    from client.data_check.text import report_text
    from client.data_check.words import LANGUAGES
    from common.i18n import speaker
    from common.plan import read_plan
    from common.preprocess import DEFAULT_SIZE
    from common.progress_bar import progress_shown

    speak = speaker(lang, LANGUAGES)
    read = None if plan is None else read_plan(plan)
    with progress_shown() as progress:
        subject = look(folder, size=read.image_size if read else DEFAULT_SIZE, progress=progress)
    if subject.found is None:
        say(f"no site.yaml: checking images only; cache: {subject.state}")
    against: Any = training_profile or ("own" if against_training else "nothing")
    found = examine(subject, plan_split=None if read is None else read.split, against=against)
    print(
        json.dumps(found.public(), ensure_ascii=False) if format is Format.json else report_text(found, speak)
    )
    if show_paths:
        for line in paths_text(subject):
            say(line)
    if html is not None:
        from client.data_check.page import write_page

        write_page(html, found, lang)
        say(f"written: {html} (shows patient images: keep it in the hospital)")
    return 2 if found.verdict == "not ready" else 0


@data.command()
def prepare(
    site: Annotated[Path, typer.Argument(help="Site folder, or its site.yaml.")],
    plan: Annotated[Path | None, typer.Option(help="Use the image size of this plan.")] = None,
    accept_quarantine: Annotated[
        bool, typer.Option("--accept-quarantine", help="Continue although many files cannot be read.")
    ] = False,
    show_paths: Annotated[
        bool, typer.Option("--show-paths", help="Also print the paths of files that cannot be read.")
    ] = False,
    public_set: Annotated[
        Path | None,
        typer.Option(
            help="Also write the labelled slices of a site of public images as a coordinator's public set, "
            "for `public_set.file` of a plan."
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Read, decode and verify a site's images before a run. Resumes where it stopped; changes no image."""
    from client.data import prepare
    from client.data.public_set import public_set_text, write_public_set
    from common.plan import read_plan
    from common.preprocess import DEFAULT_SIZE

    size = read_plan(plan).image_size if plan else DEFAULT_SIZE
    found, refusal = prepare.prepare(
        site, size=size, accept=lambda found: accept_quarantine or confirmed(found)
    )
    report = prepare.report(found, size=size, show_paths=show_paths)
    text = prepare.report_text(report)
    if public_set is not None and refusal is None:
        report["public_set"] = write_public_set(site, public_set, size=size)
        text += "\n" + public_set_text(report["public_set"])
    print(json.dumps(report, ensure_ascii=False) if format is Format.json else text)
    if refusal is not None:
        raise refusal


@data.command()
def labels(
    site: Annotated[Path, typer.Argument(help="Site folder, or its site.yaml.")],
    sheets: Annotated[
        int | None, typer.Option("--sheets", help="Write this many workbooks, one per reader.")
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option("--merge", help="Merge this filled workbook or label sheet; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder. Default: sheets/; with --merge, the folder of the labels."),
    ] = None,
    per: Annotated[Per, typer.Option(help="Content of a workbook row.")] = Per.image,
    next_studies: Annotated[
        int | None,
        typer.Option(
            "--next",
            help="List this many unread studies to read first; with --sheets, write workbooks of them only.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="With --next: the model file in use. Default: the public model of fedqc."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of row keys, row order and intervals.")] = 7,
    force: Annotated[
        bool, typer.Option("--force", help="Allow --merge to replace the site's label sheet.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Check a site's label sheet and reader agreement; write or merge workbooks for readers."""
    from client.labels.spreadsheet import SheetProblems
    from client.reader_study import labelling

    if sheets is not None and merge:
        raise ConfigError(
            "--sheets and --merge together",
            code="bad-argument",
            hint="write the workbooks first; merge them after the readers filled them in",
        )
    row: Literal["image", "series"] = "series" if per is Per.series else "image"
    if (model is not None and next_studies is None) or (merge and next_studies is not None):
        raise ConfigError(
            "--model without --next" if next_studies is None else "--next and --merge together",
            code="bad-argument",
            hint="fedqc data labels SITE --next 50 [--model FILE] [--sheets 2]",
        )
    if next_studies is not None:
        from client.reader_study import next_reads

        chosen = next_reads.next_reads(site, count=next_studies, model=model)
        listed = chosen.report()
        if sheets is not None:
            paths = labelling.hand_out(
                site, readers=sheets, out=out, per=row, seed=seed, only=chosen.positions
            )
            listed["written"] = [str(path) for path in paths]
        print(
            json.dumps(listed, ensure_ascii=False)
            if format is Format.json
            else next_reads.report_text(listed)
        )
        return
    if sheets is not None:
        paths = labelling.hand_out(site, readers=sheets, out=out, per=row, seed=seed)
        print(
            json.dumps({"written": [str(path) for path in paths]})
            if format is Format.json
            else "\n".join(map(str, paths))
        )
        return
    try:
        found, refusal = (
            (labelling.merge(site, merge, out=out, force=force, seed=seed), None)
            if merge
            else labelling.check(site, seed=seed)
        )
    except SheetProblems as error:
        _show_problems(error, format)
        raise
    print(json.dumps(found, ensure_ascii=False) if format is Format.json else labelling.report_text(found))
    if refusal is not None:
        raise refusal


def _show_problems(error: SheetProblems, format: Format) -> None:
    from client.reader_study.labelling import problem_text

    problems = [problem.public() for problem in error.problems]
    print(
        json.dumps({"problems": problems}, ensure_ascii=False)
        if format is Format.json
        else "\n".join(map(problem_text, problems))
    )
