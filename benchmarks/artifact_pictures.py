"""Draw docs/img/artifacts.png: a phantom without an artifact, and one with each.

python benchmarks/artifact_pictures.py [OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.artifacts import ARTIFACTS, MODALITIES
from common.physics.appearance import PUBLIC_APPEARANCES
from common.physics.phantom import PhantomSlice, draw_patients
from common.preprocess import SOFT_TISSUE_WINDOW_HU

OUT = Path(__file__).parents[1] / "docs/img/artifacts.png"
PATIENTS, SEED, SIDE = 40, 501, 200


def picture(item: PhantomSlice) -> Image.Image:
    image = np.asarray(item.image, np.float32)
    low, high = SOFT_TISSUE_WINDOW_HU if item.modality == "CT" else (0.0, float(np.percentile(image, 99.5)))
    grey = np.rint(np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def main() -> None:
    clean: dict[str, PhantomSlice] = {}
    strongest: dict[str, tuple[float, PhantomSlice]] = {}
    for number, appearance in enumerate(PUBLIC_APPEARANCES[:2]):
        for slices in draw_patients(appearance, PATIENTS, SEED + number):
            for item in slices:
                shown = [name for name, present in item.labels.items() if present]
                if not shown:
                    clean.setdefault(item.modality, item)
                elif len(shown) == 1:
                    severity = item.severities.get(shown[0], 0.0)
                    if severity > strongest.get(shown[0], (-1.0, item))[0]:
                        strongest[shown[0]] = severity, item
    sheet = Image.new("L", (4 * (SIDE + 10), 2 * (SIDE + 30)), 255)
    pen = ImageDraw.Draw(sheet)
    for row, modality in enumerate(MODALITIES):
        names = [one.name for one in ARTIFACTS if one.modality == modality and one.name in strongest][:3]
        items = [(f"{modality}, clean", clean[modality]), *((name, strongest[name][1]) for name in names)]
        for column, (name, item) in enumerate(items):
            corner = column * (SIDE + 10) + 5, row * (SIDE + 30) + 6
            pen.text(corner, name, fill=0)
            sheet.paste(picture(item), (corner[0], corner[1] + 16))
    sheet.save(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT, optimize=True)


if __name__ == "__main__":
    main()
