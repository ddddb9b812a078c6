"""What a person can type or read is documented: commands, options, plan keys, artifacts, error codes."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import get_args

import click
import typer
from pydantic import BaseModel

from client.data.inclusion import ADMISSION_CODES, CohortRules
from client.dicom.index import QUARANTINE_CODES
from client.dicom.refusals import EXCLUSIONS
from client.site.config import SiteConfig
from client.site.policy import SitePolicy
from common.arms import ARMS
from common.artifacts import NAMES
from common.cli import COMMANDS
from common.losses import BATCH_LOSSES, LOSSES
from common.models import MODELS
from common.optimizers import OPTIMIZERS
from common.plan import Augmentation, RunPlan
from common.samplers import SAMPLERS
from server.strategies import STRATEGIES
from tests.helpers.command_line import ROOT

ROOMS = ("server", "client", "common")


@lru_cache
def documentation() -> str:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in pages if path.is_file())


def undocumented(words: Iterator[str]) -> list[str]:
    """Words that stand nowhere in README.md or docs/ as a word of their own."""
    return sorted(
        {word for word in words if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", documentation())}
    )


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that can be typed, with its full name."""

    def below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            for inner, found in command.commands.items():
                yield from below(f"{name} {inner}", found)
        else:
            yield name, command

    for name, (where, _) in COMMANDS.items():
        module, _, attribute = where.partition(":")
        yield from below(
            f"fedqc {name}", typer.main.get_command(getattr(importlib.import_module(module), attribute))
        )


def options() -> Iterator[str]:
    for _, command in commands():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield from (option for option in parameter.opts if option.startswith("--"))


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Field names of a model, nested ones with a dot."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def error_codes() -> Iterator[str]:
    """Codes in the source: `code="..."` of a call, `code = "..."` of a class, the first word of
    `_refusal(...)` and `_fail(...)`.
    """
    yield from QUARANTINE_CODES
    yield from EXCLUSIONS
    yield from ADMISSION_CODES
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                values = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
                if isinstance(node.func, ast.Name) and node.func.id in {"_refusal", "_fail"}:
                    values.append(node.args[0])
            elif isinstance(node, ast.ClassDef):
                assignments = [inner for inner in node.body if isinstance(inner, ast.Assign)]
                values = [
                    inner.value
                    for inner in assignments
                    if any(getattr(target, "id", "") == "code" for target in inner.targets)
                ]
            elif isinstance(node, ast.Assign) and any(
                getattr(target, "id", "") == "SITE_FAILURE" for target in node.targets
            ):
                values = [node.value]
            else:
                continue
            for value in values:
                for constant in ast.walk(value):
                    if (
                        isinstance(constant, ast.Constant)
                        and isinstance(constant.value, str)
                        and constant.value
                    ):
                        yield constant.value


def test_every_command_is_documented() -> None:
    assert undocumented(name for name, _ in commands()) == []


def test_every_option_is_documented() -> None:
    assert undocumented(iter([*options(), "--debug", "--version"])) == []


def test_every_plan_key_is_documented() -> None:
    """By its last word: a table a section may leave the prefix out."""
    assert undocumented(key.rpartition(".")[2] for key in keys(RunPlan)) == []


def test_every_key_of_a_policy_and_of_site_yaml_is_documented() -> None:
    assert (
        undocumented(
            iter(
                [*keys(SitePolicy), *keys(SiteConfig), *(key.rpartition(".")[2] for key in keys(CohortRules))]
            )
        )
        == []
    )


def test_every_word_a_plan_may_choose_is_documented() -> None:
    assert (
        undocumented(
            iter(
                [
                    *ARMS,
                    *MODELS,
                    *LOSSES,
                    *BATCH_LOSSES,
                    *STRATEGIES,
                    *OPTIMIZERS,
                    *SAMPLERS,
                    *get_args(Augmentation),
                ]
            )
        )
        == []
    )


def test_every_artifact_is_documented() -> None:
    assert undocumented(iter(NAMES)) == []


def test_every_error_code_is_documented() -> None:
    assert undocumented(error_codes()) == []


def test_every_exit_status_is_documented() -> None:
    page = ROOT / "docs" / "errors.md"
    assert page.is_file()
    text = page.read_text(encoding="utf-8")
    assert [
        status for status in (0, 1, 2, 3, 4, 5, 6, 130, 143) if not re.search(rf"\b{status}\b", text)
    ] == []


def test_every_link_between_pages_leads_somewhere() -> None:
    broken = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if (
                "://" not in target
                and not target.startswith("mailto:")
                and not (path.parent / target).exists()
            ):
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_file_the_pages_name_exists() -> None:
    """`docs/…`, `configs/…`, `common/…`, `client/…`, `server/…`, `tests/…` in backticks."""
    named = set(
        re.findall(
            r"`((?:docs|configs|common|client|server|tests|benchmarks)/[\w./-]+\.\w+)`", documentation()
        )
    )
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
