"""The `fedqc predict` command."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.cli.site import site_folder
from common.cli import Format, FormatOption
from common.errors import ConfigError
from common.progress_bar import say
from common.terminal import print

if TYPE_CHECKING:
    from client.predict.mistakes import Mistake
    from client.predict.predict import Predictions


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Thresholds(StrEnum):
    auto = "auto"
    phantoms = "phantoms"
    none = "none"


predict = typer.Typer(add_completion=False)


@predict.command()
def predict_command(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="DICOM file, folder, zip or tar archive, or a site folder."),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="latest|RUN|FILE",
            help="Model: latest (that this site put to use: fedqc site use), the folder of a run, or a file. "
            "Default: latest where there is one, else fedqc's public start. Given several times: their mean "
            "logit (an ensemble).",
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site", help="Site folder. Default: $FEDQC_SITE, then the current directory; else no site."
        ),
    ] = None,
    thresholds: Annotated[
        Thresholds,
        typer.Option(
            "--thresholds",
            help="Where thresholds come from. auto: this site's labelled training patients, else phantoms; "
            "none: print scores only.",
        ),
    ] = Thresholds.auto,
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            help="fp32; or bf16: long studies take less time in torch, logits move by some tenths.",
        ),
    ] = Precision.fp32,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Draw where the model sees an artifact, where such maps passed their test."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for predictions.csv, predictions.json and report.html."),
    ] = None,
    sr: Annotated[
        bool,
        typer.Option(
            "--sr", help="With --out: also a DICOM SR of each study, with the identifiers of its study."
        ),
    ] = False,
    mistakes: Annotated[
        bool,
        typer.Option(
            "--mistakes",
            help="PATH a labelled site: list the ten worst misses and false alarms; with --out, workbooks of "
            "them for a blinded second reading.",
        ),
    ] = False,
    show_identifiers: Annotated[
        bool,
        typer.Option("--show-identifiers", help="Also show file names, which may name patients."),
    ] = False,
    lang: Annotated[str, typer.Option("--lang", help="Language of text and page: en or zh.")] = "en",
    format: FormatOption = Format.text,
) -> int:
    """Judge images by a model: probability per artifact, decision, next step. Nothing leaves this machine.

    Research software, not a medical device. Exit status: 0, or 2 where no image could be judged.
    """
    from client.predict import exported
    from client.predict.files import public
    from client.predict.model import ensemble, find_model, in_precision
    from client.predict.operating_point import NONE, operating_points, user_cache
    from client.predict.predict import predict as judge
    from client.predict.text import report_text
    from client.predict.words import LANGUAGES
    from client.site.config import read_site
    from common.files import check_new
    from common.i18n import speaker
    from common.progress_bar import progress_shown

    speak = speaker(lang, LANGUAGES)
    if out is not None and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"{out}: lies in the folder of images", code="bad-argument", hint="--out DIR, anywhere else"
        )
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder",
            code="no-such-folder",
            hint="PATH = a DICOM file, a folder, or a zip or tar archive",
        )
    if out is not None:
        check_new(out)
    if sr and out is None:
        raise ConfigError("--sr: no folder to write to", code="bad-argument", hint="add --out DIR")
    if mistakes and not (path.name == "site.yaml" or (path / "site.yaml").is_file()):
        raise ConfigError(
            f"{path}: --mistakes needs a site with labels", code="bad-argument", hint="PATH = a site folder"
        )
    where = site_or_none(site, path)
    state = None
    if where is not None:
        config, folder = read_site(where)
        state = folder / config.state
    bf16 = precision is Precision.bf16
    exports = None if bf16 else exported.folder(state)
    wanted: list[str | None] = [*model] if model else [None]
    models = [find_model(one, state, exports=exports) for one in wanted]
    found_model = models[0] if len(models) == 1 else ensemble(models)
    if found_model.origin == "start":
        say(f"no model of a run: using fedqc's public start {found_model.start}")
    if state is not None and found_model.origin in ("start", "in-use"):
        _remind(state, found_model.sha256)
    points = NONE
    if thresholds is not Thresholds.none:
        points = operating_points(
            found_model,
            site=where if thresholds is Thresholds.auto else None,
            cache=user_cache() if state is None else state / "operating-points",
            say=say,
        )
    if bf16:
        found_model = in_precision(found_model, "bf16")
    with progress_shown() as progress:
        found = judge(path, found_model, points, site=where, explain=explain, progress=progress)
    # of thousands of images it is large: only where it is written
    content = {} if out is None and format is Format.text else public(found, names=show_identifiers)
    text = "" if format is Format.json else report_text(found, speak, names=show_identifiers)
    wrong: tuple[Mistake, ...] = ()
    if mistakes:
        from client.predict.mistakes import mistakes_text, worst_mistakes
        from client.predict.mistakes import public as public_mistakes

        wrong = worst_mistakes(found, path)
        content["mistakes"] = public_mistakes(wrong)
        text += f"\n\n{mistakes_text(wrong)}"
    if out is not None:
        _write(out, found, content, wrong, path, lang=lang, names=show_identifiers, sr=sr)
    print(json.dumps(content, ensure_ascii=False) if format is Format.json else text)
    return 0 if found.judged else 2


def _write(
    out: Path,
    found: Predictions,
    content: dict[str, Any],
    wrong: tuple[Mistake, ...],
    path: Path,
    *,
    lang: str,
    names: bool,
    sr: bool,
) -> None:
    """The files of `--out`: all of them, or none."""
    from client.predict.files import csv_text
    from client.predict.mistakes import adjudicate
    from client.predict.page import render
    from client.predict.report_dicom import write_reports
    from common.files import whole_folder, write_bytes

    with whole_folder(out, mode=0o700) as staging:
        for name, text in (
            ("predictions.csv", csv_text(found, names=names)),
            ("predictions.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n"),
            ("report.html", render(found, lang, names=names)),
        ):
            write_bytes(staging / name, text.encode("utf-8", "surrogateescape"), 0o600)
        if sr:
            written, impossible = write_reports(found, path, staging / "sr")
            say(f"{len(written)} DICOM SR, with the identifiers of their studies")
            if impossible:
                say(f"no SR of studies {', '.join(map(str, impossible))}: their headers do not allow it")
    if wrong:
        adjudicate(wrong, path, out / "adjudication")
    say(f"written: {out} (shows patient images: keep it in the hospital)")


def _remind(state: Path, used: str) -> None:
    """Say what the person who answers for the model has to do: test what was received, check what is used."""
    from hashlib import sha256

    from client.predict.acceptance import check_is_due

    received = state / "models" / "latest.safetensors"
    if received.is_file() and sha256(received.read_bytes()).hexdigest() != used:
        say("a run sent a model that is not in use: fedqc site use latest tests it")
    if last := check_is_due(state):
        say(f"the model in use was last tested on {last}: fedqc site use --check repeats the test")


def site_or_none(given: Path | None, path: Path) -> Path | None:
    """The site folder: as given, as other commands find it, or PATH itself; None where there is none."""
    if given is not None or os.environ.get("FEDQC_SITE"):
        return site_folder(given)
    for folder in (path.parent if path.name == "site.yaml" else path, Path()):
        if (folder / "site.yaml").is_file():
            return folder.absolute()
    return None
