from __future__ import annotations

import stat
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.site.config import read_site, site_key
from client.site.enrolment import LEVELS, NewSite, coordinator_of, init_site, join
from client.site.ledger_rows import LedgerError
from client.site.policy import default_policy, read_policy
from client.site.site_ledger import open_ledger
from common.enrolment import Kit, read_request, write_kit
from common.errors import ConfigError
from common.files import write_as_owner
from common.plan import Split
from common.signing import load_key, public_text
from tests.helpers.command_line import ROOT

CA = "-----BEGIN CERTIFICATE-----\nnot looked at here\n-----END CERTIFICATE-----\n"


def made(folder: Path, **changes: Any) -> Path:
    (folder.parent / "images").mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "name": "hospital-a",
        "images": folder.parent / "images",
        "labels": folder.parent / "labels.csv",
        "nominal_patients": 200,
        "kind": "hospital",
        "cohort": "radiology-2026",
        "level": "usual",
        "ethics_approval": "2026-17",
        "consent_basis": "broad consent",
    }
    warn = {"warn": changes.pop("warn")} if "warn" in changes else {}
    return init_site(folder, NewSite(**(values | changes)), **warn)


def kit_for(folder: Path, path: Path, key: Ed25519PrivateKey, **changes: Any) -> Kit:
    values: dict[str, Any] = {
        "federation": "north",
        "site": "hospital-a",
        "address": "fed.example:8443",
        "ca_certificate": CA,
        "coordinator_key": public_text(key),
        "bundle_sha256": "ab" * 32,
        "site_key": public_text(load_key(folder / "state" / "signing.key")),
        "version": "0.1.0",
        "expires": date.today() + timedelta(days=365),
    }
    kit = Kit(**(values | changes))
    write_kit(path, kit, key)
    return kit


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def site(tmp_path: Path) -> Path:
    made(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def test_init_makes_a_site_that_the_rest_of_fedqc_reads(site: Path) -> None:
    config, folder = read_site(site)
    assert (config.name, config.kind, config.nominal_patients, config.cohort) == (
        "hospital-a",
        "hospital",
        200,
        "radiology-2026",
    )
    assert folder / config.images == site.parent / "images"
    assert read_policy(folder / str(config.policy)) == LEVELS["usual"].policy
    assert yaml.safe_load((site / "cohort.yaml").read_text()) == {
        "name": "radiology-2026",
        "ethics_approval": "2026-17",
        "consent_basis": "broad consent",
    }
    with open_ledger(config, site) as ledger:
        assert len(ledger.rows()) == 1


def test_paths_inside_the_folder_are_kept_relative(tmp_path: Path) -> None:
    (tmp_path / "site" / "dicom").mkdir(parents=True)
    made(tmp_path / "site", images=tmp_path / "site" / "dicom", labels=tmp_path / "site" / "labels.csv")
    config, _ = read_site(tmp_path / "site")
    assert (config.images, config.labels) == ("dicom", "labels.csv")


def test_keys_are_their_owners_only_and_the_request_holds_their_public_halves(site: Path) -> None:
    for name in ("state/signing.key", "state/site.key", "node/node.key", "node/runtime.secret"):
        assert stat.S_IMODE((site / name).stat().st_mode) == 0o600, name
    assert [stat.S_IMODE((site / name).stat().st_mode) for name in ("state", "node", "run")] == [
        0o700,
        0o700,
        0o750,
    ]
    assert len((site / "node" / "runtime.secret").read_bytes()) == 48
    request = read_request(site / "request.zip")
    assert request.signing_key == public_text(load_key(site / "state" / "signing.key"))
    node_key = serialization.load_ssh_private_key((site / "node" / "node.key").read_bytes(), None)
    assert isinstance(node_key, ec.EllipticCurvePrivateKey)
    assert isinstance(node_key.curve, ec.SECP384R1)
    public = node_key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    assert request.node_key == public.decode()


def test_a_request_holds_no_private_key_no_path_and_nothing_of_the_cohort(site: Path) -> None:
    import zipfile

    with zipfile.ZipFile(site / "request.zip") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    secret = (site / "node" / "node.key").read_bytes().splitlines()[1:-1]
    secret += (site / "state" / "signing.key").read_bytes().splitlines()[1:-1]
    for forbidden in [*secret, str(site).encode(), b"radiology-2026", b"2026-17", b"consent"]:
        assert forbidden not in content


@pytest.mark.parametrize(
    ("existing", "code"),
    [
        ("site.yaml", "bad-site"),
        ("policy.yaml", "bad-policy"),
        ("cohort.yaml", "bad-site"),
        ("request.zip", "site-exists"),
        ("state/signing.key", "site-exists"),
        ("node/node.key", "site-exists"),
    ],
)
def test_init_overwrites_nothing(existing: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "site" / existing
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("the operator's")
    before = everything(tmp_path)
    with pytest.raises(ConfigError) as caught:
        made(tmp_path / "site")
    assert caught.value.code == code
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"images": "nowhere"}, "no-such-folder"),
        ({"level": "careless"}, "unknown-level"),
        ({"name": "Hospital A"}, "bad-site"),
        ({"cohort": "../x"}, "bad-site"),
        ({"nominal_patients": 0}, "bad-site"),
        ({"stand_in": "x" * 501}, "bad-site"),
    ],
)
def test_a_refused_init_leaves_nothing_behind(changes: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path / "site", **changes)
    assert caught.value.code == code
    assert everything(tmp_path) == {}


def test_init_refuses_a_state_folder_inside_the_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path / "site", images=tmp_path)
    assert caught.value.code == "bad-site"


def test_an_init_that_fails_midway_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("client.site.enrolment.write_request", full)
        with pytest.raises(ConfigError) as caught:
            made(tmp_path / "site")
    assert caught.value.code == "not-writable"
    made(tmp_path / "site")


def test_what_is_unusual_is_said_and_allowed(tmp_path: Path) -> None:
    said: list[str] = []
    made(tmp_path / "site", nominal_patients=137, warn=said.append)
    assert read_site(tmp_path / "site")[0].nominal_patients == 137
    assert [word in " ".join(said) for word in ("137", "labels.csv")] == [True, True]


@pytest.mark.parametrize("field", ["ethics_approval", "consent_basis"])
@pytest.mark.parametrize("value", ["", " \t", "-", "n/a", "TBD"])
def test_a_hospital_without_ethics_or_consent_is_not_made(tmp_path: Path, field: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path / "site", **{field: value})
    assert caught.value.code == "ethics-missing"
    assert not (tmp_path / "site").exists()
    made(tmp_path / "site", **{field: value}, kind="public")


def test_a_new_site_joins_ids_that_differ_in_writing_only(site: Path) -> None:
    assert read_site(site)[0].patients.join == ("width", "case", "spaces", "charset")


def test_levels_are_ordered_and_say_epsilon_and_delta() -> None:
    assert list(LEVELS) == ["cautious", "usual", "open"]
    policies = [level.policy for level in LEVELS.values()]
    assert [policy.max_epsilon for policy in policies] == sorted(policy.max_epsilon for policy in policies)
    assert [policy.require_approval for policy in policies] == [True, True, False]
    assert [policy.allow_non_private for policy in policies] == [False, False, True]
    for level in LEVELS.values():
        for shown in (
            f"ε at most {level.policy.max_epsilon:g}",
            f"δ at most {level.policy.max_delta:g}",
            "times in 100",
        ):
            assert shown in level.explanation
    assert default_policy("hospital") == LEVELS["usual"].policy.model_copy(update={"require_approval": False})
    assert (LEVELS["usual"].policy.max_epsilon, LEVELS["usual"].policy.epsilon_per_run) == (8.0, 2.0)


def test_join_pins_the_coordinator(site: Path, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    kit = kit_for(site, tmp_path / "kit.zip", key)
    join(site, tmp_path / "kit.zip", kit.fingerprint)
    node = yaml.safe_load((site / "node" / "node.yaml").read_text())
    assert set(node) == {"site", "address", "bundle_sha256", "runtime_port", "health_port", "agent_socket"}
    assert (node["site"], node["address"], node["bundle_sha256"]) == (
        "hospital-a",
        "fed.example:8443",
        "ab" * 32,
    )
    assert node["agent_socket"] == str(site / "run" / "agent.sock")
    assert node["runtime_port"] != node["health_port"]
    assert (site / "node" / "ca.crt").read_text() == CA
    assert coordinator_of(site / "state") == {
        "federation": "north",
        "coordinator_key": public_text(key),
        "fingerprint": kit.fingerprint,
        "expires": kit.expires.isoformat(),
        "version": "0.1.0",
    }


def test_a_fingerprint_is_compared_as_people_write_it(
    site: Path, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    kit = kit_for(site, tmp_path / "kit.zip", key)
    join(site, tmp_path / "kit.zip", " " + kit.fingerprint.upper().replace("-", " ") + "\n")


@pytest.mark.parametrize("given", ["", "abcd", "0" * 64])
def test_a_wrong_fingerprint_changes_nothing(
    given: str, site: Path, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    kit_for(site, tmp_path / "kit.zip", key)
    before = everything(site)
    with pytest.raises(ConfigError) as caught:
        join(site, tmp_path / "kit.zip", given)
    assert caught.value.code == "wrong-fingerprint"
    assert everything(site) == before


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"site": "hospital-b"}, "wrong-kit"),
        ({"site_key": public_text(Ed25519PrivateKey.generate())}, "wrong-kit"),
        ({"expires": date.today() - timedelta(days=1)}, "kit-expired"),
    ],
)
def test_a_kit_for_somebody_else_or_of_yesterday_is_refused(
    changes: dict[str, Any], code: str, site: Path, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    kit = kit_for(site, tmp_path / "kit.zip", key, **changes)
    before = everything(site)
    with pytest.raises(ConfigError) as caught:
        join(site, tmp_path / "kit.zip", kit.fingerprint)
    assert caught.value.code == code
    assert everything(site) == before


def test_a_renewed_kit_replaces_what_the_kit_holds_and_nothing_else(
    site: Path, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    kit = kit_for(site, tmp_path / "kit.zip", key)
    join(site, tmp_path / "kit.zip", kit.fingerprint)
    before = everything(site)
    renewed = kit_for(
        site, tmp_path / "kit2.zip", key, expires=date.today() + timedelta(days=700), bundle_sha256="cd" * 32
    )
    join(site, tmp_path / "kit2.zip", renewed.fingerprint)
    after = everything(site)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"node/node.yaml", "state/coordinator.json"}
    ports = [yaml.safe_load(files["node/node.yaml"]) for files in (before, after)]
    assert [ports[0][name] for name in ("runtime_port", "health_port")] == [
        ports[1][name] for name in ("runtime_port", "health_port")
    ]


def test_another_federation_is_joined_only_by_leaving(
    site: Path, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    kit = kit_for(site, tmp_path / "kit.zip", key)
    join(site, tmp_path / "kit.zip", kit.fingerprint)
    other = kit_for(site, tmp_path / "other.zip", Ed25519PrivateKey.generate(), federation="north")
    before = everything(site)
    with pytest.raises(ConfigError) as caught:
        join(site, tmp_path / "other.zip", other.fingerprint)
    assert caught.value.code == "other-federation"
    assert everything(site) == before
    join(site, tmp_path / "other.zip", other.fingerprint, leave=True)
    pinned = coordinator_of(site / "state")
    assert pinned is not None
    assert pinned["fingerprint"] == other.fingerprint


def test_levels_are_what_docs_privacy_says_and_the_default_is_that_of_usual() -> None:
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    for name, level in LEVELS.items():
        one = level.policy
        cells = (
            f"*{name}*",
            f"{one.max_epsilon:g}",
            f"{one.epsilon_per_run:g}",
            f"{one.max_delta:g}",
            str(one.min_nominal_patients),
            "yes" if one.allow_non_private else "no",
            one.evaluation,
            "yes" if one.require_approval else "no",
        )
        assert f"| {' | '.join(cells)} |" in page
    assert LEVELS["cautious"].policy.max_rounds == 100
    assert default_policy("hospital") == LEVELS["usual"].policy.model_copy(update={"require_approval": False})


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_damaged_pin_is_an_error_and_not_a_site_that_never_joined(site: Path, content: str) -> None:
    (site / "state" / "coordinator.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        coordinator_of(site / "state")
    assert caught.value.code == "bad-coordinator"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_as_owner(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.site.enrolment.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_as_owner(path, b"new")
    assert everything(tmp_path) == {"file": b"old"}


BY_HAND = """# written by hand
name: hospital-a   # as the coordinator knows us
kind: hospital
cohort: radiology-2026
images: ../images
labels: sheets/labels.csv
nominal_patients: 200
state: kept
"""


def by_hand(folder: Path, text: str = BY_HAND) -> dict[str, Any]:
    """A site as README begins it, with the key that `data check` made; gives what `init` is told of it."""
    (folder / "sheets").mkdir(parents=True)
    (folder / "site.yaml").write_text(text, encoding="utf-8")
    (folder / "sheets" / "labels.csv").write_text("file,metal\na.dcm,1\n")
    site_key(folder / "kept")
    return {"labels": folder / "sheets" / "labels.csv"}


def test_init_adopts_a_site_that_was_written_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    values = by_hand(folder)
    key = (folder / "kept" / "site.key").read_bytes()
    made(folder, **values, assessed=("metal",))
    text = (folder / "site.yaml").read_text(encoding="utf-8")
    assert text.startswith(BY_HAND)
    config, _ = read_site(folder)
    assert (config.policy, config.assessed, config.split) == ("policy.yaml", ("metal",), Split())
    assert (folder / "kept" / "site.key").read_bytes() == key
    assert not (folder / "state").exists()
    assert read_request(folder / "request.zip").signing_key == public_text(
        load_key(folder / "kept" / "signing.key")
    )
    with pytest.raises(ConfigError) as caught:
        made(folder, **values)
    assert caught.value.code == "site-exists"


def test_init_keeps_what_the_operator_decided(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    values = by_hand(
        folder, BY_HAND + "split: {train: 0.5, test: 0.5}\nassessed: [motion]\npolicy: caps.yaml\n"
    )
    (folder / "caps.yaml").write_text("max_epsilon: 1.5\nmax_delta: 1.0e-6\n")
    (folder / "cohort.yaml").write_text("name: radiology-2026\nethics_approval: '7'\n")
    before = (folder / "site.yaml").read_bytes()
    made(folder, **values, level="", consent_basis="broad consent")
    assert (folder / "site.yaml").read_bytes() == before
    assert (folder / "caps.yaml").read_text() == "max_epsilon: 1.5\nmax_delta: 1.0e-6\n"
    assert not (folder / "policy.yaml").exists()
    assert yaml.safe_load((folder / "cohort.yaml").read_text()) == {
        "name": "radiology-2026",
        "ethics_approval": "7",
        "consent_basis": "broad consent",
    }


@pytest.mark.parametrize(
    "changes", [{"name": "other"}, {"cohort": "c"}, {"nominal_patients": 100}, {"labels": "labels.csv"}]
)
def test_init_does_not_contradict_site_yaml(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "site"
    values = by_hand(folder)
    before = everything(tmp_path)
    with pytest.raises(ConfigError) as caught:
        made(folder, **(values | changes))
    assert caught.value.code == "bad-argument"
    assert everything(tmp_path) == before


def test_keys_that_cannot_be_added_are_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    flow = "{name: hospital-a, kind: hospital, cohort: radiology-2026, images: ../images, "
    values = by_hand(folder, flow + "labels: sheets/labels.csv, nominal_patients: 200, state: kept}\n")
    (folder / "kept" / "site.key").unlink()
    before = everything(tmp_path)
    with pytest.raises(ConfigError) as caught:
        made(folder, **values)
    assert (caught.value.code, "policy: policy.yaml" in caught.value.hint) == ("bad-site", True)
    left = everything(tmp_path)
    assert {name for name in left if "kept" not in name} == {name for name in before if "kept" not in name}


def test_a_new_folder_beside_a_site_is_told_that_its_key_is_new(tmp_path: Path) -> None:
    values = by_hand(tmp_path / "mine", BY_HAND.replace("state: kept", "state: state"))
    site_key(tmp_path / "mine" / "state")
    told: list[str] = []
    made(tmp_path / "site", **values, warn=told.append)
    assert any("new site key" in line and str(tmp_path / "mine") in line for line in told)


def test_a_new_site_is_not_made_over_a_spent_budget(site: Path) -> None:
    """Deleting keys and ledger, or another name of the cohort, gives no fresh budget."""
    (site / "state" / "sent.jsonl").write_text('{"class": "dp"}\n')
    for path in (*site.rglob("*.key"), site / "request.zip", site / "node" / "runtime.secret"):
        if path.name != "site.key":
            path.unlink()
    for path in (site / "state").glob("ledger*"):
        path.unlink()
    before = everything(site)
    with pytest.raises(LedgerError) as caught:
        made(site)
    assert caught.value.code == "ledger-missing"
    assert everything(site) == before
