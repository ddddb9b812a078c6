"""`fedqc verify RUN`, `--table FILE`, `--privacy` and `--attack`: four questions, of which the coordinator's
package answers the first two and the hospital's the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import Format, FormatOption, load
from common.errors import ConfigError

verify = typer.Typer(add_completion=False)


@verify.command()
def verify_command(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Check a published table of scores instead (CSV): could its numbers have been counted?"
        ),
    ] = None,
    privacy: Annotated[
        bool, typer.Option("--privacy", help="Check the installed code instead; takes minutes.")
    ] = False,
    attack: Annotated[
        bool,
        typer.Option(
            "--attack", help="Attack this site's next update instead, before it is released; spends nothing."
        ),
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(help="With --privacy or --attack: the plan whose private training is checked."),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="With --privacy: also audit the private step with canaries.")
    ] = False,
    site: Annotated[
        Path | None,
        typer.Option(help="With --attack: site folder. Default: $FEDQC_SITE, then the current directory."),
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --attack: also tell the patients who trained this finished model from the others; "
            "repeatable."
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> int:
    """Recompute RUN from the answers that its sites signed; with --table, search the confusion matrices that
    a published table can come from; with --privacy, check that the installed code does what the privacy
    accounting assumes; with --attack, what an attacker would learn of one patient from this site's next
    update. Exit status 1: something does not hold.
    """
    is_one = [run is not None, table is not None, privacy, attack].count(True) == 1
    misplaced = [
        plan is not None and not (privacy or attack),
        audit and not privacy,
        (site is not None or bool(model)) and not attack,
    ]
    if not is_one or any(misplaced):
        raise ConfigError(
            "verify takes either a run folder, or --table, or --privacy with --plan and --audit, or --attack "
            "with --site, --plan and --model",
            code="bad-argument",
            hint="fedqc verify RUN, or fedqc verify with --table FILE, --privacy or --attack",
        )
    if table is not None:
        return int(load("server.cli.evaluate:verify_table")(table, format))
    if attack:
        return int(load("client.cli.attack:verify_attack")(site, plan, model or [], format=format))
    if run is not None:
        return int(load("server.cli.evaluate:verify_run")(run, format))
    return int(load("client.cli.privacy:verify_privacy")(plan, with_audit=audit, format=format))
