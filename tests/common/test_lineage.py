"""A model file says what it was trained on, and a child inherits it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError
from common.lineage import KEY, NO_DATA, PACKAGED, Lineage, lineage_of_plan, read_lineage
from common.model_file import save_model
from common.weights import Manifest

MANIFEST = Manifest(names=("head.weight",), shapes=((2,),))
FLAT = np.zeros(2, np.float32)


def test_one_step_without_noise_on_a_hospital_is_never_forgotten() -> None:
    public = NO_DATA.child("pretrain", weights="0" * 64, kinds=["public"], private=False)
    assert public.private, "nobody needed protection"
    noised = public.child("federated_dp", weights="1" * 64, kinds=["hospital", "public"], private=True)
    assert noised.private
    assert noised.child("federated", weights="2" * 64, kinds=["synthetic"], private=False).private
    open_step = public.child("federated", weights="3" * 64, kinds=["hospital"], private=False)
    assert not open_step.private
    assert not open_step.child("federated_dp", weights="4" * 64, kinds=["hospital"], private=True).private
    assert open_step.kinds == ("hospital", "public")


def test_ancestors_are_nearest_first_and_bounded() -> None:
    line = NO_DATA
    for number in range(150):
        line = line.child("x", weights=f"{number:064x}", kinds=["public"], private=True)
    assert line.ancestors[:2] == (f"{149:064x}", f"{148:064x}")
    assert len(line.ancestors) == 100
    assert Lineage.parse(line.text()) == line


def test_a_file_carries_its_lineage(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, FLAT, MANIFEST, {KEY: PACKAGED.text()})
    assert read_lineage(path) == PACKAGED
    assert lineage_of_plan(str(path), path) == PACKAGED
    save_model(path, FLAT, MANIFEST, {"arm": "federated"})
    assert read_lineage(path) is None
    assert lineage_of_plan("package:m.safetensors", path) == PACKAGED
    assert lineage_of_plan("random", None) == NO_DATA
    path.write_bytes(b"no model")
    with pytest.raises(ConfigError) as caught:
        read_lineage(path)
    assert caught.value.code == "wrong-model"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kinds": ["hospital"]}', "9" * 5000, "[" * 10000])
def test_what_is_no_lineage_is_none(text: str) -> None:
    assert Lineage.parse(text) is None
