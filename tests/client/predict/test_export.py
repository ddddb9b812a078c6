"""`fedqc export`: the file answers as torch does, carries what its model says, and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client.predict import export as exporting
from client.predict import exported, operating_point
from client.predict.export import INT8_AUROC, INT8_LOGIT, gate
from client.predict.model import START, Model, find_model, score
from client.predict.network import score as by_torch
from common.artifacts import DEFAULT_LABELS, MODALITIES
from common.errors import ConfigError, RefusedError, RunError
from common.model_file import described, save_model
from common.models import build
from common.plan import parse_plan
from common.public_slices import Slices
from common.weights import flatten, manifest_of
from tests.helpers.command_line import ROOT, typed
from tests.helpers.predicted import write

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def slices(patients: int, size: int) -> Slices:
    """CT and MR of noise; every second patient has every artifact."""
    rng = np.random.default_rng(2)
    modality = (np.arange(2 * patients) % 2).astype(np.int8)
    images = np.where(
        (modality == 0)[:, None, None],
        rng.integers(-1024, 2000, (2 * patients, size, size)),
        rng.integers(0, 4096, (2 * patients, size, size)),
    ).astype(np.int16)
    owners = np.repeat(np.arange(patients), 2)
    return Slices(
        images=images,
        modality=modality,
        labels=np.repeat(owners[:, None] % 2, len(DEFAULT_LABELS), axis=1).astype(np.float32),
        patients=owners,
    )


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporting, "draw", lambda patients, seed, size, artifacts=(): slices(8, size))
    monkeypatch.setattr(operating_point, "PHANTOMS", 6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("FEDQC_SITE", raising=False)


@pytest.fixture(scope="module")
def model() -> Model:
    return find_model(START, None)


def test_an_export_answers_as_torch_and_says_what_its_model_says(tmp_path: Path) -> None:
    about = described(parse_plan({"name": "p"}), "federated_dp")
    state = build("small_cnn").state_dict()
    path = tmp_path / "model.safetensors"
    save_model(path, flatten(state), manifest_of(state), {"run": "r1", "arm": "federated_dp", **about})
    plain = find_model(str(path), None)
    exports = tmp_path / "exports"
    written = exporting.export(plain, exports / f"{plain.sha256}.onnx")
    assert written.largest_difference < 1e-3
    fast = find_model(str(path), None, exports=exports)
    assert fast.export == exports / f"{plain.sha256}.onnx"
    for what in ("name", "args", "size", "sha256", "run", "arm", "privacy", "precision"):
        assert getattr(fast, what) == getattr(plain, what), what
    some = slices(20, 128)  # more than a batch
    rows = np.arange(len(some.images))[::-1]
    assert np.allclose(
        score(fast, some.images, some.modality, rows),
        score(plain, some.images, some.modality, rows),
        atol=1e-3,
    )
    alone = find_model(str(fast.export), None)
    assert (alone.sha256, alone.privacy.epsilon) == (plain.sha256, 2.0)
    with pytest.raises(ConfigError):
        _ = alone.network


def test_an_export_that_differs_is_not_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        exporting,
        "_by_torch",
        lambda *how: by_torch(model.network, how[1].images, how[1].modality, np.arange(16)) + 0.1,
    )
    with pytest.raises(RunError) as caught:
        exporting.export(model, tmp_path / "m.onnx")
    assert caught.value.code == "export-differs"
    assert not (tmp_path / "m.onnx").exists()


def test_int8_passes_only_within_its_bounds() -> None:
    test = slices(40, 16)
    logits = np.where(test.labels == 1, 2.0, -2.0) + np.random.default_rng(0).normal(
        0, 0.1, test.labels.shape
    )
    impossible = logits.copy()
    impossible[test.modality == MODALITIES.index("CT"), DEFAULT_LABELS.index("motion")] += 9
    difference, aurocs = gate(logits, impossible, test)
    assert difference == 0, "motion of a CT slice is not asked for"
    moved = logits.copy()
    moved[1, DEFAULT_LABELS.index("motion")] += INT8_LOGIT + 0.01
    with pytest.raises(RefusedError) as caught:
        gate(logits, moved, test)
    assert (caught.value.code, "0.51" in caught.value.message) == ("int8-differs", True)
    near = np.where(test.labels == 1, 0.01, -0.01)
    other = near.copy()
    other[test.patients == 1] = -0.02  # one of 20 patients falls below all without: AUROC 0.95
    with pytest.raises(RefusedError):
        gate(near, other, test)
    assert INT8_AUROC == 0.005
    assert set(aurocs) == set(DEFAULT_LABELS)


def test_bf16_is_near(model: Model) -> None:
    some = slices(20, 128)
    rows = np.arange(len(some.images))
    plain = by_torch(model.network, some.images, some.modality, rows)
    halves = by_torch(model.network, some.images, some.modality, rows, bf16=True)
    assert 0 < np.abs(plain - halves).max() < 0.05 * np.abs(plain).max()


def test_a_kept_export_is_applied_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command in a fresh process; thresholds were found before."""
    folder = tmp_path / "images"
    for number in range(3):
        write(folder / f"ct{number}.dcm", number + 1)
        write(folder / f"mr{number}.dcm", number + 11, modality="MR")
    monkeypatch.chdir(tmp_path)
    assert typed(capsys, "predict", folder)[0] == 0
    assert typed(capsys, "export", START)[0] == 0
    expected = json.loads(typed(capsys, "predict", folder, "--format", "json")[1])
    never = {"torch", "flwr", "grpc", "pandas", "opacus", "highdicom", "openpyxl"}
    page_only = {"scipy", "jinja2", "client.predict.page", "client.predict.mistakes", "client.reader_study"}
    out = tmp_path / "out"
    for more, absent in ([], never | page_only), (["--out", str(out)], never):
        words = ["predict", str(folder), "--format", "json", *more]
        code = (
            "import sys\n"
            "from common.cli import main\n"
            "try:\n"
            f"    main({words!r})\n"
            "except SystemExit as end:\n"
            "    assert end.code == 0, end.code\n"
            f"loaded = sorted({absent!r} & set(sys.modules))\n"
            "assert not loaded, loaded\n"
            "assert 'onnxruntime' in sys.modules\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["studies"] == expected["studies"]
    assert (out / "report.html").is_file()


def test_the_command_keeps_or_names_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(capsys, "export", START, "--int8")[0] == 2, "another file than the model's"
    assert typed(capsys, "export", START, "--out", "m.txt")[0] == 2
    status, said, _ = typed(capsys, "export", START, "--out", tmp_path / "m.onnx", "--format", "json")
    assert status == 0
    assert json.loads(said)["bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert exported.about(tmp_path / "m.onnx")["precision"] == "fp32"
    (tmp_path / "no.onnx").write_text("no")
    status, _, err = typed(capsys, "predict", tmp_path, "--model", tmp_path / "no.onnx")
    assert (status, "[wrong-model]" in err) == (2, True)
