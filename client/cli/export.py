"""The `fedqc export` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from common.cli import Format, FormatOption
from common.progress_bar import say
from common.terminal import print

export = typer.Typer(add_completion=False)


@export.command()
def export_command(
    model: Annotated[
        str, typer.Argument(metavar="latest|RUN|FILE", help="Model, as --model of fedqc predict.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: where fedqc predict finds it, by the model's hash."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Convolutions in int8, if logits and AUROCs stay; needs --out.")
    ] = False,
    site: Annotated[
        Path | None,
        typer.Option("--site", help="Site folder, for `latest` and for where to keep the file."),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Write a model as ONNX, checked against torch, so that fedqc predict starts without torch.

    Exit status 4: int8 changes the model's answers too much; the figures are printed.
    """
    from client.cli.predict import site_or_none
    from client.predict import exported
    from client.predict.export import export as write
    from client.predict.model import find_model
    from client.site.config import read_site
    from common.errors import ConfigError

    if int8 and out is None:
        raise ConfigError(
            "--int8 gives other scores than the model: it is a file of its own",
            code="bad-argument",
            hint="--out FILE.onnx, then fedqc predict --model FILE.onnx",
        )
    if out is not None and out.suffix != exported.SUFFIX:
        raise ConfigError(f"{out}: not a name of an ONNX file", code="bad-argument", hint="--out FILE.onnx")
    where = site_or_none(site, Path())
    state = None if where is None else where / read_site(where)[0].state
    found = find_model(model, state)
    path = out or exported.folder(state) / f"{found.sha256}{exported.SUFFIX}"
    written = write(found, path, int8=int8)
    if format is Format.json:
        print(json.dumps(written.public()))
        return
    print(f"{written.path}: {written.bytes} bytes, {written.precision}")
    print(f"largest difference of a logit from torch: {written.largest_difference:.2g}")
    for name, (before, after) in (written.aurocs or {}).items():
        print(f"AUROC {name}: torch {before:.4f}, int8 {after:.4f}")
    if out is None:
        say("fedqc predict now applies it by ONNX Runtime")
