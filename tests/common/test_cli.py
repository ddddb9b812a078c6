"""The command line costs nothing until it is used, and its errors are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from common import cli
from common.errors import (
    ConfigError,
    DataError,
    FedqcError,
    InternalError,
    NetworkError,
    PlanError,
    RefusedError,
    RunError,
)
from tests.helpers.command_line import typed

HEAVY = {"torch", "flwr", "opacus", "pydicom", "scipy", "numpy", "grpc"}

LOADED = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
def loaded(): return sorted(set(%r) & set(sys.modules))
try:
    with redirect_stdout(StringIO()) as said:
        %s
except SystemExit as end:
    status = end.code
else:
    status = None
print(json.dumps([status, said.getvalue(), loaded()]))
"""


def loaded_by(statement: str) -> tuple[Any, str, set[str]]:
    """Exit status, stdout, and which heavy packages are loaded after `statement` in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED % (sorted(HEAVY), statement)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    status, said, modules = json.loads(done.stdout)
    return status, said, set(modules)


def run(words: str) -> tuple[Any, str, set[str]]:
    return loaded_by(f"from common.cli import main; main({words.split()!r})")


def test_help_lists_the_commands_and_loads_nothing() -> None:
    status, said, modules = run("--help")
    assert status == 0
    assert all(name in said for name in cli.COMMANDS)
    assert modules == set()


def test_version_is_the_packages_and_loads_nothing() -> None:
    status, said, modules = run("--version")
    assert (status, said.strip(), modules) == (0, version("fedqc"), set())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("data --help", ["phantom", "check"]),
        ("data phantom --help", ["--sites", "--patients", "--seed"]),
        ("simulate --help", ["--data", "--out", "--seed", "--jobs", "--format"]),
        ("run resume --help", ["--data", "--jobs"]),
    ],
)
def test_the_help_of_a_command_loads_no_torch_and_no_flower(words: str, shown: list[str]) -> None:
    status, said, modules = run(words)
    assert status == 0
    assert all(word in said for word in shown)
    assert not modules & {"torch", "flwr", "opacus"}


def test_every_argument_and_option_of_every_command_is_explained() -> None:
    unexplained, seen = [], 0
    todo = [(name, typer.main.get_command(cli.load(where))) for name, (where, _) in cli.COMMANDS.items()]
    while todo:
        path, command = todo.pop()
        todo += [(f"{path} {name}", one) for name, one in getattr(command, "commands", {}).items()]
        for parameter in command.params:
            seen += 1
            if not getattr(parameter, "hidden", False) and not getattr(parameter, "help", None):
                unexplained.append(f"{path} {parameter.human_readable_name}")
    assert seen > 100
    assert unexplained == []


WITHOUT_JSON = {
    "data phantom": "writes folders; its end is its exit status",
    "federation start": "runs until it is stopped",
    "site start": "runs until it is stopped",
    "site stop": "its end is its exit status",
    "site dossier": "one page for a person to sign",
}


def test_every_command_that_ends_in_a_result_gives_it_as_json() -> None:
    lacking = set()
    todo = [(name, typer.main.get_command(cli.load(where))) for name, (where, _) in cli.COMMANDS.items()]
    while todo:
        path, command = todo.pop()
        if below := getattr(command, "commands", {}):
            todo += [(f"{path} {name}", one) for name, one in below.items()]
        elif not any("--format" in parameter.opts for parameter in command.params):
            lacking.add(path)
    assert lacking == set(WITHOUT_JSON)


def test_the_door_of_a_hospital_loads_no_torch() -> None:
    _, _, modules = loaded_by("import client.app")
    assert "flwr" in modules
    assert not modules & {"torch", "opacus", "pydicom"}


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    class Command:
        def main(self, *_: Any, **__: Any) -> NoReturn:
            raise error

    monkeypatch.setattr(cli.typer.main, "get_command", lambda _: Command())
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)


def status_of(*words: str) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("what"), 2),
        (PlanError("what"), 2),
        (DataError("what"), 2),
        (NetworkError("what"), 3),
        (RefusedError("what"), 4),
        (RunError("what"), 1),
        (InternalError("what"), 5),
        (ZeroDivisionError("what"), 5),
    ],
)
def test_an_error_has_the_status_of_who_can_act(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, error)
    assert status_of("x") == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"fedqc: error [{error.code if isinstance(error, FedqcError) else 'bug'}]: ")
    assert "Traceback" not in said.err


def test_an_error_is_one_line_and_one_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, ConfigError("what\n  was found,\twhere", code="some-code", hint="what to do"))
    assert status_of("x") == 2
    assert (
        capsys.readouterr().err
        == "fedqc: error [some-code]: what was found, where\nfedqc: hint: what to do\n"
    )


def test_an_error_without_a_hint_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, RunError("what"))
    assert status_of("x") == 1
    assert capsys.readouterr().err == "fedqc: error [run-failed]: what\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RunError("what"), ZeroDivisionError("what")):
        raising(monkeypatch, error)
        with pytest.raises(type(error), match="what"):
            cli.main(["--debug", "x"])


WARNING_COMMAND = """
import warnings
from common import cli
class Command:
    def main(self, *_, **__):
        warnings.warn("unknown encoding '\x1b[2Jforged\x9b'")
cli.typer.main.get_command = lambda _: Command()
cli.main()
"""


@pytest.mark.parametrize("debug", [False, True])
def test_a_warning_of_a_library_forges_no_line(debug: bool) -> None:
    """Python would print what it quotes of a foreign file as it is."""
    done = subprocess.run(
        [sys.executable, "-c", WARNING_COMMAND, *["--debug"] * debug],
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert b"\x1b" not in done.stderr
    assert (b"\\u001b[2Jforged\\u009b" in done.stderr) is debug


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert status_of("x") == 130
    assert capsys.readouterr().err.startswith("fedqc: error [interrupted]: ")


def test_sigterm_is_143() -> None:
    with pytest.raises(SystemExit) as caught:
        cli._stop(15, None)
    assert caught.value.code == 143


@pytest.mark.parametrize(
    "words",
    [
        ["simulat"],
        ["--nope"],
        ["data", "nope"],
        ["simulate"],
        ["simulate", "p", "--data", "d", "--out", "o", "--x"],
    ],
)
def test_a_word_nobody_knows_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert (words[-1] if words != ["simulate"] else "PLAN") in said.err
    assert "Traceback" not in said.err


def test_flower_talks_to_nobody() -> None:
    assert cli.SILENT["FLWR_TELEMETRY_ENABLED"] == "0"
    assert cli.SILENT["FLWR_DISABLE_UPDATE_CHECK"] == "1"


PIPES = "import os, sys; from common.terminal import print; from common import cli\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_failure(lines: int) -> None:
    """`fedqc run list | head`: the status of SIGPIPE, and not a word."""
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            command(f"for number in range({lines}): print('a line', number)"),
            stdout=write, stderr=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + 13, b"")


def command(body: str) -> list[str]:
    """A program: the command line with one more command, `probe`."""
    code = PIPES + (
        f"import errno, typer\napp = typer.Typer()\n@app.command()\ndef probe() -> None:\n    {body}\n"
        "cli.COMMANDS['probe'] = ('__main__:app', ''); cli.main(['probe'])"
    )
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("number", ["EACCES", "EROFS", "ENAMETOOLONG", "ENOTDIR"])
def test_a_file_that_the_system_refuses_is_said_and_is_no_bug(number: str) -> None:
    """As the report of a run in a folder of somebody else."""
    body = f"raise OSError(errno.{number}, 'Not allowed', 'runs/a/report.html')"
    ended = subprocess.run(command(body), capture_output=True, timeout=60, check=False, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("fedqc: error [not-writable]: runs/a/report.html: cannot be opened or ")


def test_a_name_too_long_is_no_bug() -> None:
    words = [sys.executable, "-m", "common.cli", "report", "x" * 300]
    ended = subprocess.run(words, capture_output=True, timeout=120, check=False, text=True)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("fedqc: error [not-writable]: ")
    assert "[bug]" not in ended.stderr


def test_a_full_disk_is_said_and_is_no_bug() -> None:
    body = "raise OSError(errno.ENOSPC, 'No space left on device', 'runs/a/model')"
    ended = subprocess.run(command(body), capture_output=True, text=True, timeout=60, check=False)
    said = "fedqc: error [disk-full]: runs/a/model: no space is left on the disk"
    assert (ended.returncode, ended.stderr.splitlines()[0]) == (1, said)
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            command("print('result')"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[0] == "fedqc: error [disk-full]: no space is left on the disk"
    assert len(ended.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("number", "code"), [("EROFS", "not-writable"), ("EACCES", "not-writable"), ("EMFILE", "too-many-files")]
)
def test_a_file_that_the_machine_denies_is_no_bug(number: str, code: str) -> None:
    body = f"raise OSError(errno.{number}, 'denied', 'runs/a')"
    ended = subprocess.run(command(body), capture_output=True, text=True, timeout=60, check=False)
    lines = ended.stderr.splitlines()
    assert (ended.returncode, len(lines)) == (1, 2)
    assert lines[0].startswith(f"fedqc: error [{code}]: runs/a: ")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_and_results_are_shown_on_a_terminal_that_lacks_their_letters(encoding: str) -> None:
    for words in (["site", "budget", "--help"], ["explain", "budget-exhausted"]):
        ended = subprocess.run(
            [sys.executable, "-m", "common.cli", *words],
            env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode in (0, 2), ended.stderr
        assert b"[bug]" not in ended.stderr


def test_a_closed_stdin_is_an_answer_of_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert not cli.confirmed(RefusedError("many files cannot be read"))


def test_a_question_with_a_closed_stdin_is_no_bug(tmp_path: Path) -> None:
    """As in a service or a job: nobody answers, and nothing is made."""
    words = [sys.executable, "-m", "common.cli", "site", "init", "--site", str(tmp_path / "site")]
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == cli.INTERRUPTED
    assert "[bug]" not in ended.stderr
    assert not (tmp_path / "site" / "site.yaml").exists()


def test_a_federation_is_made_in_a_locale_without_the_letters_of_flower(tmp_path: Path) -> None:
    """Flower's own commands print signs that no ASCII locale has."""
    words = ["federation", "init", "north", "--host", "127.0.0.1", "--dir", str(tmp_path / "north")]
    ended = subprocess.run(
        [sys.executable, "-m", "common.cli", *words],
        env=os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("words", [["-h"], ["run", "-h"], ["run", "start", "-h"], ["site", "check", "-h"]])
def test_every_command_knows_the_short_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = typed(capsys, *words)
    assert status == 0
    assert "--help" in said


@pytest.mark.parametrize(
    "words", [["simulat"], ["run", "strat"], ["site", "statu"], ["run", "start", "--nam", "x"]]
)
def test_a_suggestion_is_made_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, said = typed(capsys, *words)
    assert status == 2
    assert said.count("Did you mean") == 1
