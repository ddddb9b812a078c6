"""List the codes that say why a file or a slice is not used."""

from __future__ import annotations

from common.errors import ImagingError

CODES: dict[str, str] = {
    "not-dicom": "no DICOM preamble: not a DICOM file, or one without its file meta information",
    "truncated": "the file ends before its pixel data does",
    "too-large": "above the limit for a file, an element, an image or the number of frames",
    "too-nested": "sequences nested deeper than any scanner writes",
    "bad-geometry": "rows, columns, bits or frames are missing, impossible or do not fit the pixel data",
    "bad-rescale": (
        "the rescale slope or intercept is not one finite, usable number, or missing where "
        "Hounsfield units need it"
    ),
    "multi-frame": "several frames in an object that holds one (classic CT or MR image)",
    "unsupported-syntax": "no installed codec decodes this transfer syntax",
    "non-finite": "the image holds values that are not finite",
    "changed": "the file changed while it was read",
    "conflict": "one SOP instance UID on files with different pixels",
    "unreadable": "damaged in another way, or not readable by this user",
}
"""The file cannot be used: quarantined, a person should look."""

EXCLUSIONS: dict[str, str] = {
    "burned-in": "the header says that text is burned into the pixels",
    "localizer": "a localizer (scout), not a diagnostic slice",
    "secondary": "a secondary image: screenshot, reformat or dose screen",
    "derived": "computed from other images: no longer what the scanner reconstructed",
    "lossy": "compressed with loss, which hides or makes artifacts; cohort.yaml, lossy: use, takes them",
    "not-magnitude": "an MR phase, real or imaginary image",
    "parameter-map": "a map of a quantity (ADC, FA, T1, T2, field, velocity, fat fraction, perfusion)",
    "projection": "a projection (MIP, minIP), a rendering or a reformatted CT image",
    "combined": "a sum, difference or mean of images",
    "spectral-map": (
        "a CT image of one energy or material (monoenergetic, iodine, effective Z, virtual non-contrast)"
    ),
    "not-hounsfield": "a CT image whose RescaleType is not Hounsfield units",
    "mosaic": "many slices tiled in one image, and the header does not say how (Siemens MOSAIC, UIH VFRAME)",
    "unsupported-object": (
        "not a CT or MR image (report, plan, segmentation, secondary capture, another modality)"
    ),
    "no-modality": "neither the SOP class nor the modality says CT or MR",
    "colour": "a colour image",
    "dicomdir": "a DICOMDIR, the table of contents of a medium",
    "foreign-file": "no image: a program, document, text, database or video, as on a patient CD",
    "picture-file": "a picture (PNG, JPEG, TIFF, BMP, GIF), not DICOM: export the series as DICOM",
    "volume-file": (
        "a volume or array (NIfTI, NRRD, MetaImage, NumPy, HDF5), not DICOM: use the series it was made of"
    ),
}
"""The file is in order, and not an original, primary, grey CT or MR slice: left out by rule, and counted."""


def refusal(code: str, message: str, *, hint: str = "") -> ImagingError:
    """The error for a code of `CODES` or `EXCLUSIONS`. `message` must not hold a value of the header."""
    return ImagingError(message, code=code, hint=hint or CODES.get(code, EXCLUSIONS.get(code, "")))
