"""`fedqc explain` prints what the documentation says, from the installed package."""

from __future__ import annotations

import json

import pytest

from client.data.inclusion import ADMISSION_CODES
from client.dicom.index import QUARANTINE_CODES
from client.dicom.refusals import EXCLUSIONS
from common.cli import main
from common.explain import entries
from tests.helpers.command_line import ROOT


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        main(words)
    return done.value.code, *capsys.readouterr()


def test_a_code_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "lossy")
    assert status == 0
    assert "lossy: use" in out
    status, out, _ = run(capsys, "explain", "[unknown-site]", "--format", "json")
    found = json.loads(out)
    assert [entry["code"] for entry in found] == ["unknown-site"] * 2
    assert all(entry[field] for entry in found for field in ("section", "cause", "action"))


def test_an_unknown_code_lists_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "explain", "not-dicon")
    assert status == 2
    assert "unknown-code" in err
    assert "not-dicom" in err
    assert run(capsys, "explain", "xyzzyplugh")[0] == 2


def test_every_code_of_a_file_has_an_entry_and_the_page_is_the_packages() -> None:
    assert {*QUARANTINE_CODES, *EXCLUSIONS, *ADMISSION_CODES} <= entries().keys()
    assert (ROOT / "docs/errors.md").resolve() == ROOT / "common/errors.md"
