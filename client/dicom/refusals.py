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
    "derived": (
        "computed from other images, or compressed with loss: no longer what the scanner reconstructed"
    ),
    "mosaic": "many slices tiled in one image, and the header does not say how (Siemens MOSAIC, UIH VFRAME)",
    "unsupported-object": (
        "not a CT or MR image (report, plan, segmentation, secondary capture, another modality)"
    ),
    "no-modality": "neither the SOP class nor the modality says CT or MR",
    "colour": "a colour image",
    "dicomdir": "a DICOMDIR, the table of contents of a medium",
}
"""The file is in order, and not an original, primary, grey CT or MR slice: left out by rule, and counted."""


def refusal(code: str, message: str, *, hint: str = "") -> ImagingError:
    """The error for a code of `CODES` or `EXCLUSIONS`. `message` must not hold a value of the header."""
    return ImagingError(message, code=code, hint=hint or CODES.get(code, EXCLUSIONS.get(code, "")))
