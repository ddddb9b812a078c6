"""Export a model to ONNX, checked against torch; int8 convolutions only behind a gate.

The file holds the weights and what the model's file says of itself, so that it can be applied without torch
(`client.predict.exported`). Int8 is static, of the convolutions alone: the linear neck holds a whitening,
whose small differences of large numbers eight bits cannot carry.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from client.predict import exported
from client.predict.model import Model
from client.predict.operating_point import PHANTOM_SEED, PHANTOMS, draw
from common.artifacts import DEFAULT_LABELS, MODALITIES, applies_to
from common.counts import per_patient
from common.errors import ConfigError, RefusedError, RunError
from common.files import write_bytes
from common.preprocess import CHANNELS, to_channels
from common.public_slices import Slices

LARGEST_DIFFERENCE = 1e-3
"""Of a logit of the exported fp32 model from torch, on slices it was not exported with."""
INT8_LOGIT, INT8_AUROC = 0.5, 0.005
"""The gate of int8 on the public phantoms: largest change of a logit, largest change of an AUROC."""
CHECK_SEED, CALIBRATION_SEED, CHECK_PATIENTS, CALIBRATION_PATIENTS = 9010, 9011, 24, 40
OPSET = 17


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and how far its logits are from torch."""

    path: str
    precision: str
    sha256: str  # of the model
    bytes: int
    largest_difference: float  # logit
    aurocs: dict[str, tuple[float, float]] | None = None  # artifact -> torch, export; of int8

    def public(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def export(model: Model, path: Path, *, int8: bool = False) -> Export:
    """Write a model as ONNX, after its logits were compared with those of torch.

    Raises:
        ConfigError: `missing-extra`; `wrong-model`, as `Model.network`.
        RunError: `export-differs`, a logit differs by more than `LARGEST_DIFFERENCE`; nothing is written.
        RefusedError: `int8-differs`, the gate of int8 refused; the message has its figures.
    """
    for name in ("onnx", "onnxruntime"):
        if find_spec(name) is None:
            raise ConfigError(
                f"fedqc export needs {name}", code="missing-extra", hint="pip install 'fedqc[onnx]'"
            )
    with tempfile.TemporaryDirectory(prefix="fedqc-export-") as folder:
        plain = Path(folder) / "plain.onnx"
        _write(model, plain)
        patients, seed = (PHANTOMS, PHANTOM_SEED) if int8 else (CHECK_PATIENTS, CHECK_SEED)
        test = draw(patients, seed, model.size, model.labels)
        expected = _by_torch(model, test)
        found = _of(plain, test)
        difference = float(np.abs(found - expected).max())
        if not difference <= LARGEST_DIFFERENCE:
            raise RunError(
                f"{path}: a logit differs by {difference:.4g} from torch's; at most {LARGEST_DIFFERENCE:g}",
                code="export-differs",
                hint="nothing was written; another version of onnxruntime may agree",
            )
        chosen, aurocs = plain, None
        if int8:
            chosen = Path(folder) / "int8.onnx"
            _quantize(plain, chosen, model.size)
            found = _of(chosen, test)
            difference, aurocs = gate(expected, found, test, model.labels)
        _describe(chosen, model, "int8" if int8 else "fp32", difference)
        data = chosen.read_bytes()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_bytes(path, data, 0o600)
    return Export(
        path=str(path),
        precision="int8" if int8 else "fp32",
        sha256=model.sha256,
        bytes=len(data),
        largest_difference=difference,
        aurocs=aurocs,
    )


def gate(
    expected: np.ndarray, found: np.ndarray, test: Slices, artifacts: Sequence[str] = DEFAULT_LABELS
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Largest change of a logit that can be asked for, and of each artifact the AUROCs of patients.

    Args:
        artifacts: the names of the columns.

    Raises:
        RefusedError: `int8-differs`, either exceeds its bound.
    """
    may_occur = np.array([applies_to(name, artifacts) for name in MODALITIES])[test.modality].reshape(
        expected.shape
    )
    difference = float(np.abs(found - expected)[may_occur].max())
    aurocs = {}
    for place, name in enumerate(artifacts):
        pair = []
        for logits in (expected, found):
            scores, truth = per_patient(logits, test.labels, test.patients)
            with_it, without = scores[truth[:, place] == 1, place], scores[truth[:, place] == 0, place]
            if len(with_it) and len(without):
                wins = (with_it[:, None] > without) + 0.5 * (with_it[:, None] == without)
                pair.append(float(wins.mean()))
        if pair:
            aurocs[name] = (pair[0], pair[1])
    lost = max(abs(after - before) for before, after in aurocs.values())
    if difference > INT8_LOGIT or lost > INT8_AUROC:
        raise RefusedError(
            f"int8 moves a logit by {difference:.2f} (at most {INT8_LOGIT:g}) and an AUROC by {lost:.4f} "
            f"(at most {INT8_AUROC:g}) on {PHANTOMS} public phantoms",
            code="int8-differs",
            hint="nothing was written; export without --int8",
        )
    return difference, aurocs


def _by_torch(model: Model, test: Slices) -> np.ndarray:
    from client.predict.network import score

    return score(model.network, test.images, test.modality, np.arange(len(test.images)))


def _of(path: Path, test: Slices) -> np.ndarray:
    return exported.score(path, test.images, test.modality, np.arange(len(test.images)))


def _write(model: Model, path: Path) -> None:
    import torch

    x = torch.zeros(2, CHANNELS, model.size, model.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.network,
            (x,),
            str(path),
            input_names=["x"],
            output_names=["logits"],
            dynamic_axes={"x": {0: "n"}, "logits": {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )


def _quantize(plain: Path, path: Path, size: int) -> None:
    """Static int8 of the convolutions, each channel of the weights with its own scale; ranges of activations
    from phantoms that no threshold is found on.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    slices = draw(CALIBRATION_PATIENTS, CALIBRATION_SEED, size)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.at = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            rows = slice(self.at, self.at + exported.BATCH)
            self.at += exported.BATCH
            images = np.asarray(slices.images[rows])
            return {"x": to_channels(images, slices.modality[rows])} if len(images) else None

    quantize_static(
        str(plain),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )


def _describe(path: Path, model: Model, precision: str, difference: float) -> None:
    import onnx

    with safetensors.safe_open(model.path, framework="np") as file:
        about: dict[str, str] = file.metadata() or {}
    proto = onnx.load(str(path))
    onnx.helper.set_model_props(
        proto,
        about
        | {
            "network": json.dumps({"name": model.name, "args": dict(model.args)}, sort_keys=True),
            "image_size": str(model.size),
            "sha256": model.sha256,
            "precision": precision,
            "unlearned": json.dumps(model.unlearned),
            "largest_difference": f"{difference:.3g}",
        },
    )
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
