"""Find the model that a person means, and say what it is: hash, network, what its training cost a patient."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors

from client.predict import exported
from client.site import model_in_use
from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from common.lineage import KEY as LINEAGE
from common.lineage import PACKAGED, Lineage
from common.model_file import labels_of, load_model, unlearned_in
from common.names import MAX_RUN
from common.plan import STUDY
from common.preprocess import DEFAULT_SIZE
from common.privacy import epsilon_text
from common.weights import manifest_of, resolve_initial, unflatten

if TYPE_CHECKING:
    from torch import nn

LATEST = "latest"
START = "package:small_cnn_real.safetensors"
"""Without a model of a run: fedqc's public start that has seen real anatomy."""

Origin = Literal["in-use", "run", "file", "start", "ensemble"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What the training of a model cost a patient of a hospital, as its file says."""

    basis: Literal[
        "asked by its plan",
        "asked by their plans together",
        "no hospital's patients",
        "not private",
        "unknown",
    ]
    epsilon: float | None = None
    delta: float | None = None

    @property
    def text(self) -> str:
        """Without a comma: it stands in a table."""
        if self.epsilon is None or self.delta is None:
            return self.basis
        return f"{epsilon_text(self.epsilon)} (delta {self.delta:g}; {self.basis})"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network with its weights. The network itself is built when it is asked for: what only applies an
    exported model never loads torch.
    """

    path: Path
    name: str  # of the network
    args: Mapping[str, Any] = field(default_factory=dict)
    size: int  # side of its slices in pixels
    sha256: str  # of the file
    origin: Origin
    start: str  # which packaged start; "" where it is none
    run: str
    arm: str
    privacy: Privacy
    labels: tuple[str, ...] = DEFAULT_LABELS  # the outputs of the network
    unlearned: tuple[str, ...] = ()  # those of them that no training ever touched; they say nothing
    export: Path | None = None  # the file that is applied by ONNX Runtime; None: torch
    precision: str = "fp32"  # or bf16, int8
    has_start: bool = False  # it is one of the public starts that fedqc brings, or an ensemble with one
    members: tuple[Model, ...] = ()  # of an ensemble, see `ensemble`

    @property
    def hashes(self) -> tuple[str, ...]:
        """The SHA-256 of each file that it is made of."""
        return tuple(one.sha256 for one in self.members) or (self.sha256,)

    @property
    def learned(self) -> tuple[str, ...]:
        """The artifacts that the model knows."""
        return tuple(name for name in self.labels if name not in self.unlearned)

    @functools.cached_property
    def network(self) -> nn.Module:
        """In torch, ready to be applied.

        Raises:
            ConfigError: `wrong-model`, the file does not hold the tensors of this network, or is an export.
        """
        from common.models import build

        if self.members:
            raise ConfigError("an ensemble has no single network", code="wrong-model")
        if self.path.suffix == exported.SUFFIX:
            raise ConfigError(
                f"{self.path}: an exported model has no network in torch",
                code="wrong-model",
                hint="name the model that it was made of",
            )
        network = build(self.name, self.args, self.labels)
        manifest = manifest_of(network.state_dict())
        network.load_state_dict(unflatten(load_model(self.path, manifest), manifest))
        return network.eval()


def score(model: Model, images: np.ndarray, modality: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Logits of `rows` of slices as cached, float32 (len(rows), A), by ONNX Runtime or torch; of an ensemble
    the mean of its members'.
    """
    if model.members:
        parts = [
            score(one, images, modality, rows)[:, [one.labels.index(name) for name in model.labels]]
            for one in model.members
        ]
        return np.asarray(np.mean(parts, axis=0, dtype=np.float32))
    if model.export is not None:
        return exported.score(model.export, images, modality, rows)
    from client.predict.network import score as by_torch

    return by_torch(model.network, images, modality, rows, bf16=model.precision == "bf16")


def ensemble(models: Sequence[Model]) -> Model:
    """Models that judge together: the logit of each artifact that all of them know is the mean of theirs.

    What follows from logits (threshold, probability, severity) is found for the ensemble as for any model,
    so that its probability is calibrated; the mean of calibrated probabilities would not be (Ranjan and
    Gneiting, J. R. Stat. Soc. B 72:71, 2010). The order of the models does not matter.

    Raises:
        ConfigError: `wrong-ensemble`, a model stands there twice, they take slices of different sizes, or no
            artifact is known to all.
    """
    members = tuple(sorted(models, key=lambda one: one.sha256))
    hashes, sizes = [one.sha256 for one in members], {one.size for one in members}
    labels = tuple(name for name in members[0].labels if all(name in one.learned for one in members))
    wrong = (
        "the same model twice"
        if len(set(hashes)) < len(members)
        else f"slices of different sizes ({', '.join(map(str, sorted(sizes)))} pixels)"
        if len(sizes) > 1
        else "no artifact that all of them know"
        if not labels
        else ""
    )
    if wrong:
        raise ConfigError(
            f"--model: {wrong}",
            code="wrong-ensemble",
            hint="an ensemble: different models, trained on slices of one size, for the same artifacts",
        )
    return Model(
        path=members[0].path,
        name=" + ".join(one.name for one in members),
        size=members[0].size,
        sha256=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        origin="ensemble",
        start="",
        run="",
        arm="",
        privacy=_together([one.privacy for one in members]),
        labels=labels,
        has_start=any(one.has_start for one in members),
        members=members,
    )


def _together(members: Sequence[Privacy]) -> Privacy:
    """What several trainings cost a patient who was in all of them: at most the sum (basic composition)."""
    for basis in ("not private", "unknown"):
        if any(one.basis == basis for one in members):
            return Privacy(basis=basis)
    paid = [(one.epsilon, one.delta) for one in members if one.epsilon is not None and one.delta is not None]
    if not paid:
        return Privacy(basis="no hospital's patients")
    return Privacy(
        basis="asked by its plan" if len(paid) == 1 else "asked by their plans together",
        epsilon=sum(epsilon for epsilon, _ in paid),
        delta=sum(delta for _, delta in paid),
    )


def in_precision(model: Model, precision: Precision) -> Model:
    """The same model, applied in another precision by torch."""
    members = tuple(in_precision(one, precision) for one in model.members)
    return replace(model, precision=precision, members=members)


def find_model(wanted: str | None, state: Path | None, *, exports: Path | None = None) -> Model:
    """The model that `--model` means.

    Args:
        wanted: `latest`: the model that this site put to use (`fedqc site use`), never one that was only
            received; a folder of a run, a file, or `package:NAME`; None: `latest` where there is one, else
            `START`.
        state: the state folder of this site; None without a site.
        exports: the folder of exported models; where it holds this one, it is applied by ONNX Runtime. None:
            torch applies it, unless the file itself is an export.
    Raises:
        ConfigError: `no-model`, there is no such model; `wrong-model`, it is none, or its network is not
            known; `study-model`, it looks at several slices at once, which predict does not do.
        DataError: `models-damaged`, the log of models or the file of the model in use was changed.
    """
    if wanted in (None, LATEST):
        now = None if state is None else model_in_use.in_use(state)
        if now is not None and state is not None:
            return _read(model_in_use.file_of(state, now["model"]), "in-use", exports)
        if wanted == LATEST:
            where = "no site is given" if state is None else "this site has put no model to use"
            raise ConfigError(
                f"--model latest: {where}",
                code="no-model",
                hint="fedqc site use latest tests the last one received; or --model RUN or FILE",
            )
        wanted = START
    assert wanted is not None
    if wanted.startswith("package:"):
        path = resolve_initial(wanted, None)
        return _read(path, "start", exports, start=path.stem)
    path = Path(wanted)
    if path.is_dir():
        return _read(path / "model.safetensors", "run", exports)
    return _read(path, "file", exports)


def _read(path: Path, origin: Origin, exports: Path | None, start: str = "") -> Model:
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such model file",
            code="no-model",
            hint="latest, the folder of a finished run, or a .safetensors file",
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    export = path if path.suffix == exported.SUFFIX else None
    if export is None and exports is not None and exported.available():
        kept = exports / f"{sha256}{exported.SUFFIX}"
        export = kept if kept.is_file() else None
    if export is not None:
        about = exported.about(export)
        # a file of another precision gives other scores: it is a model of its own, with points of its own
        sha256 = about["sha256"] if about["precision"] == "fp32" else sha256
        network = json.loads(about["network"])
        name, args = str(network["name"]), dict(network["args"])
        labels, unlearned = labels_of(export, about), tuple(json.loads(about["unlearned"]))
    else:
        about, name, args = _described(path)
        labels = labels_of(path, about)
        unlearned = unlearned_in(path, labels)
    size = about.get("image_size", "")
    is_start = origin == "start" or sha256 == _start_sha256()
    return Model(
        path=path,
        name=name,
        args=args,
        size=int(size) if size.isdecimal() and 16 <= int(size) <= 1024 else DEFAULT_SIZE,
        sha256=sha256,
        origin=origin,
        start=start,
        run=" ".join(about.get("run", "")[:MAX_RUN].split()),
        arm=about.get("arm", ""),
        privacy=privacy_of(about, is_start=is_start),
        labels=labels,
        unlearned=unlearned,
        export=export,
        precision=about.get("precision", "fp32"),
        has_start=is_start,
    )


def _start_sha256() -> str:
    return hashlib.sha256(resolve_initial(START, None).read_bytes()).hexdigest()


def _described(path: Path) -> tuple[dict[str, str], str, dict[str, Any]]:
    """Metadata of a model's file, and name and arguments of its network, whose tensors it holds."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about: dict[str, str] = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: not a model file ({error})", code="wrong-model") from None
    labels = labels_of(path, about)
    name, args = _network_of(path, about, shapes, labels)
    if name == STUDY or args.get("neighbours"):
        seen = "studies" if name == STUDY else "slices with their neighbours"
        raise ConfigError(
            f"{path}: a network of {seen}",
            code="study-model",
            hint="fedqc predict takes networks of single slices",
        )
    return about, name, args


def privacy_of(about: Mapping[str, str], *, is_start: bool = False) -> Privacy:
    """What the metadata of a model file say of its privacy. An epsilon counts only where the lineage, if it
    is stated, does not say that patients of a hospital shaped an ancestor without noise.

    Args:
        is_start: one of the weights that fedqc brings.
    """
    lineage = Lineage.parse(about.get(LINEAGE, "")) or (PACKAGED if is_start else None)
    if lineage is not None and "hospital" not in lineage.kinds:
        return Privacy(basis="no hospital's patients")
    if lineage is not None and not lineage.private:
        return Privacy(basis="not private")
    try:
        return Privacy(
            basis="asked by its plan", epsilon=float(about["epsilon"]), delta=float(about["delta"])
        )
    except (KeyError, ValueError):
        return Privacy(basis="not private" if "network" in about and about.get("arm") else "unknown")


def _network_of(
    path: Path, about: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], labels: Sequence[str]
) -> tuple[str, dict[str, bool | int | float | str]]:
    """Name and arguments of the network: as stated, else the one whose tensors these are."""
    import torch

    from common.models import MODELS, build

    if stated := about.get("network"):
        try:
            value = json.loads(stated)
            name, args = str(value["name"]), dict(value["args"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}: states no readable network", code="wrong-model") from None
        if name not in MODELS:
            raise ConfigError(
                f"{path}: its network {name!r} is unknown to this version",
                code="wrong-model",
                hint=f"known: {', '.join(MODELS)}",
            )
    else:
        name, args = "", {}
        for known in MODELS:
            with torch.device("meta"):
                state = build(known, labels=labels).state_dict()
            if {key: tuple(tensor.shape) for key, tensor in state.items()} == dict(shapes):
                name = known
                break
    if name in ("", STUDY) or args.get("neighbours"):
        if name:
            return name, args
        raise ConfigError(
            f"{path}: its tensors are those of no network that is known",
            code="wrong-model",
            hint=f"known: {', '.join(MODELS)}",
        )
    with torch.device("meta"):
        state = build(name, args, labels).state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if expected != dict(shapes):
        wrong = sorted(set(expected.items()) ^ set(shapes.items()))[0][0]
        raise ConfigError(f"{path}: tensor `{wrong}` is not what its network {name} has", code="wrong-model")
    return name, args
