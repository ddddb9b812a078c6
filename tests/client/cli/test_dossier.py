"""The page for a data protection officer says what leaves, and nothing that the site does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from client.cli.site import site as group
from client.site.config import read_site, site_key
from client.site.site_ledger import init_ledger, open_ledger
from common.errors import FedqcError
from common.privacy import GaussianSteps
from common.wire import OUTGOING, crossings

STEPS = GaussianSteps(noise_multiplier=20.0, sample_rate=1.0, steps=10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fields = {"name": "north", "kind": "hospital", "cohort": "chest", "nominal_patients": 100}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(fields | {"policy": "policy.yaml"}))
    (tmp_path / "policy.yaml").write_text("max_epsilon: 4.0\nmax_epsilon_per_run: 1.5\n")
    (tmp_path / "cohort.yaml").write_text(
        "ethics_approval: 2026-17\nconsent_basis: broad consent\nopt_out: [P-1, P-2]\n"
    )
    site_key(tmp_path / "state")
    init_ledger(*read_site(tmp_path))
    return tmp_path


def page(folder: Path) -> str:
    result = CliRunner().invoke(group, ["dossier", "--site", str(folder)])
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


def test_every_field_that_leaves_is_on_the_page(folder: Path) -> None:
    said = page(folder)
    for message in OUTGOING:
        assert message.__name__ in said
        assert all(name in said for name in crossings(message))


def test_it_states_policy_and_spent_budget_in_words_ethics_and_opt_outs(folder: Path) -> None:
    before = page(folder)
    assert "ε at most 4.00 over the lifetime, 1.50 a run" in before
    assert "ε 0.00 of 4.00" in before
    assert "2026-17" in before
    assert "broad consent" in before
    assert "2 on the opt-out list" in before
    assert "P-1" not in before
    with open_ledger(*read_site(folder)) as ledger:
        ledger.reserve(
            request="r", steps=STEPS, purpose="train", fingerprint="", max_epsilon=4.0, max_delta=1e-5
        )
    after = page(folder)
    assert "ε 0.00 of" not in after
    assert "of 4.00" in after


def test_a_page_with_a_gap_is_not_printed(folder: Path) -> None:
    (folder / "state" / "ledger.sqlite3").unlink()
    with pytest.raises(FedqcError):
        page(folder)
