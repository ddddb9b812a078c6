"""Does a network learn more from where an artifact is, and does it then show it better than Grad-CAM?

    python benchmarks/mask_head.py [--quick] [--format json] [--update docs/networks.md]

Phantoms of public appearances are drawn twice from the same seeds, with an artifact and without it: where the
two differ is where it is. A place of a mask is an eighth of the slice's width in pixels, square: it shows the
artifact where a quarter of its pixels changed by more than the simulators' own limit (3 % of the largest
signal, 10 HU).

    plain         `small_cnn`, trained on labels
    with masks    the same network, seed and order of slices, and beside its head one that gives a mask for
                  each artifact from the maps of the last two stages; loss: binary cross-entropy of the labels
                  + soft Dice of the masks, both per slice
    frozen        only the head for masks is trained, on the maps of the shipped network as it is
    Grad-CAM      of the plain network (Selvaraju et al., ICCV 2017), on the map that shows the artifact
                  better: stage 3, as fine as the masks, or stage 4
    body          places that are not background, whatever the artifact
    mean mask     how often each place is changed in the training phantoms, whatever the slice

Each threshold is the best one, and so is the map of Grad-CAM, for each artifact on phantoms that are neither
trained nor tested on. Overlap is that of slices that show the artifact, the mean over slices and then over
artifacts; "marked where absent" is the share of places marked in slices of the modality that do not show it.
Starts: random weights, and the shipped ones, which have seen 24,000 other phantoms. Intervals: 95 %, over
draws of test patients, of the mean over seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import environment, say, to_json, update_table
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional

from common.artifacts import DEFAULT_LABELS, INDEX, MODALITIES
from common.counts import patient_labels, patient_scores
from common.learning import SCORING_BATCH, batches, keep_freed_memory, score, set_threads
from common.losses import masked_bce, soft_dice
from common.model_file import load_model
from common.models import fresh
from common.models.small_cnn import CHANNELS, SmallCNN
from common.optimizers import adamw
from common.physics.appearance import PUBLIC_APPEARANCES, Appearance
from common.physics.phantom import PhantomSlice, draw_patient
from common.preprocess import normalize_image, pad_to_square, resample, to_stored
from common.public_slices import Slices
from common.weights import manifest_of, unflatten

START = Path(__file__).parents[1] / "common/models/small_cnn_phantoms.safetensors"
CHANGED_HU, CHANGED_SHARE = 10.0, 0.03
"""As the simulators' masks have it: common/physics/ct.py, common/physics/kspace.py."""
PLACE_PX, PLACE_CHANGED = 8, 0.25
THRESHOLDS = np.linspace(0.05, 0.95, 19)
SETS = {"trained": 737373, "chosen": 747474, "tested": 757575}
"""Seeds: none of a demo site's, of pre-training or of a public set."""
BATCH, DECAY, WIDTH, DRAWS = 16, 1e-4, 32, 400


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much is done."""

    size: int = 128  # pixels of a slice's side
    patients: Mapping[str, int] = field(default_factory=lambda: {"trained": 240, "chosen": 60, "tested": 140})
    epochs: Mapping[str, int] = field(default_factory=lambda: {"random": 5, "shipped": 2})
    rates: Mapping[str, float] = field(default_factory=lambda: {"random": 1e-3, "shipped": 3e-4})
    frozen_epochs: int = 20
    frozen_rate: float = 3e-3
    seeds: int = 3


QUICK = Work(
    size=32,
    patients={"trained": 24, "chosen": 24, "tested": 24},
    epochs={"random": 1, "shipped": 1},
    frozen_epochs=1,
    seeds=1,
)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Slices, and where their artifacts are."""

    slices: Slices
    masks: np.ndarray  # float32 (n, A, S / 8, S / 8): 1, 0, or nan where it cannot occur in the modality


def changed(shown: PhantomSlice, without: PhantomSlice, places: int) -> np.ndarray:
    """Where one image differs from the other, float32 (places, places), 1 or 0."""
    limit = CHANGED_HU if shown.modality == "CT" else CHANGED_SHARE * float(without.image.max())
    pixels = (np.abs(shown.image - without.image) > limit).astype(np.float32)
    return (resample(pad_to_square(pixels, fill=0), places) >= PLACE_CHANGED).astype(np.float32)


def draw_masked(appearances: Sequence[Appearance], patients: int, seed: int, size: int) -> Masked:
    """Phantoms spread over the appearances, as `server.public_model.public_set.draw`, with their masks."""
    places = size // PLACE_PX
    images, modality, labels, masks, owners = [], [], [], [], []
    for patient in range(patients):
        appearance = appearances[patient % len(appearances)]
        shown = draw_patient(appearance, patient, seed)
        without = {
            name: draw_patient(
                replace(appearance, prevalence={**appearance.prevalence, name: 0.0}), patient, seed
            )
            for name in DEFAULT_LABELS
            if name in shown[0].labels and any(item.labels[name] for item in shown)
        }
        for position, item in enumerate(shown):
            row = np.full(len(DEFAULT_LABELS), np.nan, np.float32)
            maps = np.full((len(DEFAULT_LABELS), places, places), np.nan, np.float32)
            for name in DEFAULT_LABELS:
                if (present := item.labels.get(name)) is None:
                    continue
                row[INDEX[name]] = present
                maps[INDEX[name]] = changed(item, without[name][position], places) if present else 0
            images.append(to_stored(normalize_image(item.image, item.modality, size), item.modality))
            modality.append(MODALITIES.index(item.modality))
            labels.append(row)
            masks.append(maps)
            owners.append(patient)
    slices = Slices(
        images=np.stack(images),
        modality=np.array(modality, np.int8),
        labels=np.stack(labels),
        patients=np.array(owners, np.int64),
    )
    return Masked(slices=slices, masks=np.stack(masks))


class MaskHead(nn.Module):
    """Maps of the last two stages to one mask an artifact: (B, artifacts, S / 8, S / 8) logits."""

    def __init__(self, artifacts: int) -> None:
        super().__init__()
        self.early = nn.Conv2d(CHANNELS[2], WIDTH, 1)
        self.late = nn.Conv2d(CHANNELS[3], WIDTH, 1)
        self.last = nn.Conv2d(WIDTH, artifacts, 3, padding=1)

    def forward(self, early: Tensor, late: Tensor) -> Tensor:
        return self.last(functional.relu(self.early(early) + enlarged(self.late(late), early)))


def fresh_head(seed: int) -> MaskHead:
    """One whose first weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskHead(len(DEFAULT_LABELS))


def enlarged(small: Tensor, like: Tensor) -> Tensor:
    """Maps (B, C, h, w) by linear interpolation at the places of `like`."""
    return functional.interpolate(small, size=like.shape[-2:], mode="bilinear", align_corners=False)


def mask_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice loss of each mask over its places, the mean over the artifacts that can occur in the slice.

    Args:
        logits: shape (B, A, h, w). masks: the same, 1, 0 or nan.
    Returns:
        shape (B,).
    """
    losses = soft_dice(logits.flatten(2).flatten(0, 1), masks.flatten(2).flatten(0, 1)).view(logits.shape[:2])
    assessed = ~masks[:, :, 0, 0].isnan()
    return torch.where(assessed, losses, 0.0).sum(1) / assessed.sum(1).clamp(min=1)


def train(
    network: SmallCNN, beside: MaskHead | None, data: Masked, *, epochs: int, rate: float, seed: int
) -> None:
    """In place; without a head for masks on labels alone."""
    slices, rng = data.slices, np.random.default_rng(seed)
    parameters = [*network.parameters(), *(beside.parameters() if beside else ())]
    update = adamw(parameters, rate, DECAY)
    labels, masks = torch.from_numpy(slices.labels), torch.from_numpy(data.masks)
    network.train()
    for _ in range(epochs):
        order = rng.permutation(len(slices.images))
        for chosen, x in batches(slices.images, slices.modality, order, BATCH):
            early, late = network.maps(x)
            loss = masked_bce(network.head(network.features_of(early, late)), labels[chosen])
            if beside is not None:
                loss = loss + mask_dice(beside(early, late), masks[chosen])
            update(torch.autograd.grad(loss.mean(), parameters))


def train_beside(
    network: SmallCNN, beside: MaskHead, data: Masked, *, epochs: int, rate: float, seed: int
) -> None:
    """The head for masks alone, in place, on the maps of a network that stays as it is."""
    rng, parameters = np.random.default_rng(seed), list(beside.parameters())
    update = adamw(parameters, rate, DECAY)
    with torch.no_grad():
        parts = [network.maps(x) for x in _all(data.slices)]
    early, late = (torch.cat(one) for one in zip(*parts, strict=True))
    masks = torch.from_numpy(data.masks)
    for _ in range(epochs):
        for chosen in torch.from_numpy(rng.permutation(len(masks))).split(BATCH):
            loss = mask_dice(beside(early[chosen], late[chosen]), masks[chosen])
            update(torch.autograd.grad(loss.mean(), parameters))


@torch.no_grad()
def predicted(network: SmallCNN, beside: MaskHead, slices: Slices) -> np.ndarray:
    """Probabilities of the places, float32 (n, A, h, w)."""
    parts = [beside(*network.maps(x)).sigmoid().numpy() for x in _all(slices)]
    return np.concatenate(parts)


def grad_cam(network: SmallCNN, slices: Slices) -> dict[str, np.ndarray]:
    """Map -> Grad-CAM of each logit on it, over its largest place: float32 (n, A, h, w), places of stage 3.

    The sum of the map's channels, each times the mean over places of the logit's gradient; what is negative
    is 0.
    """
    found: dict[str, list[np.ndarray]] = {"stage 3": [], "stage 4": []}
    for x in _all(slices):
        maps = network.maps(x)
        logits = network.head(network.features_of(*maps))
        cams: list[list[Tensor]] = [[], []]
        for one in range(logits.shape[1]):
            gradients = torch.autograd.grad(logits[:, one].sum(), maps, retain_graph=True)
            for cam, values, gradient in zip(cams, maps, gradients, strict=True):
                cam.append((values * gradient.mean((2, 3), keepdim=True)).sum(1).detach())
        for name, cam in zip(found, cams, strict=True):
            fine = enlarged(torch.stack(cam, 1).clamp(min=0), maps[0])
            found[name].append((fine / fine.amax((2, 3), keepdim=True).clamp(min=1e-12)).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def body(slices: Slices) -> np.ndarray:
    """Share of the pixels of each place that are not background, float32 (n, 1, h, w)."""
    shares = [functional.avg_pool2d((x[:, :1] > 0.05).float(), PLACE_PX).numpy() for x in _all(slices)]
    return np.concatenate(shares)


def _all(slices: Slices) -> Sequence[Tensor]:
    rows = np.arange(len(slices.images))
    return [x for _, x in batches(slices.images, slices.modality, rows, SCORING_BATCH)]


def overlap(marked: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and Dice of each slice, shape (n,); bool arrays (n, h, w), no truth empty."""
    both, either = (found.sum((1, 2)) for found in (marked & truth, marked | truth))
    return both / either, 2 * both / (marked.sum((1, 2)) + truth.sum((1, 2)))


def showing(data: Masked, artifact: int) -> np.ndarray:
    """Rows of the slices where a place shows it."""
    return np.flatnonzero((data.masks[:, artifact] == 1).any((1, 2)))


def best_threshold(maps: np.ndarray, data: Masked, artifact: int) -> tuple[float, float]:
    """The mean IoU of slices that show it at the best threshold, and that."""
    rows = showing(data, artifact)
    truth = data.masks[rows, artifact] == 1
    return max((float(overlap(maps[rows] >= one, truth)[0].mean()), float(one)) for one in THRESHOLDS)


def localized(
    chosen_by: Sequence[np.ndarray], maps: Sequence[np.ndarray], chosen: Masked, tested: Masked
) -> dict[str, Any]:
    """How well one of several kinds of maps shows each artifact.

    Args:
        chosen_by, maps: of the slices that thresholds are chosen on and of those tested, (n, A or 1, h, w).
    Returns:
        artifact -> IoU and Dice of each tested slice that shows it, the patients, share marked where absent.
    """
    found = {}
    for artifact, name in enumerate(DEFAULT_LABELS):
        tried = [best_threshold(_of(one, artifact), chosen, artifact) for one in chosen_by]
        kind = int(np.argmax([iou for iou, _ in tried]))
        marked = _of(maps[kind], artifact) >= tried[kind][1]
        rows = showing(tested, artifact)
        iou, dice = overlap(marked[rows], tested.masks[rows, artifact] == 1)
        absent = tested.slices.labels[:, artifact] == 0
        found[name] = {
            "iou": iou,
            "dice": dice,
            "owners": tested.slices.patients[rows],
            "absent": float(marked[absent].mean()),
        }
    return found


def _of(maps: np.ndarray, artifact: int) -> np.ndarray:
    return maps[:, artifact if maps.shape[1] > 1 else 0]


def aurocs(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each artifact, shape (A,), from patients' scores and labels (n, A); nan where not defined."""
    found = np.full(labels.shape[1], np.nan)
    for one in range(labels.shape[1]):
        assessed = ~np.isnan(labels[:, one])
        present = labels[assessed, one] == 1
        positives, negatives = present.sum(), (~present).sum()
        if positives and negatives:
            ranks = rankdata(logits[assessed, one])[present].sum()
            found[one] = (ranks - positives * (positives + 1) / 2) / (positives * negatives)
    return found


def interval(of_draw: Callable[[np.ndarray], float], patients: int) -> list[float]:
    """95 % of what draws of patients with replacement give; `of_draw` takes how often each was drawn."""
    rng = np.random.default_rng(0)
    counts = [np.bincount(rng.integers(0, patients, patients), minlength=patients) for _ in range(DRAWS)]
    return [float(one) for one in np.nanpercentile([of_draw(one) for one in counts], [2.5, 97.5])]


def measure(work: Work) -> dict[str, Any]:
    """All figures of the tables."""
    set_threads(1)
    keep_freed_memory()
    began = time.process_time()
    sets = {
        name: draw_masked(PUBLIC_APPEARANCES, work.patients[name], seed, work.size)
        for name, seed in SETS.items()
    }
    chosen, tested = sets["chosen"], sets["tested"]
    say(f"phantoms drawn, {time.process_time() - began:.0f} CPU-s")
    places = {
        name: [localized(*_both(lambda data: [body(data.slices)], sets), chosen, tested)] for name in ["body"]
    }
    mean = np.stack(
        [
            sets["trained"].masks[showing(sets["trained"], one), one].mean(0)
            for one in range(len(DEFAULT_LABELS))
        ]
    )
    places["mean mask"] = [
        localized(
            *_both(lambda data: [np.broadcast_to(mean, (len(data.masks), *mean.shape))], sets), chosen, tested
        )
    ]
    shipped = fresh("small_cnn", 0)
    manifest = manifest_of(shipped.state_dict())
    shipped.load_state_dict(unflatten(load_model(START, manifest), manifest))
    scores: dict[str, list[np.ndarray]] = {"shipped, as it is": [scored(shipped, tested)]}
    places["Grad-CAM, shipped as it is"] = [of_cam(shipped, sets)]
    for seed in range(work.seeds):
        for start in work.epochs:
            for arm in ("plain", "with masks"):
                network = fresh("small_cnn", seed)
                if start == "shipped":
                    network.load_state_dict(shipped.state_dict())
                beside = fresh_head(seed) if arm == "with masks" else None
                train(
                    network,
                    beside,
                    sets["trained"],
                    epochs=work.epochs[start],
                    rate=work.rates[start],
                    seed=seed,
                )
                scores.setdefault(f"{start}, {arm}", []).append(scored(network, tested))
                shows = of_cam(network, sets) if beside is None else of_masks(network, beside, sets)
                named = f"{'Grad-CAM' if beside is None else 'masks'}, {start} start"
                places.setdefault(named, []).append(shows)
                iou = np.mean([one["iou"].mean() for one in shows.values()])
                auroc = np.nanmean(_aurocs(scores[f"{start}, {arm}"][-1], tested))
                say(
                    f"seed {seed}, {start}, {arm}: AUROC {auroc:.3f}, IoU {iou:.3f}, "
                    f"{time.process_time() - began:.0f} CPU-s"
                )
    for seed in range(work.seeds):
        beside = fresh_head(seed)
        train_beside(
            shipped,
            beside,
            sets["trained"],
            epochs=work.frozen_epochs,
            rate=work.frozen_rate,
            seed=seed,
        )
        places.setdefault("masks, shipped and frozen", []).append(of_masks(shipped, beside, sets))
    say(f"heads on the frozen network, {time.process_time() - began:.0f} CPU-s")
    return summary(work, sets, scores, places) | {"cpu_s": time.process_time() - began}


def _both(maps: Callable[[Masked], list[np.ndarray]], sets: Mapping[str, Masked]) -> list[list[np.ndarray]]:
    return [maps(sets["chosen"]), maps(sets["tested"])]


def of_cam(network: SmallCNN, sets: Mapping[str, Masked]) -> dict[str, Any]:
    maps = _both(lambda data: list(grad_cam(network, data.slices).values()), sets)
    return localized(*maps, sets["chosen"], sets["tested"])


def of_masks(network: SmallCNN, beside: MaskHead, sets: Mapping[str, Masked]) -> dict[str, Any]:
    maps = _both(lambda data: [predicted(network, beside, data.slices)], sets)
    return localized(*maps, sets["chosen"], sets["tested"])


def scored(network: SmallCNN, data: Masked) -> np.ndarray:
    """Logits of patients, (patients, A)."""
    slices = data.slices
    logits = score(network, slices.images, slices.modality, np.arange(len(slices.images)))
    return patient_scores(logits, slices.labels, slices.patients)


def _truth(data: Masked) -> np.ndarray:
    return patient_labels(data.slices.labels, data.slices.patients)


def _aurocs(logits: np.ndarray, data: Masked, counts: np.ndarray | None = None) -> np.ndarray:
    rows = np.arange(len(logits)) if counts is None else np.repeat(np.arange(len(logits)), counts)
    return aurocs(logits[rows], _truth(data)[rows])


def summary(
    work: Work,
    sets: Mapping[str, Masked],
    scores: Mapping[str, Sequence[np.ndarray]],
    places: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Means over seeds with their intervals."""
    tested = sets["tested"]
    truth, patients = _truth(tested), work.patients["tested"]

    def macro(logits: Sequence[np.ndarray], counts: np.ndarray) -> float:
        rows = np.repeat(np.arange(patients), counts)
        return float(np.mean([np.nanmean(aurocs(one[rows], truth[rows])) for one in logits]))

    def gain(start: str, counts: np.ndarray) -> float:
        return macro(scores[f"{start}, with masks"], counts) - macro(scores[f"{start}, plain"], counts)

    def mean_of(runs: Sequence[Mapping[str, Any]], what: str, counts: np.ndarray) -> float:
        found = []
        for run in runs:
            for one in run.values():
                weights = counts[one["owners"]]
                found.append(np.average(one[what], weights=weights) if weights.sum() else np.nan)
        return float(np.nanmean(found))

    once = np.ones(patients, np.int64)
    return {
        "work": {
            "size": work.size,
            "patients": dict(work.patients),
            "epochs": dict(work.epochs),
            "frozen_epochs": work.frozen_epochs,
            "seeds": work.seeds,
        }
        | {"slices": {name: len(data.masks) for name, data in sets.items()}},
        "auroc": {
            name: {
                "macro": macro(logits, once),
                "seeds": [macro([one], once) for one in logits],
                "artifacts": dict(
                    zip(
                        DEFAULT_LABELS,
                        np.mean([aurocs(one, truth) for one in logits], 0).tolist(),
                        strict=True,
                    )
                ),
            }
            for name, logits in scores.items()
        },
        "gain": {
            start: {
                "macro": gain(start, once),
                "interval": interval(lambda counts, start=start: gain(start, counts), patients),
            }
            for start in work.epochs
        },
        "places": {
            name: {
                "iou": mean_of(runs, "iou", once),
                "interval": interval(lambda counts, runs=runs: mean_of(runs, "iou", counts), patients),
                "seeds": [mean_of([run], "iou", once) for run in runs],
                "dice": mean_of(runs, "dice", once),
                "absent": float(np.mean([one["absent"] for run in runs for one in run.values()])),
                "artifacts": {
                    artifact: float(np.mean([run[artifact]["iou"].mean() for run in runs]))
                    for artifact in DEFAULT_LABELS
                },
            }
            for name, runs in places.items()
        },
        "shown": {name: len(showing(tested, one)) for one, name in enumerate(DEFAULT_LABELS)},
    }


def table(found: dict[str, Any]) -> str:
    """The tables of the page."""
    work, auroc = found["work"], found["auroc"]
    lines = ["| start | plain: AUROC | with masks | difference | of each seed |", "|---|---|---|---|---|"]
    for start, gain in found["gain"].items():
        plain, masks = auroc[f"{start}, plain"], auroc[f"{start}, with masks"]
        low, high = gain["interval"]
        each = ", ".join(f"{b - a:+.3f}" for a, b in zip(plain["seeds"], masks["seeds"], strict=True))
        lines.append(
            f"| {start} | {plain['macro']:.3f} | {masks['macro']:.3f} "
            f"| {gain['macro']:+.3f} [{low:+.3f}, {high:+.3f}] | {each} |"
        )
    lines += [
        "",
        "| where it is | IoU | Dice | marked where absent | "
        + " | ".join(f"IoU {name}" for name in DEFAULT_LABELS)
        + " |",
        f"|---|---|---|---|{'---|' * len(DEFAULT_LABELS)}",
    ]
    for name, one in sorted(found["places"].items(), key=lambda item: -item[1]["iou"]):
        low, high = one["interval"]
        of_each = " | ".join(f"{one['artifacts'][artifact]:.2f}" for artifact in DEFAULT_LABELS)
        lines.append(
            f"| {name} | {one['iou']:.3f} [{low:.3f}, {high:.3f}] | {one['dice']:.3f} "
            f"| {one['absent']:.2f} | {of_each} |"
        )
    patients, slices, epochs = work["patients"], work["slices"], work["epochs"]
    shown = ", ".join(f"{count} {name}" for name, count in found["shown"].items())
    about = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [
        "",
        f"{work['seeds']} seeds; {patients['trained']} phantom patients ({slices['trained']} slices) train "
        f"for {', '.join(f'{count} epochs ({start})' for start, count in epochs.items())}, "
        f"{work['frozen_epochs']} (frozen), "
        f"{patients['chosen']} choose thresholds, {patients['tested']} ({slices['tested']} slices) are "
        f"tested; slices that show it: {shown}. "
        f"The shipped weights as they are: AUROC {auroc['shipped, as it is']['macro']:.3f}. "
        f"{found['cpu_s']:.0f} CPU-s.",
        "",
        f"{about['date']}, {about['machine']}, {versions}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small slices, few patients, one epoch, one seed"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="replace the tables of this page")
    arguments = parser.parse_args()
    if arguments.quick and arguments.update:
        parser.error("--quick measures nothing that a page should say")
    found = measure(QUICK if arguments.quick else Work())
    found["environment"] = environment(("fedqc", "torch", "numpy"))
    if arguments.update:
        update_table(arguments.update, "mask_head", table(found))
    print(to_json(found) if arguments.format == "json" else table(found))


if __name__ == "__main__":
    main()
