"""Map free text of headers to a fixed vocabulary.

A manufacturer, model, kernel or sequence is typed by people, and may hold a name. What is shown is therefore
never the header's text but one of the words below; a text that is none of them becomes `other-3f2a`, four
digits of its digest under the site's key, so that two unknown scanners stay two.
"""

from __future__ import annotations

import re

from client.dicom.index import SliceRecord, pseudonym
from client.dicom.vendors import plain, vendor

MISSING = "not stated"
OTHER = "other"

MODELS: tuple[str, ...] = (  # a model is the longest of these that its text begins with
    *(
        "Biograph",
        "Biograph40",
        "Biograph64",
        "Biograph128",
        "Biograph mMR",
        "Emotion",
        "Sensation",
        "Sensation 16",
        "Sensation 64",
    ),
    *(
        "SOMATOM Definition",
        "SOMATOM Definition AS",
        "SOMATOM Definition Flash",
        "SOMATOM Definition Edge",
        "SOMATOM Drive",
        "SOMATOM go",
    ),
    *(
        "SOMATOM Force",
        "SOMATOM Perspective",
        "SOMATOM Scope",
        "SOMATOM X.cite",
        "NAEOTOM Alpha",
        "Perspective",
        "Symphony",
        "SymphonyTim",
    ),
    *(
        "Aera",
        "MAGNETOM Aera",
        "Altea",
        "MAGNETOM Altea",
        "Amira",
        "Avanto",
        "Avanto_fit",
        "Espree",
        "Essenza",
        "Lumina",
        "Prisma",
    ),
    *(
        "Prisma_fit",
        "Skyra",
        "Skyra_fit",
        "Skyra-XQ",
        "Sola",
        "MAGNETOM Sola",
        "Sonata",
        "SonataVision",
        "Spectra",
        "Terra",
        "Trio",
    ),
    *(
        "TrioTim",
        "Verio",
        "Vida",
        "MAGNETOM Vida",
        "Free.Max",
        "Cima.X",
        "Allegra",
        "Investigational_Device_7T",
    ),
    *(
        "BrightSpeed",
        "Discovery CT750 HD",
        "Discovery CT590 RT",
        "Discovery ST",
        "Discovery STE",
        "Discovery 690",
        "Discovery MI",
    ),
    *(
        "LightSpeed Plus",
        "LightSpeed Pro",
        "LightSpeed QX/i",
        "LightSpeed RT",
        "LightSpeed Ultra",
        "LightSpeed VCT",
        "LightSpeed16",
    ),
    *(
        "Optima CT540",
        "Optima CT660",
        "Revolution CT",
        "Revolution EVO",
        "Revolution Apex",
        "Revolution Frontier",
        "Revolution HD",
    ),
    *(
        "DISCOVERY MR450",
        "DISCOVERY MR750",
        "DISCOVERY MR750w",
        "GENESIS_SIGNA",
        "SIGNA",
        "SIGNA Architect",
        "SIGNA Artist",
    ),
    *(
        "SIGNA Explorer",
        "SIGNA EXCITE",
        "SIGNA HDx",
        "SIGNA HDxt",
        "SIGNA Hero",
        "SIGNA PET/MR",
        "SIGNA Pioneer",
        "SIGNA Premier",
    ),
    *("SIGNA Voyager", "Optima MR360", "Optima MR450w", "Brivo MR355"),
    *(
        "Achieva",
        "Achieva dStream",
        "Ambition",
        "Elition",
        "Gyroscan Intera",
        "Ingenia",
        "Ingenia Ambition",
        "Ingenia Elition",
    ),
    *(
        "Ingenia CX",
        "Ingenuity",
        "Ingenuity CT",
        "Ingenuity Core",
        "Ingenuity TF",
        "Intera",
        "Multiva",
        "Panorama",
        "Prodiva",
    ),
    *(
        "Brilliance 6",
        "Brilliance 16",
        "Brilliance 40",
        "Brilliance 64",
        "Brilliance Big Bore",
        "Incisive CT",
        "Mx8000",
        "iCT 256",
    ),
    *("iCT 128", "IQon", "IQon - Spectral CT", "Spectral CT 7500", "GEMINI TF"),
    *(
        "Aquilion",
        "Aquilion ONE",
        "Aquilion PRIME",
        "Aquilion Lightning",
        "Aquilion Precision",
        "Asteion",
        "Alexion",
        "Activion",
    ),
    *(
        "Titan",
        "Vantage",
        "Vantage Titan",
        "Vantage Galan",
        "Vantage Orian",
        "Vantage Elan",
        "MRT200",
        "ECLOS",
        "SCENARIA",
        "Supria",
    ),
    *("AIRIS", "Aperto", "ECHELON", "OASIS", "Trillium Oval"),
    *(
        "uCT 510",
        "uCT 520",
        "uCT 528",
        "uCT 530",
        "uCT 550",
        "uCT 710",
        "uCT 760",
        "uCT 780",
        "uCT 820",
        "uCT 860",
        "uCT 960",
    ),
    *(
        "uMR 560",
        "uMR 570",
        "uMR 580",
        "uMR 586",
        "uMR 588",
        "uMR 680",
        "uMR 770",
        "uMR 780",
        "uMR 790",
        "uMR 870",
        "uMR 880",
    ),
    *("uMR 890", "uMR Omega", "uMR Jupiter", "uPMR 790", "uMI 510", "uMI 780", "uEXPLORER"),
    *(
        "NeuViz 16",
        "NeuViz 64",
        "NeuViz 128",
        "NeuViz Prime",
        "NeuMR",
        "OmniTom",
        "BodyTom",
        "CereTom",
        "ScintCare",
        "phantom",
    ),
)

KERNELS: tuple[str, ...] = (
    *(
        "STANDARD",
        "SOFT",
        "DETAIL",
        "BONE",
        "BONEPLUS",
        "LUNG",
        "EDGE",
        "CHEST",
        "ULTRA",
        "HD STANDARD",
        "HD DETAIL",
        "HD LUNG",
    ),
    *("A", "B", "C", "CB", "D", "E", "EB", "EC", "F", "L", "UA", "UB", "UC", "YA", "YB", "YC", "YD", "YE"),
    *(
        "B_SOFT_A",
        "B_SOFT_B",
        "B_SOFT_C",
        "B_SHARP_A",
        "B_SHARP_B",
        "B_SHARP_C",
        "B_VSHARP_A",
        "B_VSHARP_B",
        "B_VSHARP_C",
    ),
    *("H_SOFT_A", "H_SOFT_B", "H_SOFT_C", "H_SHARP_A", "H_SHARP_B", "H_SHARP_C"),
)
_KERNEL_FAMILIES = (
    (re.compile(r"([BHUTSID][rnvplucfwq]?\d{2})[a-z]{0,2}(\\\d)?"), r"\1"),  # Siemens: B30f, Br40d\3
    (re.compile(r"(FC\d{2})"), r"\1"),  # Canon, Toshiba
)

# ScanningSequence (0018,0020) and SequenceVariant (0018,0021): the defined terms of PS3.3 C.8.3.1.1. The
# sequence's own name is not shown.
_SEQUENCE_TERMS = frozenset(
    {"SE", "IR", "GR", "EP", "RM", "SK", "MTC", "SS", "TRSS", "SP", "MP", "OSP", "TOF", "NONE"}
)

# BodyPartExamined (0018,0015): terms of PS3.16 Annex L, and common ones
_BODY_PARTS = """
    ABDOMEN ABDOMENPELVIS ANKLE AORTA ARM BLADDER BRAIN BREAST CALCANEUS CAROTID CERVIX CHEST
    CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CSPINE EAR ELBOW EXTREMITY EYE
    FACE FEMUR FINGER FOOT FOREARM GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS IAC JAW KIDNEY
    KNEE LEG LIVER LSPINE LUNG MANDIBLE MAXILLA MEDIASTINUM NECK NECKCHEST NECKCHESTABDOMEN
    NECKCHESTABDPELV NOSE ORBIT PANCREAS PELVIS PROSTATE RECTUM RIB SCAPULA SELLA SHOULDER SINUS
    SKULL SPINE SPLEEN SSPINE STERNUM TESTIS THIGH THORAX THUMB THYROID TLSPINE TMJ TOE TSPINE
    UTERUS WHOLEBODY WRIST ZYGOMA PHANTOM
"""
BODY_PARTS = frozenset(re.findall(r"[A-Z]+", _BODY_PARTS))


def body_part(text: str) -> str | None:
    """The body part, where it is a term of the standard; in upper case, without blanks."""
    squeezed = _squeezed(text).upper()
    return squeezed if squeezed in BODY_PARTS else None


def model(text: str) -> str | None:
    """The longest known model name that the text begins with."""
    squeezed = _squeezed(text)
    found = [name for name in MODELS if squeezed.startswith(_squeezed(name))]
    return max(found, key=len) if found else None


def kernel(text: str) -> str | None:
    said = plain(text)
    if said.upper() in KERNELS:
        return said.upper()
    for family, word in _KERNEL_FAMILIES:
        if found := family.fullmatch(said):
            return found.expand(word)
    return None


def sequence(text: str) -> str | None:
    """Scanning sequence and variant, as far as they are terms of the standard: `GR/IR SP/MP`."""
    words = [
        "/".join(part for part in word.split("\\") if part in _SEQUENCE_TERMS)
        for word in plain(text).split(" ")[:2]
    ]
    return " ".join(filter(None, words)) or None


WORDS = {
    "vendor": (vendor, "manufacturer"),
    "model": (model, "model"),
    "kernel": (kernel, "kernel"),
    "sequence": (sequence, "sequence"),
}
"""Field of a profile -> what finds its word, and the field of `SliceRecord` that it is found in."""


def said(field: str, record: SliceRecord, key: bytes) -> str:
    """What may be shown, inside the hospital, of a free text: a word, `other-` and four digits, or
    `MISSING`.
    """
    find, attribute = WORDS[field]
    return shown(getattr(record, attribute), find(getattr(record, attribute)), key)


def shown(text: str, word: str | None, key: bytes) -> str:
    if word is not None:
        return word
    return f"{OTHER}-{pseudonym(f'word:{text}', key)[:4]}" if text.strip() else MISSING


def _squeezed(text: str) -> str:
    return re.sub(r"[\s_.\-]", "", text).casefold()
