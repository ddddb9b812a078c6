"""Recognise files that were never DICOM images: viewers, documents, pictures, volumes in other formats.

A patient CD holds a viewer and a readme, an archive's storage folder its JSON sidecars. They are no damaged
images, so they are excluded by rule and counted, and do not raise the share of quarantined slices. Only a
file without a DICOM preamble is classified, and only if its first bytes are known, it consists of text, or
its name has a known suffix: every other file stays `not-dicom`, for a person to look at.

References: the magic numbers of the format specifications; NIfTI-1 and NIfTI-2 headers (sizeof_hdr, magic);
Orthanc,
    "Storage area" (attachments under a UUID, compressed ones behind their length in 8 bytes).
"""

from __future__ import annotations

import re
import zlib
from pathlib import PurePosixPath

HEAD_BYTES = 4096
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_ZLIB_HEADS = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_COMPRESSED = (
    b"BZh",
    b"\xfd7zXZ\0",
    b"7z\xbc\xaf\x27\x1c",
    b"Rar!\x1a\x07",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)
_FOREIGN = (
    *(b"MZ", b"\x7fELF", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"#!"),  # programs
    *(
        b"%PDF",
        b"%!PS",
        b"{\\rtf",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        b"PK\x03\x04",
        b"PK\x05\x06",
    ),  # documents
    *(b"SQLite format 3\0", b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83", b"\0\x01\0\0Stan"),  # databases
    *(
        b"\0\0\x01\xba",
        b"\0\0\x01\xb3",
        b"\x1aE\xdf\xa3",
        b"FLV\x01",
        b"\x30\x26\xb2\x75",
        b"RIFF",
    ),  # video, sound
    *(b"OggS", b"ID3", b"fLaC", b"FWS", b"CWS"),
    *(
        b"ITSF",
        b"?_\x03\0",
        b"MSCF",
        b"ISc(",
        b"L\0\0\0\x01\x14\x02\0",
        b"OTTO",
        b"wOFF",
        b"wOF2",
    ),  # help, installers, links, fonts
    *(b"\x80\x04\x95", b"\x80\x02}", b"\x80\x03", b"PAR1", b"!<arch>", b"CDF\x01"),
)
_PICTURES = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
)
_VOLUMES = (b"\x93NUMPY", b"NRRD000", b"\x89HDF\r\n\x1a\n", b"MATLAB 5.0 MAT", b"MINC")
_TEXT_VOLUMES = re.compile(rb"\s*(ObjectType|NDims|Comment)\s*=", re.IGNORECASE)
_PROGRAM_SUFFIXES = """.exe .dll .ocx .sys .com .bat .cmd .msi .cab .jar .class .so .dylib .app .inf .ini .cfg
.conf .reg .lnk .url .htm .html .xhtml .css .js .map .xml .xsl .xslt .dtd .json .yaml .yml .txt .rtf .md .log
.csv .tsv .pdf .doc .docx .xls .xlsx .ppt .pptx .odt .ods .db .sqlite .sqlite3 .mdb .ico .icns .cur .chm .hlp
.ttf .otf .woff .woff2 .fon .avi .mpg .mpeg .mp4 .mov .wmv .mkv .flv .swf .wav .mp3 .py .pyc .sh .ps1 .bvec
.bval .lock .torrent .manifest .md5 .sha1 .sha256 .eml .msg .vbs .plist .properties"""
_PICTURE_SUFFIXES = ".png .jpg .jpeg .jpe .jfif .gif .tif .tiff .bmp .webp .heic .jp2 .j2k .svg"
_VOLUME_SUFFIXES = """.nii .hdr .mgh .mgz .nrrd .nhdr .mha .mhd .npy .npz .pt .pth .pkl .mat .h5 .hdf5
.mnc .mif .zarr .vtk .vti .stl .obj"""
_SUFFIXES: dict[str, str] = {
    suffix: code
    for code, suffixes in (
        ("foreign-file", _PROGRAM_SUFFIXES),
        ("picture-file", _PICTURE_SUFFIXES),
        ("volume-file", _VOLUME_SUFFIXES),
    )
    for suffix in suffixes.split()
}
_DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic", ".ima", ".dcm30"})  # it was to be an image
_DOTLESS = frozenset(
    {"readme", "license", "licence", "changelog", "makefile", "version", "manifest", "index-shm"}
)


def foreign_code(name: str, head: bytes) -> str | None:
    """The code of `EXCLUSIONS` of a file that is recognised as no DICOM image, `unsupported-archive` for a
    compressed one, or None.

    Args:
        name: of the file. head: its first `HEAD_BYTES`, after gzip was taken away.
    """
    path = PurePosixPath(name.replace("\\", "/").lower())
    suffix = path.suffix if path.suffix != ".gz" else PurePosixPath(path.stem).suffix
    if suffix in _DICOM_SUFFIXES or _looks_like_dicom(head):
        return None
    if head.startswith(_COMPRESSED):
        return "unsupported-archive"
    if head.startswith(_PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "picture-file"
    if head[:2] == b"BM" and suffix == ".bmp":
        return "picture-file"
    if head.startswith(_VOLUMES) or _is_nifti(head) or _TEXT_VOLUMES.match(head):
        return "volume-file"
    if head.startswith(b"PK") and suffix in {".npz", ".pt", ".pth"}:
        return "volume-file"
    if head.startswith(_FOREIGN) or head[4:8] == b"ftyp":
        return "foreign-file"
    if is_text(head):
        return "volume-file" if _SUFFIXES.get(suffix) == "volume-file" else "foreign-file"
    if is_uuid(name) and _sidecar(head) is not None:
        return "foreign-file"
    return _SUFFIXES.get(suffix) or ("foreign-file" if path.name in _DOTLESS else None)


def is_uuid(name: str) -> bool:
    """Whether a file is named as Orthanc names what it stores: a UUID without a suffix."""
    return _UUID.fullmatch(PurePosixPath(name).name) is not None


def compressed_length(head: bytes) -> int | None:
    """The expanded length of an attachment that Orthanc compressed; None for any other file."""
    if len(head) < 10 or head[8:10] not in _ZLIB_HEADS:
        return None
    return int.from_bytes(head[:8], "little")


def _sidecar(head: bytes) -> str | None:
    """The beginning of the JSON of a compressed attachment; None where it is no JSON."""
    if compressed_length(head) is None:
        return None
    try:
        start = zlib.decompressobj().decompress(head[8:], 64)
    except zlib.error:
        return None
    return start.decode("latin-1") if start[:1] in {b"{", b"["} else None


def is_text(head: bytes) -> bool:
    """Whether these are the first bytes of a text: UTF-8, UTF-16 with its mark, or an 8-bit charset without
    control characters. A data set without preamble has zero bytes and is none.
    """
    if head[:2] in {b"\xff\xfe", b"\xfe\xff"} and len(head) >= 4:
        return _is_readable(head[: len(head) // 2 * 2].decode("utf-16", "replace"))
    if not head or b"\0" in head:
        return False
    return _is_readable(head.decode("latin-1"))


def _is_readable(text: str) -> bool:
    return not any(ord(letter) < 32 and letter not in "\t\n\r\f\v\x1a\x1b" for letter in text)


def _is_nifti(head: bytes) -> bool:
    length = head[:4]
    if length in {b"\x5c\x01\0\0", b"\0\0\x01\x5c"}:  # 348, NIfTI-1 and Analyze
        return head[344:347] in {b"n+1", b"ni1"} or head[38:39] == b"r" or len(head) >= 348
    return length in {b"\x1c\x02\0\0", b"\0\0\x02\x1c"} and head[4:7] in {b"n+2", b"ni2"}


def _looks_like_dicom(head: bytes) -> bool:
    """A data set without its preamble: it begins with a group of file meta information or of identification,
    then an element with a VR or a short length.
    """
    return (
        head[:2] in {b"\x02\0", b"\x08\0", b"\0\x08", b"\0\x02"}
        and head[128:132] != b"DICM"
        and (head[4:6].isalpha() or head[6:8] == b"\0\0" or head[4:6] == b"\0\0")
    )
