"""The root of the `fedqc` command line. Command groups are imported when they are used, so that help and
version are fast.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, TextIO

import click
import typer
from typer.core import TyperGroup

from common.errors import FedqcError, denied_by_machine
from common.terminal import ReaderGone, escaped, print

SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment that keeps Flower from sending data to others than the sites."""

COMMANDS: dict[str, tuple[str, str]] = {
    "simulate": (
        "server.cli.evaluate:simulate",
        "Run a plan, or a sweep of plans, on all sites under a folder.",
    ),
    "evaluate": (
        "server.cli.evaluation:evaluate",
        "Score models that a run released, at hospitals that may never have trained.",
    ),
    "report": ("server.cli.evaluate:report", "Write report.html of a finished run."),
    "compare": (
        "server.cli.evaluate:compare",
        "Compare runs: differences of arms, paired over patients and seeds; the next hospital.",
    ),
    "verify": (
        "common.verify:verify",
        "Recompute a run from the answers that its sites signed; check a published table, or the installed "
        "code's privacy.",
    ),
    "federation": (
        "server.cli.federation:federation",
        "Make a federation, enrol hospitals, run its services.",
    ),
    "run": ("server.cli.run:run", "Rehearse, start, watch, stop and resume runs."),
    "site": (
        "client.cli.site:site",
        "Set up, run and audit a hospital's site.",
    ),
    "explain": (
        "common.explain:explain",
        "Explain a code of an error, a refusal or a file that is not used.",
    ),
    "predict": (
        "client.cli.predict:predict",
        "Judge images by a model: artifacts, next steps; a local report.",
    ),
    "export": (
        "client.cli.export:export",
        "Write a model as ONNX, checked against torch.",
    ),
    "data": (
        "client.cli.data:data",
        "Generate, import, check, prepare and label image data; simulate artifacts.",
    ),
}


INTERRUPTED = 130
_SUGGESTED_AGAIN = re.compile(r"( Did you mean [^?]*\?).*Did you mean.*$")
"""Click and Typer both add what a mistyped command may be."""


class Format(StrEnum):
    text = "text"
    json = "json"


FormatOption = Annotated[
    Format,
    typer.Option("--format", help="Output format."),
]


def show(format: Format, result: Mapping[str, object], *lines: str) -> None:
    """Print what a command ended in: one object of JSON for programs, or lines for people."""
    print(json.dumps(result, ensure_ascii=False) if format is Format.json else "\n".join(lines))


def confirmed(refusal: FedqcError) -> bool:
    """Ask at the terminal whether to continue after a refusal; without a terminal the answer is no."""
    return (
        sys.stdin is not None
        and sys.stdin.isatty()
        and typer.confirm(f"{escaped(refusal.message)}. Continue without these files?", err=True)
    )


def load(name: str) -> Any:
    """What `module:attribute` names. Common code reaches what `server` and `client` do by this alone."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


class LazyGroup(TyperGroup):
    """Commands that are imported on first use."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:  # click looks for what is meant among `commands`
            raise click.exceptions.NoSuchCommand(
                error.command_name, possibilities=COMMANDS, ctx=ctx
            ) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if ctx.resilient_parsing or ctx.info_name is None:
            return None
        command = typer.main.get_command(load(COMMANDS[cmd_name][0]))
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        click.Group.format_help(self, ctx, formatter)


root = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # of every group and command below it
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version("fedqc"))
        raise typer.Exit


@root.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    shown: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Federated quality control of CT and MRI images under differential privacy."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; never returns.

    Exit status: 0 ok, 1 the work failed, 2 bad arguments or configuration, 3 network or authentication, 4
    refused by policy or budget, 5 a bug, 6 finished but partial, 130 or 143 stopped by a signal.
    """
    os.environ.update(SILENT)
    # imports make many objects and no garbage: collecting costs 0.3 CPU-s
    gc.set_threshold(20_000, 50, 100)
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _stop)
    if sys.stdin is None:  # closed: questions then find no answer, as from an empty file
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # help and prompts, which others print
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # what whoever runs fedqc is to know, fedqc says
    warnings.showwarning = _show_warning if "--debug" in words else lambda *_, **__: None
    try:
        status: Any = typer.main.get_command(root).main(words, prog_name="fedqc", standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk or a closed pipe is known for what it is
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _fail(
            "bad-argument",
            _SUGGESTED_AGAIN.sub(r"\1", error.format_message()),
            f"{context.command_path if context else 'fedqc'} --help",
            2,
        )
    except (KeyboardInterrupt, click.Abort):
        status = INTERRUPTED
    except FedqcError as error:
        if "--debug" in words:
            raise
        _fail(error.code, error.message, error.hint, error.exit_status)
    except (BrokenPipeError, ReaderGone):
        _leave_closed_pipe()
    except Exception as error:
        if "--debug" in words:
            raise
        if denied := denied_by_machine(error):
            _drop_output()
            _fail(denied.code, denied.message, denied.hint, denied.exit_status)
        _fail(
            "bug",
            f"{type(error).__name__}: {error}",
            "please report it with the output of the same command with --debug",
            5,
        )
    if status == INTERRUPTED:  # typer turns Ctrl-C into this status without a message
        _fail(
            "interrupted",
            "stopped; finished work is kept",
            "continue a run with fedqc run resume",
            INTERRUPTED,
        )
    sys.exit(status if isinstance(status, int) else 0)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A library's warning quotes what it reads, a DICOM header for one, and Python prints it as it is."""
    print(f"{filename}:{lineno}: {category.__name__}: {message}", file=file or sys.stderr)


def _leave_closed_pipe() -> NoReturn:
    """As any program whose reader, `head` for one, has gone: without a word, by the status of SIGPIPE."""
    _drop_output()
    sys.exit(128 + signal.SIGPIPE)


def _drop_output() -> None:
    """Send what is still to be printed nowhere: else Python tries again at its end, and complains."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(code: str, message: str, hint: str, status: int) -> NoReturn:
    one_line = " ".join(message.split())
    print(f"fedqc: error [{code}]: {one_line}", file=sys.stderr)
    if hint:
        print(f"fedqc: hint: {' '.join(hint.split())}", file=sys.stderr)
    sys.exit(status)


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
