"""The benchmark of the data path compares the same work, and notices when it is not. No claim about speed is
tested.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def data_path(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("data_path")


@pytest.fixture
def site(data_path: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three slices uncompressed, two in JPEG 2000, small images."""
    monkeypatch.setattr(data_path, "SLICES_A_PATIENT", 1)
    monkeypatch.setattr(data_path, "COMPRESSED_EVERY", 2)
    monkeypatch.setattr(data_path, "SIDES_PX", {"CT": 64, "MR": 32})
    data_path.make_site(tmp_path / "site", 5)
    return data_path.Site(folder=tmp_path / "site", slices={"native": 3, "jpeg-2000": 2})


def results(data_path: ModuleType, side: str, *arguments: Path) -> str:
    work, told = data_path.SIDES[side](*arguments)
    said: str = told(work())
    return said


def test_files_are_what_the_docs_say(data_path: ModuleType, tmp_path: Path) -> None:
    data_path.make_site(tmp_path / "site", 50)
    headers = [
        pydicom.dcmread(path, stop_before_pixels=True)
        for path in (tmp_path / "site" / "images").rglob("*.dcm")
    ]
    assert Counter((header.Modality, header.Rows) for header in headers) == {("CT", 512): 30, ("MR", 256): 20}
    assert Counter(header.file_meta.TransferSyntaxUID.name for header in headers) == {
        "Explicit VR Little Endian": 40,
        "JPEG 2000 Image Compression (Lossless Only)": 10,
    }
    assert set(Counter(header.PatientID for header in headers).values()) == {10}
    assert len({header.SOPInstanceUID for header in headers}) == 50


@pytest.mark.parametrize("kind", ["native", "jpeg-2000"])
def test_the_plain_loop_the_intake_and_the_epoch_end_with_the_same_slices(
    data_path: ModuleType, site: Any, tmp_path: Path, kind: str
) -> None:
    images, cache = site.images(kind), tmp_path / "cache"
    plain = results(data_path, "plain", images)
    assert plain.startswith(f"{site.slices[kind]} slices ")
    assert results(data_path, "intake", images, cache) == plain
    assert results(data_path, "epoch", images, cache) == plain


def test_an_epoch_without_a_cache_gives_no_ratio(data_path: ModuleType, site: Any, tmp_path: Path) -> None:
    with pytest.raises(data_path.BenchmarkError, match="no cache"):
        data_path.SIDES["epoch"](site.images("native"), tmp_path / "nothing")


def test_the_first_check_starts_from_nothing_and_the_second_does_not(
    data_path: ModuleType, site: Any
) -> None:
    first = results(data_path, "first", site.folder)
    written = (site.folder / data_path.CACHE / "store.sqlite3").stat().st_mtime_ns
    assert results(data_path, "second", site.folder) == first
    assert (site.folder / data_path.CACHE / "store.sqlite3").stat().st_mtime_ns == written
    assert json.loads(first)["used"] == 5
    results(data_path, "first", site.folder)
    assert (site.folder / data_path.CACHE / "store.sqlite3").stat().st_mtime_ns > written


def test_sides_that_did_other_work_give_no_ratio(
    data_path: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(side: str, *_: Path, scratch: Path) -> Any:
        return data_path.Outcome(wall_s=1.0, cpu_s=1.0, own_mib=1.0, children_mib=1.0, result=side)

    monkeypatch.setattr(data_path, "start", start)
    assert set(data_path.in_turns({"a": ("same", ()), "b": ("same", ())}, 1, tmp_path)) == {"a", "b"}
    with pytest.raises(data_path.BenchmarkError, match="other work"):
        data_path.in_turns({"a": ("one", ()), "b": ("another", ())}, 1, tmp_path)


def test_the_digest_sees_order_and_number(data_path: ModuleType) -> None:
    slices = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    assert data_path.digest(slices) == data_path.digest(list(slices))
    assert len({data_path.digest(slices), data_path.digest(slices[::-1]), data_path.digest(slices[:1])}) == 3


def test_a_side_runs_in_a_process_of_its_own_and_says_what_it_used(
    data_path: ModuleType, site: Any, tmp_path: Path
) -> None:
    outcome = data_path.start("intake", site.images(), tmp_path / "cache", scratch=tmp_path)
    assert outcome.result == results(data_path, "epoch", site.images(), tmp_path / "cache")
    assert outcome.wall_s > 0
    assert outcome.cpu_s > 0
    assert min(outcome.own_mib, outcome.children_mib) > 10


def test_ratios_are_reference_over_side_and_the_table_says_what_was_missed(
    data_path: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall_s = {"plain": 9.0, "intake": 18.0, "epoch": 0.1, "first": 30.0, "second": 2.0}
    own_mib = {"10-slices": 100.0, "50-slices": 120.0}

    def start(side: str, images: Path, *_: Path, scratch: Path) -> Any:
        mib = own_mib[next((part for part in images.parts if part in own_mib), "10-slices")]
        return data_path.Outcome(
            wall_s=wall_s[side], cpu_s=2 * wall_s[side], own_mib=mib, children_mib=50.0, result="the same"
        )

    def run(command: list[Any]) -> Any:
        words = [str(word) for word in command]
        if words[-3] == "site":
            data_path.make_site(Path(words[-2]), int(words[-1]))
        return data_path.Cost(wall_s=4.0, cpu_s=2.0, peak_mib=1.0)

    monkeypatch.setattr(data_path, "start", start)
    monkeypatch.setattr(data_path, "run", run)
    result = data_path.measure_all(tmp_path, (10, 50), 3)
    assert {kind: found["slices"] for kind, found in result["reading"].items()} == {
        "native": 40,
        "jpeg-2000": 10,
    }
    assert json.loads(data_path.to_json(result))["benchmark"] == "data_path"
    lines = data_path.table(result).splitlines()
    assert "| plain / intake, native | 40 | 2 | 0.50 (0.50–0.50) | 0.50 (0.50–0.50) |  |" in lines
    assert (
        "| plain / epoch from the cache, jpeg-2000 | 10 | 2 | 90 (90–90) | 90 (90–90) | ≥ 80: met |" in lines
    )
    assert "| first / second check | 10 | 3 | 15 (15–15) | 15 (15–15) | ≥ 20: missed |" in lines
    assert (
        "| first / second check, whole commands | 10 | 3 | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |  |" in lines
    )
    assert "| the process | 100.0 | 120.0 | 2 | 1.200 (1.200–1.200) | ≤ 1.1: missed |" in lines
    assert "| largest of its children | 50.0 | 50.0 | 2 | 1.000 (1.000–1.000) | ≤ 1.1: met |" in lines


@pytest.mark.slow
def test_a_tiny_run_measures_everything(data_path: ModuleType, tmp_path: Path) -> None:
    """Every side in a process of its own, on files that a process of their own makes: some thirty of them."""
    result = data_path.measure_all(tmp_path, (10, 50), 1)
    for kind in data_path.KINDS:
        found = result["reading"][kind]
        costs = found["samples"]
        assert found["epoch"]["wall"].median == pytest.approx(
            costs["plain"][0].wall_s / costs["epoch"][0].wall_s
        )
    assert [found["slices"] for found in (*result["check"], *result["command"])] == [10, 50, 10]
    assert "| plain / intake, jpeg-2000 | 10 | 1 |" in data_path.table(result)


def test_the_page_has_a_place_for_the_table() -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "<!-- data_path -->" in page
    assert "<!-- /data_path -->" in page
