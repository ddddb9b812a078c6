"""Show simulated artifacts on real slices: an offline HTML page, or a contact sheet as PNG.

The page has no script and loads nothing. It holds no path, no identifier and no date: a slice is "CT slice
1". It shows images of people.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from client.simulation.gallery_text import definition_of, gallery_speaker, title_of
from client.simulation.real_slices import Simulated, Wish, chosen_slices, seed_of, simulate
from client.views.acquisition import body_of
from common.artifacts import MODALITIES, Modality
from common.errors import ConfigError
from common.files import write_bytes
from common.i18n import Say
from common.preprocess import resample, robust_scale_mr

WINDOW_HU = (-260.0, 340.0)
THUMBNAIL = 128  # of the contact sheet
SMOOTHING = 9  # pixels: an outline follows where most of this neighbourhood changed
NEGATIVE, NEUTRAL, POSITIVE, OUTLINE = (64, 190, 255), (14, 16, 20), (255, 150, 40), (255, 214, 10)
REACH_PERCENTILE = 90.0  # of what changed in the body: an implant must not hide its streaks
# HU, % of the shown range: what a difference picture shows at least
MIN_DIFFERENCE = {
    "CT": 10.0,
    "MR": 2.0,
}
_MARGIN_PX, _TITLE_PX, _FONT_PX = 100, 18, 9  # of the contact sheet: row names, titles
_SHORT = 4  # numbers of a parameter that are written out


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A version of a slice in the row of its block: what a contact sheet has."""

    row: str
    title: str
    simulated: Simulated


@dataclass(frozen=True, kw_only=True)
class Card:
    """One corrupted slice of the page; pictures are data URIs."""

    severities: list[tuple[str, float]]  # heading of each simulator, and how severe
    changed: float
    corrupted: str
    difference: str
    outline: str
    params: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One clean slice and what became of it."""

    name: str
    clean: str
    reach: float  # of the difference pictures: what is brightest
    unit: str
    cards: list[Card]


@dataclass(frozen=True, kw_only=True)
class Section:
    anchor: str
    title: str
    name: str  # as commands know it
    modality: Modality
    definitions: list[str]
    series: list[Series]


# the page


def write_gallery(src: Path, path: Path, wanted: Wish, *, language: str, say: Callable[[str], None]) -> None:
    """Every wanted simulator at every severity on a few slices of `src`, as a page.

    The place of an artifact is drawn once for a slice, so that along a row only its severity grows.
    Raises:
        ConfigError, DataError: the page cannot be written there; no slice can be used.
    """
    gallery_speaker(language)
    refuse_place(path, src, "--gallery FILE.html")
    chosen, _ = chosen_slices(src, wanted, say)
    shown = [
        simulate(one, name, severity, seed_of(wanted.seed, "gallery", name, one.name))
        for modality, slices in chosen.items()
        for name in wanted.of(modality)
        for one in slices
        for severity in wanted.severities
    ]
    write_page(path, shown, seed=wanted.seed, language=language, lead="lead")


def write_page(path: Path, shown: Sequence[Simulated], *, seed: int, language: str, lead: str) -> None:
    """Render the page into `path`, readable by its owner only. Raises: ConfigError: `not-writable`,
    `bad-argument`.
    """
    content = render(shown, seed=seed, language=language, lead=lead)
    try:
        write_bytes(path, content.encode(), 0o600)
    except OSError as error:
        raise ConfigError(
            f"--gallery {path}: cannot be written ({error.strerror})",
            code="not-writable",
            hint="name a new file",
        ) from None


def refuse_place(path: Path, src: Path, option: str) -> None:
    """Raises: ConfigError: `path` is no place for a new file, or lies among the images."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"{path}: not a file in an existing folder",
            code="no-such-folder",
            hint=f"{option}, for example beside SRC",
        )
    if src.is_dir() and path.resolve().is_relative_to(src.resolve()):
        raise ConfigError(
            f"{path}: lies in the folder of images", code="bad-argument", hint=f"{option}, anywhere else"
        )


def render(shown: Sequence[Simulated], *, seed: int, language: str, lead: str = "lead") -> str:
    """The page as one string. Every value is escaped; the only markup is the template's."""
    say = gallery_speaker(language)
    environment = Environment(
        loader=PackageLoader("client.simulation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = _sections(shown, language, say)
    present = {one.modality for one in shown}
    return environment.get_template("gallery.html.j2").render(
        say=say,
        language=language,
        lead=lead,
        seed=seed,
        sections=sections,
        windows=[
            say(f"window.{name}", low=f"{WINDOW_HU[0]:.0f}".replace("-", "−"), high=f"{WINDOW_HU[1]:.0f}")
            for name in MODALITIES
            if name in present
        ],
        colours={"negative": NEGATIVE, "neutral": NEUTRAL, "positive": POSITIVE},
        number=number_text,
        share=share_text,
    )


def _sections(shown: Sequence[Simulated], language: str, say: Say) -> list[Section]:
    by_artifact: dict[tuple[str, ...], list[Simulated]] = {}
    for one in shown:
        by_artifact.setdefault(tuple(one.severities), []).append(one)
    sections = []
    # combinations last
    for place, (names, own) in enumerate(sorted(by_artifact.items(), key=lambda item: len(item[0])), start=1):
        title = title_of(names[0], language)
        for name in names[1:]:
            title = say("and", first=title, second=title_of(name, language))
        by_slice: dict[str, list[Simulated]] = {}
        for one in own:
            by_slice.setdefault(one.name, []).append(one)
        sections.append(
            Section(
                anchor=f"a{place}",
                title=title,
                name=" + ".join(names),
                modality=own[0].modality,
                definitions=[definition_of(name, language, say) for name in names],
                series=[_series(name, of_slice, language, say) for name, of_slice in by_slice.items()],
            )
        )
    return sections


def _series(name: str, shown: Sequence[Simulated], language: str, say: Say) -> Series:
    first = shown[0]
    low, high = window_of(first.clean, first.modality)
    unit = 1.0 if first.modality == "CT" else 100 / (high - low)
    differences = [(one.corrupted - one.clean) * unit for one in shown]
    body = body_of(torch.from_numpy(first.clean), first.modality).numpy()
    changed = [
        np.abs(difference[one.mask & body]) for one, difference in zip(shown, differences, strict=True)
    ]
    strongest = max(
        (float(np.percentile(values, REACH_PERCENTILE)) for values in changed if values.size), default=0.0
    )
    reach = _round_up(max(MIN_DIFFERENCE[first.modality], strongest))
    cards = []
    for one, difference in zip(shown, differences, strict=True):
        grey = _grey(one.corrupted, low, high)
        cards.append(
            Card(
                severities=[(title_of(of, language), severity) for of, severity in one.severities.items()],
                changed=one.changed,
                corrupted=_uri(grey, _GREYS),
                difference=_uri(
                    np.rint(np.clip(difference / reach, -1, 1) * 127 + 128).astype(np.uint8), _DIVERGING
                ),
                outline=_uri(
                    np.where(_edge(one.mask), 255, np.minimum(grey, 254)).astype(np.uint8), _OUTLINED
                ),
                params=[line for of in one.params.values() for line in params_text(of)],
            )
        )
    modality, _, number = name.partition(" slice ")
    return Series(
        name=say("slice", modality=modality, number=number) if number else name,
        clean=_uri(_grey(first.clean, low, high), _GREYS),
        reach=reach,
        unit="HU" if first.modality == "CT" else say("percent"),
        cards=cards,
    )


def window_of(clean: np.ndarray, modality: Modality) -> tuple[float, float]:
    """The values shown as black and white. MR: from the 1st percentile of the slice to the 99.5th of its
    body.
    """
    if modality == "CT":
        return WINDOW_HU
    body = clean[body_of(torch.from_numpy(clean), modality).numpy()]
    low = float(np.percentile(clean, 1))
    high = float(np.percentile(body if body.size else clean, 99.5))
    return low, max(high, low + 1e-6)


def params_text(params: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Parameters as short lines: severity, which the heading has, and seeds of noise are left out; long lists
    as their range.
    """
    return [
        (name, _value_text(value)) for name, value in params.items() if name not in {"severity", "noise_seed"}
    ]


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value_text(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        numbers = [inner for inner in value if isinstance(inner, (int, float))]
        if len(value) > _SHORT and len(numbers) == len(value):
            return f"{len(value)}: {number_text(min(numbers))} … {number_text(max(numbers))}"
        return ("\n" if len(numbers) < len(value) else ", ").join(map(_value_text, value)) or "–"
    return (
        number_text(value)
        if isinstance(value, float)
        else str(value).replace("-", "−")
        if isinstance(value, int)
        else str(value)
    )


def number_text(value: float) -> str:
    return (f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.3g}").replace("-", "−")


def share_text(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "< 1 %"


def _round_up(value: float) -> float:
    """The next of 1, 2, 3, 5 × 10^n."""
    power = 10 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 3, 5, 10) if step * power >= value * (1 - 1e-9)))


# pictures


def _ramp(*colours: tuple[int, int, int]) -> bytes:
    """A palette of 256 colours through the given ones."""
    at = np.linspace(0, len(colours) - 1, 256)
    return (
        np.stack([np.interp(at, range(len(colours)), channel) for channel in zip(*colours, strict=True)], 1)
        .round()
        .astype(np.uint8)
        .tobytes()
    )


_GREYS = _ramp((0, 0, 0), (255, 255, 255))
_DIVERGING = _ramp(NEGATIVE, NEUTRAL, POSITIVE)
_OUTLINED = _GREYS[:-3] + bytes(OUTLINE)


def _grey(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _edge(mask: np.ndarray) -> np.ndarray:
    """The outline of where most of the neighbourhood changed."""
    pool = torch.nn.functional.avg_pool2d
    solid = (
        pool(torch.from_numpy(mask)[None].float(), SMOOTHING, stride=1, padding=SMOOTHING // 2) > 0.5
    ).float()
    grown = torch.nn.functional.max_pool2d(solid, 3, stride=1, padding=1)
    return ((grown - solid)[0] > 0).numpy()


def _uri(indices: np.ndarray, palette: bytes) -> str:
    from PIL import Image

    picture = Image.fromarray(indices, "L" if palette is _GREYS else None)
    if palette is not _GREYS:
        picture.putpalette(palette)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


# the contact sheet of a map's site folders


def write_sheet(path: Path, shown: Sequence[Shown]) -> None:
    """Write a contact sheet as PNG: one row a block, and in it each corrupted version beside its clean slice.

    Raises:
        ConfigError: `not-writable`.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = list(dict.fromkeys(one.row for one in shown))
    in_row = {row: [one for one in shown if one.row == row] for row in rows}
    across = max(map(len, in_row.values()), default=1)
    step_x, step_y = 2 * THUMBNAIL + 8, THUMBNAIL + _TITLE_PX
    sheet = Image.new("RGB", (across * step_x + _MARGIN_PX, max(1, len(rows)) * step_y))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT_PX)
    for number, row in enumerate(rows):
        top = number * step_y + _TITLE_PX
        draw.text((3, top + THUMBNAIL // 2), row.replace(" ", "\n"), fill="white", font=font, anchor="lm")
        for position, one in enumerate(in_row[row]):
            left = _MARGIN_PX + position * step_x
            pair = np.hstack(
                [
                    _thumbnail(image, one.simulated.modality)
                    for image in (one.simulated.clean, one.simulated.corrupted)
                ]
            )
            sheet.paste(Image.fromarray(_grey(pair, 0, 1)), (left, top))
            draw.text((left, top - 4), f"clean | {one.title}", fill="yellow", font=font, anchor="ls")
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    try:
        write_bytes(path, stream.getvalue(), 0o600)
    except OSError as error:
        raise ConfigError(
            f"--gallery {path}: cannot be written ({error.strerror})", code="not-writable"
        ) from None


def _thumbnail(image: np.ndarray, modality: Modality) -> np.ndarray:
    """0..1: an abdominal window for CT, scaled as the model sees it for MR."""
    small = resample(image, THUMBNAIL) if image.shape[0] != THUMBNAIL else image
    return _windowed(small) if modality == "CT" else np.clip(robust_scale_mr(small), 0, 1)


def _windowed(image: np.ndarray) -> np.ndarray:
    return np.clip((image - WINDOW_HU[0]) / (WINDOW_HU[1] - WINDOW_HU[0]), 0, 1)
