"""What a person may get wrong: one line with a code and a place, one hint, the right exit status, and nothing
half-written.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command_line import fedqc, simulate_words
from tests.helpers.consortium import HELD_OUT, SITES, TRAINING, settle
from tests.helpers.room import A, Room, run


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "state" not in path.relative_to(folder).parts
    }


@pytest.fixture
def room(data: Path, tmp_path: Path) -> Room:
    made = Room(tmp_path)
    made.ask(arms=["federated"], training={"rounds": 1})
    return made


def no_data(room: Room) -> None:
    shutil.rmtree(room.data)


def data_is_a_file(room: Room) -> None:
    shutil.rmtree(room.data)
    room.data.write_text("x", encoding="utf-8")


def no_sites(room: Room) -> None:
    for site in SITES:
        (room.site(site) / "site.yaml").unlink()


def no_images_folder(room: Room) -> None:
    shutil.rmtree(room.site() / "images")


def empty_site(room: Room) -> None:
    shutil.rmtree(room.site() / "images")
    (room.site() / "images").mkdir()


def no_labels(room: Room) -> None:
    (room.site() / "labels.csv").unlink()


def labels_of_absent_images(room: Room) -> None:
    (room.site() / "labels.csv").write_text("file,metal\nelsewhere/x.dcm,1\n", encoding="utf-8")


def unknown_artifact(room: Room) -> None:
    (room.site() / "labels.csv").write_text("file,metall\np0000_0.dcm,1\n", encoding="utf-8")


def bad_label(room: Room) -> None:
    (room.site() / "labels.csv").write_text("file,metal\np0000_0.dcm,maybe\n", encoding="utf-8")


def label_twice(room: Room) -> None:
    (room.site() / "labels.csv").write_text("file,metal\np0000_0.dcm,1\np0000_0.dcm,0\n", encoding="utf-8")


def all_unreadable(room: Room) -> None:
    for path in (room.site() / "images").iterdir():
        path.write_bytes(b"not an image")


def site_typo(room: Room) -> None:
    settle(room.site(), nominal_patiens=50)


def site_not_yaml(room: Room) -> None:
    (room.site() / "site.yaml").write_text("name: [", encoding="utf-8")


def plan_typo(room: Room) -> None:
    room.ask(trainning={"rounds": 1})


def plan_out_of_range(room: Room) -> None:
    room.ask(privacy={"epsilon": -1})


def no_plan(room: Room) -> None:
    room.plan.unlink()


def unknown_model(room: Room) -> None:
    room.ask(model={"name": "resnet1800"})


def no_initial_weights(room: Room) -> None:
    room.ask(model={"initial": "/nowhere/x.safetensors"})


def wrong_initial_weights(room: Room) -> None:
    room.ask(model={"sha256": "0" * 64})


def initial_weights_are_no_model(room: Room) -> None:
    (room.folder / "x.safetensors").write_text("no", encoding="utf-8")
    room.ask(model={"initial": str(room.folder / "x.safetensors")})


def unknown_held_out(room: Room) -> None:
    room.ask(held_out=["hospital-x"])


def quorum_too_large(room: Room) -> None:
    room.ask(federation={"quorum": 4})


def run_exists(room: Room) -> None:
    room.out.mkdir(parents=True)
    (room.out / "plan.yaml").write_text("name: mine", encoding="utf-8")


def out_not_empty(room: Room) -> None:
    room.out.mkdir(parents=True)
    (room.out / "notes.txt").write_text("mine", encoding="utf-8")


def out_below_a_file(room: Room) -> None:
    (room.folder / "runs").write_text("a file", encoding="utf-8")


PLACE: dict[Callable[[Room], None], tuple[str, str]] = {
    no_data: ("no-such-folder", "--data {data}"),
    data_is_a_file: ("no-such-folder", "--data {data}"),
    no_sites: ("no-sites", "--data {data}"),
    no_images_folder: ("no-such-folder", "{site}/images"),
    empty_site: ("empty-site", "{site}/images"),
    no_labels: ("labels-missing", "{site}/labels.csv"),
    labels_of_absent_images: ("labels-match-nothing", "{site}/labels.csv"),
    unknown_artifact: ("unknown-artifact", "{site}/labels.csv: row 1, column B"),
    bad_label: ("bad-label", "{site}/labels.csv: row 2, column B (metal)"),
    label_twice: ("duplicate-label", "{site}/labels.csv: row 3"),
    all_unreadable: ("no-usable-images", "{site}/images"),
    site_typo: ("bad-site", "{site}/site.yaml: unknown key `nominal_patiens`"),
    site_not_yaml: ("bad-site", "{site}/site.yaml: not valid YAML: line 1"),
    plan_typo: ("bad-plan", "{plan}: unknown key `trainning`"),
    plan_out_of_range: ("bad-plan", "{plan}: `privacy.epsilon` = -1"),
    no_plan: ("no-such-plan", "{plan}"),
    unknown_model: ("unknown-model", "model.name = 'resnet1800'"),
    no_initial_weights: ("no-initial-weights", "model.initial = '/nowhere/x.safetensors'"),
    wrong_initial_weights: ("wrong-initial-weights", "model.initial"),
    initial_weights_are_no_model: ("wrong-model", "{folder}/x.safetensors"),
    unknown_held_out: ("unknown-site", "held_out = 'hospital-x'"),
    quorum_too_large: ("too-few-sites", "federation.quorum = 4"),
    run_exists: ("run-exists", "{out}"),
    out_not_empty: ("run-exists", "{out}"),
    out_below_a_file: ("not-writable", "{out}"),
}


@pytest.mark.parametrize("spoil", PLACE, ids=lambda spoil: spoil.__name__)
def test_one_line_says_what_and_where(
    spoil: Callable[[Room], None], room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    code, place = PLACE[spoil]
    spoil(room)
    before = listing(room.folder)
    assert run(simulate_words(room.plan, room.data, room.out)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    lines = said.err.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("fedqc: ")]
    assert errors in ([len(lines) - 1], [len(lines) - 2, len(lines) - 1]), said.err
    error, *hint = lines[errors[0] :]
    assert re.fullmatch(r"fedqc: error \[[a-z-]+\]: \S.*", error)
    assert all(re.fullmatch(r"fedqc: hint: \S.*", line) for line in hint)
    expected = place.format(
        data=room.data, site=room.site(), plan=room.plan, out=room.out, folder=room.folder
    )
    assert error.startswith(f"fedqc: error [{code}]: {expected}"), error
    assert listing(room.folder) == before, "something was written"


@pytest.mark.parametrize(
    "spoil",
    [
        empty_site,
        unknown_artifact,
        unknown_held_out,
        quorum_too_large,
        plan_typo,
        run_exists,
        no_data,
        no_sites,
    ],
)
def test_the_hint_names_what_would_work(
    spoil: Callable[[Room], None], room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        empty_site: "hidden files",
        unknown_artifact: "beam_hardening",
        unknown_held_out: HELD_OUT,
        quorum_too_large: "quorum",
        plan_typo: "training",
        run_exists: "fedqc run resume",
        no_data: "fedqc data phantom",
        no_sites: "fedqc data phantom",
    }
    spoil(room)
    assert run(simulate_words(room.plan, room.data, room.out)) == 2
    assert words[spoil] in capsys.readouterr().err.splitlines()[-1]  # type: ignore[index]


def test_one_bad_file_does_not_stop_a_site(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    first = min((room.site() / "images").iterdir())
    first.write_bytes(first.read_bytes()[:300])
    assert run(["data", "check", room.site(), "--format", "json"]) == 0
    said = capsys.readouterr()
    assert f'"used": {len(list((room.site() / "images").iterdir())) - 1}' in said.out
    assert "p0000" not in said.out


def test_phantoms_never_overwrite(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(room.folder)
    assert run(["data", "phantom", room.data, "--sites", 2, "--patients", 2]) == 2
    assert capsys.readouterr().err.startswith(
        f"fedqc: error [output-exists]: {room.data}: exists and is not an empty folder\nfedqc: hint: "
    )
    assert listing(room.folder) == before


def test_a_site_that_is_none_is_named(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", room.folder]) == 2
    assert capsys.readouterr().err.startswith(f"fedqc: error [no-such-site]: {room.folder}/site.yaml")


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_folder_that_is_no_run_is_named(
    command: str, room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, room.data, *([room.data] if command == "compare" else [])]) == 2
    assert capsys.readouterr().err.startswith(f"fedqc: error [no-such-run]: {room.data}")
    assert not (room.data / "report.html").exists()


def test_a_run_that_fails_says_so_with_status_one_and_can_be_resumed(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    room.ask(arms=["federated"], training={"rounds": 1}, federation={"quorum": 3})
    settle(room.site(), policy={"allow_non_private": False})
    assert run(simulate_words(room.plan, room.data, room.out)) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("fedqc: error [no-quorum]: federated, round 1: 2 valid answers, the quorum is 3")
    assert "resume" in hint
    settle(room.site(), policy={"allow_non_private": True})
    assert run(["run", "resume", room.out]) == 0


def test_a_refusing_site_ends_with_status_six(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    settle(room.site(), policy={"allow_non_private": False})
    assert run(simulate_words(room.plan, room.data, room.out)) == 6
    assert f"partial: federated: {A} refused" in capsys.readouterr().out


def test_a_plan_that_every_site_refuses_ends_with_status_four(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    for site in SITES:
        settle(room.site(site), nominal_patients=20)
    room.ask(arms=["federated_dp"], training={"rounds": 1})
    assert run(simulate_words(room.plan, room.data, room.out)) == 4
    assert "[refused]" in capsys.readouterr().err


def test_the_console_script_says_the_same(room: Room) -> None:
    """Once in a process of its own: nothing else is written to stderr, not even by the libraries."""
    said = fedqc(*simulate_words(room.plan, room.folder / "nowhere", room.out), cwd=room.folder)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == (
        f"fedqc: error [no-such-folder]: --data {room.folder}/nowhere: no such folder\nfedqc: hint: fedqc "
        "data phantom DIR makes one\n"
    )


def test_ctrl_c_says_one_line(
    room: Room, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.run.conduct.conduct", interrupted)
    assert run(simulate_words(room.plan, room.data, room.out)) == 130
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last[0].startswith("fedqc: error [interrupted]: ")


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(seed: int, room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*simulate_words(room.plan, room.data, room.out), "--seed", seed]) == 2
    assert str(seed) in capsys.readouterr().err
    assert not room.out.exists()


def test_an_unknown_loss_is_refused_before_anything_is_written(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    room.ask(training={"rounds": 1, "loss": "bec"})
    assert run(simulate_words(room.plan, room.data, room.out)) == 2
    assert "[unknown-loss]" in capsys.readouterr().err
    assert not room.out.exists()


def test_a_site_is_known_by_its_name_not_by_its_folder(room: Room) -> None:
    room.site(HELD_OUT).rename(room.site("fourth"))
    room.ask(arms=["pooled"], training={"rounds": 1})
    assert run(simulate_words(room.plan, room.data, room.out)) == 0


def test_a_folder_name_never_lets_a_held_out_site_train(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders hospital-a and hospital-d hold each other's site: the held-out one must not be pooled."""
    from server.run import conduct

    pools: list[tuple[str, ...]] = []
    describe = conduct.describe_sites

    def noted(*words: Any, **more: Any) -> Any:
        found = describe(*words, **more)
        pools.extend(site.description.members for site in found if site.description.members)
        return found

    monkeypatch.setattr(conduct, "describe_sites", noted)
    room.site(HELD_OUT).rename(room.site("x"))
    room.site(A).rename(room.site(HELD_OUT))
    room.site("x").rename(room.site(A))
    room.ask(arms=["pooled"], training={"rounds": 1})
    assert run(simulate_words(room.plan, room.data, room.out)) == 0
    assert [set(members) for members in pools] == [set(TRAINING)]


@pytest.mark.parametrize(
    "words",
    [
        ["simulat"],
        ["simulate"],
        ["data", "nope"],
        ["simulate", "p", "--data", "d", "--out", "o", "--jobs", "0"],
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(list(words)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("fedqc: error [")
    assert len(lines) <= 2
