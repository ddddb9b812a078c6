"""The makers of scanners, from the free text of a header."""

from __future__ import annotations

VENDORS: dict[str, tuple[str, ...]] = {  # how the manufacturer's text begins, upper case
    "Siemens": ("SIEMENS",),
    "GE": ("GE MEDICAL", "GE HEALTHCARE", "GENERAL ELECTRIC"),
    "Philips": ("PHILIPS", "MARCONI", "PICKER"),
    "Canon": ("CANON", "TOSHIBA"),
    "Fujifilm": ("FUJIFILM", "HITACHI"),
    "United Imaging": ("UIH", "UNITED IMAGING", "SHANGHAI UNITED IMAGING"),
    "Neusoft": ("NEUSOFT", "PHILIPS AND NEUSOFT", "PHILIPS-NEUSOFT"),
    "Samsung": ("SAMSUNG", "NEUROLOGICA"),
    "Shimadzu": ("SHIMADZU",),
    "Esaote": ("ESAOTE",),
    "Hyperfine": ("HYPERFINE",),
    "MinFound": ("MINFOUND",),
    "Anke": ("ANKE", "SHENZHEN ANKE"),
    "Alltech": ("ALLTECH",),
    "Wandong": ("WANDONG", "WDM", "BEIJING WANDONG"),
    "fedqc": ("FEDQC",),
}


def vendor(text: str) -> str | None:
    """The maker's short name; None where the text is none that we know."""
    upper = plain(text).upper()
    found = [
        (len(start), name)
        for name, starts in VENDORS.items()
        for start in starts
        if upper == "GE" or upper.startswith(start)
    ]
    return "GE" if upper == "GE" else max(found)[1] if found else None


def plain(text: str) -> str:
    return " ".join(text.split())
