"""Units are complete, and no path can add a line or a word to them."""

from __future__ import annotations

import configparser

import pytest

from common.errors import ConfigError
from common.systemd import Unit, escaped, quoted


def unit(**changes: object) -> Unit:
    values: dict[str, object] = {
        "comment": "one\ntwo",
        "description": "a service",
        "user": "u",
        "group": "g",
        "command": "/bin/true",
        "settings": ["PrivateNetwork=yes"],
        "needs_network": True,
        "after": ["other.service"],
    }
    return Unit(**(values | changes))  # type: ignore[arg-type]


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser


def test_a_unit_is_restarted_without_limit_and_has_its_own_settings() -> None:
    text = unit().text()
    assert text.startswith("# one\n# two\n[Unit]\n")
    found = parsed(text)
    assert found["Unit"]["StartLimitIntervalSec"] == "0"
    assert found["Unit"]["After"] == "network-online.target other.service"
    assert found["Unit"]["Wants"] == "network-online.target"
    service = found["Service"]
    assert [service[key] for key in ("User", "Group", "ExecStart", "Restart", "PrivateNetwork")] == [
        "u",
        "g",
        "/bin/true",
        "always",
        "yes",
    ]
    assert found["Install"]["WantedBy"] == "multi-user.target"


def test_a_unit_without_a_network_does_not_wait_for_one() -> None:
    found = parsed(unit(needs_network=False, after=[]).text())
    assert "After" not in found["Unit"]
    assert "Wants" not in found["Unit"]


def test_a_percent_sign_is_no_specifier() -> None:
    assert (escaped("/a 5%"), quoted("/a 5%")) == ("/a 5%%", '"/a 5%%"')


@pytest.mark.parametrize("path", ["/a\nb", '/a"b', "/a\\b", "/a$b", "/a'b", "/a "])
def test_a_path_that_systemd_would_misread_is_refused(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        quoted(path)
    assert caught.value.code == "bad-path"
