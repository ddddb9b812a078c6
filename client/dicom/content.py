"""Decide from the header what an image shows: anatomy, or phase, a parameter map, a projection.

Only magnitude images of anatomy are used in MR, and only images in Hounsfield units in CT. Values 3 and
following of ImageType (or of the FrameType of an enhanced frame) are compared with tables of whole values,
in upper case and with spaces for underscores, hyphens and brackets. Vendors put the kind of an image beside
other words (SWI_PHASE, MONO_70KEV, HEPATIC FAT FRACTION), so that words with one meaning are also found
within a value; a part of a word never is. MPR is no exclusion for original MR images: GE writes it into
ordinary two-dimensional series.

References: DICOM PS3.3 C.7.6.1.1.2 (ImageType), C.8.2.1.1.1 (CT, with the values of multi-energy images),
    C.8.3.1.1.1 (MR), C.8.13.3.1 (enhanced MR), C.8.15.2.1 (enhanced CT), C.8.16.1 and C.8.16.2 (frame type,
    complex image component, volume-based calculation), C.11.1.1.2 (RescaleType); the conformance statements
    of Siemens, Philips, GE, United Imaging and Canon for their own values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from common.artifacts import Modality


def _words(*phrases: str) -> re.Pattern[str]:
    """Finds one of the phrases as whole words in a plain value."""
    return re.compile(rf"(?<![^ ])(?:{'|'.join(map(re.escape, phrases))})(?![^ ])")


_LOCALIZERS = _words(
    *("LOCALIZER", "LOCALISER", "SCOUT", "TOPOGRAM", "SCANOGRAM", "SURVIEW", "SCANO", "SURVEY"),
    *("CT SOM4 TOP", "CT SOM5 TOP", "CT SOM7 TOP", "CT SOM8 TOP", "CT SOM10 TOP"),
)
_SCREENS = _words(
    *("SCREENSHOT", "SCREEN SHOT", "SCREENSAVE", "SCREEN SAVE", "SCREEN CAPTURE", "SECONDARY CAPTURE"),
    *("DOSE INFO", "DOSE REPORT", "DOSE SHEET", "PATIENT PROTOCOL", "SEGMENTATION"),
    *("CT SOM4 PROT", "CT SOM5 PROT", "CT SOM7 PROT", "CT SOM8 PROT", "CT SOM10 PROT"),
)
_NOT_MAGNITUDE = frozenset(
    {
        *("P", "R", "I"),
        *(
            "PHASE",
            "PHASE IMAGE",
            "PHASE MAP",
            "PHASE SUBTRACT",
            "PHASE DIFFERENCE",
            "PHASE DIFF",
            "PHASEDIFF",
        ),
        *("UNWRAPPED PHASE", "FILTERED PHASE", "REAL", "REAL IMAGE", "REAL PART", "IMAG", "IMAGINARY"),
        *("IMAGINARY IMAGE", "IMAGINARY PART", "COMPLEX", "PHA", "PCA PHASE", "CR", "PSIR"),
    }
)
"""Of MR. Philips joins the letter and the technique (P_FFE, R_IR): see `_is_not_magnitude`. CR is its phase
corrected real image, PSIR the phase-sensitive one of an inversion recovery.
"""
_NOT_MAGNITUDE_WORDS = _words(
    "PHASE", "PHA", "PHASEMAP", "PHASEDIFF", "PHASECORR", "UNWRAPPED", "IMAGINARY", "REAL"
)
_MAGNITUDE_WORDS = _words(
    *("IN PHASE", "INPHASE", "OUT PHASE", "OUT OF PHASE", "OPP PHASE", "OPPOSED PHASE", "OPPOSITE PHASE"),
    *("PHASE CONTRAST", "MULTI PHASE", "MULTIPHASE", "ARTERIAL PHASE", "VENOUS PHASE", "PORTAL PHASE"),
    *("DELAYED PHASE", "LATE PHASE", "EARLY PHASE", "EQUILIBRIUM PHASE", "REAL TIME"),
)
"""A phase that is no phase image: of a Dixon scan, of the heart, of a contrast medium."""
_MAPS = frozenset(
    {
        # diffusion
        *("ADC", "EADC", "DADC", "CADC", "EXP", "EXPONENTIAL ADC", "EXP ADC", "APPARENT DIFFUSION"),
        *("FA", "RA", "MD", "AD", "RD", "LAMBDA1", "LAMBDA2", "LAMBDA3", "TENSOR", "EIGENVECTOR", "V1"),
        *("FRACTIONAL ANISOTROPY", "MEAN DIFFUSIVITY", "DIFFUSION ANISO", "DIFFUSION ISO"),
        *("DIFFUSION ATTNTD", "COLFA", "FA COLOR", "COLOR FA", "COLORFA", "TRACE", "TRACEW"),
        *("ISOTROPIC", "AVG DC", "CALC BVALUE", "CALCULATED BVALUE", "KURTOSIS", "MK", "IVIM", "DKI"),
        # relaxation, density, susceptibility, magnetization transfer
        *("T1MAP", "T2MAP", "T2STARMAP", "T2 STARMAP", "T2*MAP", "R1", "R2", "R2*", "R2 STAR", "R2STAR"),
        *("R1MAP", "R2MAP", "R2STARMAP", "R2*MAP", "T1RHO", "T1 RHO", "RHO", "DENSITY", "PDMAP", "QSM"),
        *("SUSCEPTIBILITY", "MTR", "MTSAT", "ECV", "CEST", "APT", "APTW", "MTRASYM", "SCM", "NEI", "MWF"),
        *("R COEFFICIENT", "MAGNETIZATION TRANSFER RATIO", "GOODNESS OF FIT", "CONFIDENCE"),
        # field
        *("FIELD", "FIELDMAP", "FMAP", "B0MAP", "B1MAP", "B0FIELD", "B1FIELD", "FREQUENCY", "OFF RESONANCE"),
        # fat and water as shares; the fat and water images themselves are anatomy
        *("FAT FRACTION", "FATFRACTION", "FAT FRAC", "FATFRAC", "FF", "PDFF", "FATPERCENT", "FAT PERCENT"),
        *("WATER FRACTION", "WATERFRACTION", "WATER FRAC", "WATERFRAC", "WF", "PDWF"),
        # flow, motion, temperature, stiffness
        *("VELOCITY", "VELOCITYMAP", "FLOWMAP", "PCA VELOCITY", "V", "TEMPERATURE", "DISPLACEMENT"),
        *("STRAIN", "STIFFNESS", "ELASTOGRAM"),
        # perfusion and function, CT and MR
        *("CBF", "CBV", "MTT", "TTP", "TMAX", "RCBF", "RCBV", "RELCBF", "RELCBV", "RELCCBV", "RELMTT"),
        *("RMTT", "CCBV", "PBP", "GBP", "KTRANS", "KEP", "VE", "VP", "IAUC", "PEI", "TTD", "TTS", "PSMAP"),
        *("PERMEABILITY", "BLOOD FLOW", "BLOOD VOLUME", "BAT"),
        *("T TEST", "TTEST", "Z SCORE", "ZSCORE", "STD DEVIATION", "CORRELATION", "BOLD MAP"),
        *("METABOLITE", "SPECTRAL", "SPECTROSCOPY", "M MODE", "CSI", "GLM", "SLOPE", "WAVE", "NOISE", "T0"),
        *("ISOTROPIC DWI", "ISO DWI"),
    }
)
_MAP_WORDS = _words(
    *("MAP", "MAPS", "ADC", "EADC", "DADC", "CADC", "TENSOR", "ANISOTROPY", "DIFFUSIVITY", "TRACEW", "COLFA"),
    *("KURTOSIS", "CALC BVALUE", "CALCULATED BVALUE", "CDWI", "SYNTHETIC DWI", "COMPUTED DWI"),
    *(
        "T1MAP",
        "T2MAP",
        "T2STARMAP",
        "T2*MAP",
        "R2STAR",
        "R2*",
        "T1RHO",
        "T1 RHO",
        "QSM",
        "MTR",
        "MWF",
        "ECV",
    ),
    *(
        "FIELDMAP",
        "B0MAP",
        "B1MAP",
        "FMAP",
        "FAMAP",
        "FRACTION",
        "PDFF",
        "WFF",
        "HFF",
        "FATFRAC",
        "WATERFRAC",
    ),
    *("FATFRACTION", "WATERFRACTION", "PERCENTAGE", "PERCENT", "VELOCITY", "STIFFNESS", "ELASTOGRAM"),
    *("SHEAR MODULUS", "TEMPERATURE", "RELAXOMETRY", "RELAXATION"),
    *("CBF", "CBV", "MTT", "TTP", "TMAX", "RCBF", "RCBV", "RMTT", "RTTP", "RELCBF", "RELCBV", "RELCCBV"),
    *("RELMTT", "PBP", "GBP", "RBV", "RBF", "KTRANS", "KEP", "PERMEABILITY", "BLOOD FLOW", "BLOOD VOLUME"),
    *("TRANSIT TIME", "TIME TO PEAK", "TIME TO MAXIMUM", "WASH IN", "WASH OUT", "WASHIN", "WASHOUT"),
    *(
        "MAX SLOPE",
        "PEAK ENHANCEMENT",
        "LEAKAGE",
        "GOODNESS OF FIT",
        "RSQ",
        "R^2",
        "CHI2",
        "STDDEV",
        "STD DEV",
    ),
    *("SENSITIVITY", "GFACTOR", "G FACTOR", "T TEST", "TTEST", "Z SCORE"),
)
_MAPS_OF_VALUE_4 = frozenset({"T1", "T2", "T2 STAR", "T2*", "PROTON DENSITY"})
"""In value 3 of a frame these are a contrast; in value 4 (derived pixel contrast) the quantity itself."""
_PROJECTIONS = frozenset(
    {
        *("MIP", "MINIP", "MNIP", "MAX IP", "MIN IP", "MAXIP", "AVIP", "MIP SUM", "PROJECTION"),
        *("PROJECTION IMAGE", "THIN MIP", "THIN MINIP", "VOLUME RENDER", "VOLUME RENDERING", "VRT", "SSD"),
        *("SURFACE RENDER", "RADIAL MIP", "CPR", "CURVED", "CURVED MPR", "RAYSUM", "COLLAPSE", "MIP IMAGE"),
    }
)
_PROJECTION_WORDS = _words(
    *("MIP", "MINIP", "MNIP", "MAXIP", "AVIP", "MAX IP", "MIN IP", "MINIMUM IP", "MAXIMUM IP", "VRT", "CPR"),
    *("VOLUME RENDERING", "PROJECTION", "CURVED", "RAYSUM", "CSAPARALLEL", "CSA PARALLEL", "CSA 3D"),
)
_REFORMATS = frozenset({"MPR", "CSA MPR", "MPR THICK", "REFORMATTED", "REFORMAT", "RESAMPLED", "OBLIQUE MPR"})
_COMBINED = frozenset(
    {
        *("SUB", "SUBTRACT", "SUBTRACTION", "MODULUS SUBTRACT", "IMAGE ADDITION", "ADDITION", "DIVISION"),
        *("MULTIPLICATION", "MASKED", "MAXIMUM", "MINIMUM", "MEAN", "AVERAGE", "SUBTRACTED"),
    }
)
_SPECTRAL = frozenset(
    {
        *("VMI", "MONO", "MONOE", "MONOENERGETIC", "MONO ENERGETIC", "MONOENERGY", "MONOCHROMATIC"),
        *("VIRTUAL MONO", "VIRTUAL MONOENERGETIC", "GSI MONO", "MONOCHROM"),
        *("MAT SPECIFIC", "MAT REMOVED", "MAT FRACTIONAL", "MAT MODIFIED", "MAT VALUE BASED"),
        *("EFF ATOMIC NUM", "ELECTRON DENSITY", "EFFECTIVE Z", "EFFECTIVE ATOMIC NUMBER", "Z EFF", "ZEFF"),
        *("RHO Z", "RHOZ", "IODINE", "IODINE NO WATER", "IODINE DENSITY", "IODINE OVERLAY", "VNC", "VNUE"),
        *("VUE", "VIRTUAL NON CONTRAST", "VIRTUAL UNENHANCED", "TNC", "CALCIUM", "CALCIUM SUPPRESSED"),
        *("WATER", "FAT", "URIC ACID", "MATERIAL DENSITY", "MD", "GSI MD", "BASIS", "PHOTOELECTRIC"),
        *("COMPTON", "COMPTON SCATTER", "SCATTER", "DE MAP", "UNCERTAINTY"),
    }
)
_SPECTRAL_WORDS = _words(
    *(
        "VMI",
        "MONO",
        "MONOE",
        "MONOENERGETIC",
        "MONOCHROMATIC",
        "IODINE",
        "VNC",
        "VNUE",
        "VUE",
        "TNC",
        "ZEFF",
    ),
    *(
        "Z EFF",
        "RHOZ",
        "EFFECTIVE Z",
        "ELECTRON DENSITY",
        "MATERIAL",
        "URIC ACID",
        "CALCIUM",
        "HAP",
        "DE MAP",
    ),
    *("VIRTUAL NON CONTRAST", "VIRTUAL UNENHANCED", "PHOTOELECTRIC", "COMPTON"),
)
"""Of CT. MIX is none: the mean of two energies that every dual-source scan gives."""
_TECHNIQUES = frozenset(
    {
        *("FFE", "TFE", "SE", "TSE", "IR", "PCA", "EPI", "GRASE", "GRE", "TIR", "MIX", "PC", "GR"),
        *("UNSPECIFIED", "FEEPI", "SEEPI", "B0", "B1", "IMAGE"),
    }
)
"""What Philips puts behind the kind of an image with an underscore."""
_HOUNSFIELD = frozenset({"", "HU", "HOUNSFIELD", "HOUNSFIELD UNIT", "HOUNSFIELD UNITS"})
_UNITS_OF_MAPS = frozenset(
    {
        *("MS", "MSEC", "MILLISECONDS", "S", "SEC", "1/S", "1/MS", "S 1", "HZ", "HERTZ", "RAD/S"),
        *("MM2/S", "MM^2/S", "MM2/SEC", "UM2/S", "UM^2/S", "UM2/MS", "10^ 3 MM2/S", "10^ 6 MM2/S"),
        *("10 3 MM2/S", "10 6 MM2/S", "10 6MM2/S", "*10^ 6 MM^2/S", "10E 6 MM2/S", "X10 6 MM2/S"),
        *("CM/S", "CM/SEC", "MM/S", "MM/SEC", "M/S", "PPM", "PPB", "%", "PERCENT", "PERCENTAGE", "PCT"),
        *("ML/100G/MIN", "ML/100ML/MIN", "ML/100G", "ML/100ML", "ML/MIN/100G", "ML/MIN/100ML", "1/MIN"),
        *("MGML", "MG/ML", "DEGC", "CELSIUS", "KPA", "PA", "UT", "NT", "T", "Z EFF", "ED", "EDW"),
    }
)
_FACTOR = re.compile(r"^[X*]?[\d.]+(?:\s*[\^E]?\s*\d+)?\s*[*X]?\s*|\s*\*\s*[\d.]+$")
_UNITS_OF_PHASE = frozenset(
    {
        *("RAD", "RADIAN", "RADIANS", "MRAD", "MILLIRAD", "MILLIRADS", "MILLIRADIAN", "MILLIRADIANS"),
        *("MILLIRADIALS", "DEG", "DEGREE", "DEGREES"),
    }
)
_COLOURS = frozenset({"COLOR", "TRUE COLOR", "COLOR RANGE", "COLOR REF"})
_GE_KINDS = {1: "PHASE", 2: "REAL", 3: "IMAGINARY"}


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a header says about what the pixels are. A text is "" where the header says nothing.

    Args:
        image_type: ImageType, or the FrameType of the frame, upper case.
        is_frame: whether `image_type` is that of an enhanced image, whose value 4 is the derived contrast.
        component: ComplexImageComponent. presentation: PixelPresentation. contrast: AcquisitionContrast.
        calculation: VolumeBasedCalculationTechnique. volumetric: VolumetricProperties.
        rescale_type: RescaleType, the unit of the rescaled values.
        ge_kind: of the private element of GE, 0 magnitude, 1 phase, 2 real, 3 imaginary.
    """

    modality: Modality
    image_type: tuple[str, ...]
    is_frame: bool = False
    component: str = ""
    presentation: str = ""
    contrast: str = ""
    calculation: str = ""
    volumetric: str = ""
    rescale_type: str = ""
    ge_kind: int | None = None


def is_localizer(image_type: tuple[str, ...]) -> bool:
    return _finds(_LOCALIZERS, map(_plain, image_type))


def is_screen(image_type: tuple[str, ...]) -> bool:
    """Whether values 3 and following name a screenshot, a protocol or a dose report."""
    kinds = list(map(_plain, image_type[2:]))
    return _finds(_SCREENS, kinds) or "DOSE" in kinds


def not_anatomy(content: Content) -> str | None:
    """The code of `EXCLUSIONS` by which an image is no magnitude image of anatomy, or None.

    `not-magnitude`, `parameter-map`, `projection`, `combined`, `colour`; for CT also `spectral-map` and
    `not-hounsfield`.
    """
    kinds = tuple(_plain(value) for value in content.image_type[2:])
    unit = _plain(content.rescale_type)
    if _plain(content.presentation) in _COLOURS:
        return "colour"
    if content.modality == "MR":
        component = _plain(content.component)
        if component not in {"", "MAGNITUDE"} or content.ge_kind in _GE_KINDS or unit in _UNITS_OF_PHASE:
            return "not-magnitude"
        if any(map(_is_not_magnitude, kinds)):
            return "not-magnitude"
    elif _finds(_SPECTRAL_WORDS, kinds) or any(
        kind in _SPECTRAL or _head(kind) in _SPECTRAL for kind in kinds
    ):
        return "spectral-map"
    if any(map(_is_map, kinds)) or _is_map(_plain(content.contrast)) or _is_field_map(kinds):
        return "parameter-map"
    if content.is_frame and not _MAPS_OF_VALUE_4.isdisjoint(kinds[1:2]):
        return "parameter-map"
    calculation = _plain(content.calculation)
    if (
        not _PROJECTIONS.isdisjoint(kinds)
        or _finds(_PROJECTION_WORDS, kinds)
        or calculation not in {"", "NONE"}
        or _plain(content.volumetric) == "DISTORTED"
        or (content.modality == "CT" and not _REFORMATS.isdisjoint(kinds))
    ):
        return "projection"
    if not _COMBINED.isdisjoint(kinds):
        return "combined"
    if content.modality == "CT" and unit not in _HOUNSFIELD:
        return "not-hounsfield"
    if content.modality == "MR" and _is_unit_of_map(content.rescale_type):
        return "parameter-map"
    return None


def is_reformat(image_type: tuple[str, ...]) -> bool:
    """Whether values 3 and following name a reformatted image, which an original MR image may do."""
    return not _REFORMATS.isdisjoint(map(_plain, image_type[2:]))


def _plain(value: str) -> str:
    return " ".join(re.sub(r"[_\-()\[\]{}:;,]", " ", value.upper()).split())


def _finds(words: re.Pattern[str], values: Iterable[str]) -> bool:
    return any(map(words.search, values))


def _head(kind: str) -> str:
    """The kind without the technique or the word that a vendor puts behind it: ADC of ADC_UNSPECIFIED."""
    first, _, last = kind.rpartition(" ")
    return first if first and last in _TECHNIQUES else kind


def _is_not_magnitude(kind: str) -> bool:
    if kind in _NOT_MAGNITUDE or _head(kind) in _NOT_MAGNITUDE:
        return True
    return _NOT_MAGNITUDE_WORDS.search(_MAGNITUDE_WORDS.sub("", kind)) is not None


def _is_map(kind: str) -> bool:
    if kind in _MAPS or _head(kind) in _MAPS or _MAP_WORDS.search(kind):
        return True
    return kind.removesuffix(" UNSPECIFIED") in _MAPS_OF_VALUE_4 and kind not in _MAPS_OF_VALUE_4


def _is_unit_of_map(rescale_type: str) -> bool:
    """Whether a unit is that of a quantity: also behind a factor (10^-6 mm2/s) and in brackets (T2[ms])."""
    inside = re.findall(r"[\[(]([^\])]*)[\])]", rescale_type)
    for unit in map(_plain, (rescale_type, *inside)):
        if unit in _UNITS_OF_MAPS or _FACTOR.sub("", unit) in _UNITS_OF_MAPS or _MAP_WORDS.search(unit):
            return True
    return False


def _is_field_map(kinds: tuple[str, ...]) -> bool:
    """B0 or B1 as the kind; as a technique behind M it is the magnitude image of the same scan."""
    return not {"B0", "B1"}.isdisjoint(kinds[:2]) and "M" not in kinds
