"""evaluation.json is checked when it is read: one line for what is wrong with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from server.evaluation.report.page import write_report
from server.evaluation_file import SCHEMA, checked
from server.run_folder import EVALUATION, RunFolder, write_json
from tests.helpers.report_page import MANIFEST, PLAN, evaluation_of

WHOLE = evaluation_of()


def changed(*path: str | int, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(WHOLE)
    inner: Any = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return values


def test_what_a_run_writes_is_taken_as_it_is() -> None:
    assert WHOLE["schema"] == SCHEMA
    assert checked(WHOLE, "evaluation.json") is WHOLE
    assert checked(WHOLE | {"a_later_key": 1}, "evaluation.json")
    assert checked(WHOLE | {"question": "ε, or more? 某次\u00a0run\n"}, "evaluation.json")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (changed("seed", value="seven"), "`seed`"),
        (changed("scores", "federated", "home", "value", value="high"), "scores.federated.home.value"),
        (changed("contrasts", 0, "p_holm", value="small"), "contrasts.0.p_holm"),
        (changed("sites", 0, "role", value="guest"), "sites.0.role"),
        ({key: value for key, value in WHOLE.items() if key != "worst"}, "`worst` is missing"),
        ([], "dictionary"),
        (changed("sites", 0, "version", value="1\nok    evaluation"), "one line"),
        (changed("plan", value="\u202eabc"), "one line"),
        (changed("counts", "a\nok    evaluation", value={}), "one line"),
        (changed("incomplete", value=["\x1b[2J"]), "one line"),
        (WHOLE | {"a_later_key": [{"x": "a\u2028b"}]}, "one line"),
        (changed("question", value="two\n\nlines\n"), "one line"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(values: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(values, "evaluation.json")
    assert caught.value.code == "wrong-evaluation"
    assert says in caught.value.message
    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("schema", [None, 1, 3, "2"])
def test_another_schema_is_refused_in_one_line(tmp_path: Path, schema: object) -> None:
    """A file of an earlier version has none: its macro scores mean something else."""
    values = {key: value for key, value in WHOLE.items() if key != "schema"}
    folder = RunFolder.create(tmp_path / "run", PLAN, MANIFEST)
    write_json(folder.path / EVALUATION, values if schema is None else values | {"schema": schema})
    with pytest.raises(ConfigError) as caught:
        write_report(folder)
    assert (caught.value.code, "\n" in caught.value.message) == ("old-evaluation", False)
    assert caught.value.hint
    assert not (folder.path / "report.html").exists()


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", PLAN, MANIFEST)
    (folder.path / EVALUATION).write_text(json.dumps(WHOLE)[:-100])
    with pytest.raises(ConfigError) as caught:
        _ = folder.evaluation
    assert caught.value.code == "wrong-evaluation"
