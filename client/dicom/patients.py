"""Decide which slices belong to one patient, and compare patient IDs in keyed form.

A PatientID is bytes in some character set, and archives, anonymizers and spreadsheets write the same ID in
several ways. Three forms of an ID are compared, each only as a keyed digest:

    as written       the pseudonym that index, split and ledger use (`index.pseudonym` of `patient_key`)
    normalised       NFKC, without case and surrounding space, in every plausible reading of the bytes
    near             normalised, without issuer, separators and leading zeros: perhaps another patient

`PatientRule` is the operator's part of it: which differences in writing are one patient (`join`), and what
stands for a patient whose header has no ID (`fallback`).
References: DICOM PS3.3 C.7.1.1 (Patient ID is type 2: it may be empty), PS3.5 6.1 (character sets), HL7 v2 CX
(ID^^^issuer).
"""

from __future__ import annotations

import hmac
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from common.names import Unit
from common.strict import StrictModel

Fallback = Literal["name-and-birth-date", "study"]
Join = Literal["zeros", "case", "width", "charset", "spaces", "issuer"]
Origin = Literal["id", "placeholder", "person", "study", "series", ""]
"""What names the patient of a slice: PatientID; a placeholder in its place, such as UNKNOWN; name and birth
date; the study; the series; nothing.
"""
NEW_SITE_JOIN: tuple[Join, ...] = ("width", "case", "spaces", "charset")
"""What `site init` writes: differences that never tell two patients apart."""
SCHEME = 1
"""Of the forms that the cache keeps of an ID. Another number: all headers are read again, once."""

PLACEHOLDERS = frozenset(
    """
    ANON ANONYM ANONYMIZED ANONYMISED ANONYMIZE ANONYMOUS ANONYMOUSPATIENT ANONYMOUSID BLANK DEIDENTIFIED
    DEFAULT DUMMY EMPTY HIDDEN ID MISSING MRN NA NAN NIL NOID NONAME NONE NOTAVAILABLE NOTPROVIDED NULL NUL
    PATIENT PATIENTID PATIENTNAME PATID PID PSEUDONYM REDACTED REMOVED TBD TEMP TEST TESTPATIENT UNASSIGNED
    UNBEKANNT UNDEFINED UNIDENTIFIED UNK UNKNOWN UNKNOWNID UNKNOWNPATIENT UNNAMED UNSPECIFIED VOID ANONIMO
    ANONYME INCONNU DESCONOCIDO 匿名 未知 无 無 不详 不明 测试 未命名 匿名患者 未知患者 无名氏
    """.split()  # noqa: SIM905
)
_ONE_CHARACTER = re.compile(r"X+|0+|9{5,}")
_PLACEHOLDER_DATES = frozenset({"19000101", "18000101", "18991230", "00010101", "19700101", "99991231"})
_ISSUER = re.compile(r"\^.*$", re.DOTALL)
_ZEROS = re.compile(r"^([^\d]*?)0+(?=\d)")
_WIDE = re.compile(r"[^\x00-\xff]")


class Identified(Protocol):
    """What a `SliceRecord` holds of its patient."""

    @property
    def patient(self) -> str: ...
    @property
    def patient_origin(self) -> Origin: ...
    @property
    def patient_forms(self) -> tuple[str, ...]: ...
    @property
    def patient_near(self) -> tuple[str, ...]: ...
    @property
    def birth(self) -> str: ...
    @property
    def sex(self) -> str: ...
    @property
    def issuer(self) -> str: ...


class PatientRule(StrictModel):
    """`patients:` of site.yaml."""

    fallback: Fallback | None = None  # what stands for a patient without a PatientID; none: the site stops
    join: Annotated[tuple[Join, ...], Field(strict=False)] = ()  # differences that are one patient

    @property
    def unit(self) -> Unit:
        """The unit of privacy: whose contribution is bounded and hidden by the noise."""
        return "study" if self.fallback == "study" else "patient"

    def digest(self) -> str:
        """Equal digests name the patients of a folder equally."""
        return f"{SCHEME}:{self.fallback or ''}:{','.join(sorted(self.join))}"


AS_WRITTEN = PatientRule()
"""Of a site whose site.yaml says nothing about its patients, and of a folder without one."""


def readings(raw: str, charset: str = "") -> tuple[str, ...]:
    """What the bytes of a text may say, the most plausible reading first; at least one.

    Args:
        raw: the bytes, each as one character of Latin-1; or a text that has been decoded.
        charset: Specific Character Set of the header, its values separated by backslashes. It is often wrong
            or missing, so that it is only one of the readings.
    """
    if _WIDE.search(raw):
        return (raw,)
    data = raw.encode("latin-1")
    if data.isascii() and b"\x1b" not in data:
        return (raw,)
    declared, chinese = _declared(data, charset), _decoded(data, "gb18030")
    single_byte = charset.strip().upper() in {"", "ISO_IR 6", "ISO 2022 IR 6", "ISO_IR 100"}
    if not data.isascii() and (utf8 := _decoded(data, "utf-8")):  # bytes of another set are hardly ever UTF-8
        ordered = [utf8, None if single_byte else declared]
    elif single_byte and _is_paired(data):
        ordered = [chinese]
    else:
        ordered = [declared, raw if single_byte or not declared else None, chinese]
    return tuple(dict.fromkeys(text for text in ordered if text)) or (raw,)


def normalised(text: str) -> str:
    """NFKC, without case, surrounding space and invisible characters."""
    return _without_case(_visible(unicodedata.normalize("NFKC", text))).strip()


def near(text: str) -> str:
    """`normalised`, without issuer, separators and the leading zeros of its number."""
    plain = _ISSUER.sub("", normalised(text))
    return _ZEROS.sub(r"\1", "".join(letter for letter in plain if letter.isalnum())) or plain


def is_placeholder(text: str) -> bool:
    """Whether an ID or a name is one that anonymizers write for everybody."""
    plain = "".join(letter for letter in normalised(text) if not letter.isspace())
    word = "".join(letter for letter in plain if letter.isalnum())
    return not word or word in PLACEHOLDERS or bool(_ONE_CHARACTER.fullmatch(plain))


def named_by(header: dict[str, Any], rule: PatientRule) -> tuple[Origin, str]:
    """What names the patient of a slice, and the text whose pseudonym is the patient's.

    Without a rule of the operator the text is `patient_key` of the header, as ever: an existing patient keeps
    the pseudonym.
    Args:
        header: fields of `dicom.SliceHeader`.
    """
    key, patient_id = header["patient_key"], header["patient_id"]
    texts = readings(patient_id, header["charset"])
    if patient_id.strip() and not is_placeholder(texts[0]):
        return "id", joined_key(patient_id, texts[0], rule) or key
    if rule.fallback == "name-and-birth-date":
        person = _person(header)
        if person:
            return "person", f"Person:{person}"
    if patient_id.strip():
        if rule.fallback == "study" and header["study_uid"]:
            return "study", f"StudyInstanceUID:{header['study_uid']}"
        return "placeholder", key
    for origin in ("study", "series"):
        if header[f"{origin}_uid"]:
            return origin, key
    return "", key


def joined_key(raw: str, text: str, rule: PatientRule) -> str:
    """The key of an ID under the operator's `join`; "" where nothing is joined.

    Args:
        raw: as in `readings`.
        text: its first reading.
    """
    join = set(rule.join)
    if not join:
        return ""
    joined = text  # IDs that are not ASCII are compared as text whatever is joined
    if "width" in join:
        joined = unicodedata.normalize("NFKC", joined)
    if "case" in join:
        joined = _without_case(joined)
    if "issuer" in join:
        joined = _ISSUER.sub("", joined) or joined
    if "spaces" in join:
        joined = "".join(letter for letter in _visible(joined) if not letter.isspace())
    if "zeros" in join:
        joined = _ZEROS.sub(r"\1", joined)
    joined = joined.strip(" \0\t\r\n")
    return "PatientID:" + joined.encode("utf-8", "surrogatepass").decode("latin-1") if joined else ""


def keyed(kind: str, text: str, key: bytes) -> str:
    """A keyed digest of 16 hexadecimal digits, apart from those of other kinds."""
    return hmac.digest(key, f"{kind}:{text}".encode("utf-8", "surrogatepass"), "sha256").hex()[:16]


def words_of_sex(key: bytes) -> dict[str, str]:
    """Keyed digest, as a slice record holds it -> female or male."""
    return {keyed("sex", letter, key): word for letter, word in (("F", "female"), ("M", "male"))}


def forms_of(raw: str, charset: str, key: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keyed digests of an ID: normalised, one for every reading; and near, of the most plausible one."""
    texts = readings(raw, charset)
    exact = dict.fromkeys(keyed("patient-normalised", normalised(text), key) for text in texts)
    return tuple(exact), near_forms(texts[0], key)


def near_forms(text: str, key: bytes) -> tuple[str, ...]:
    return (keyed("patient-near", near(text), key),)


def under_key(header: dict[str, Any], key: bytes, rule: PatientRule) -> dict[str, Any]:
    """What the cache keeps of a patient, all of it as keyed digests: the fields of `SliceRecord` about the
    patient, the pseudonym apart.
    """
    origin, _ = named_by(header, rule)
    forms, loose = forms_of(header["patient_id"], header["charset"], key) if origin == "id" else ((), ())
    birth, sex = header["birth_date"], header["sex"]
    issuer = normalised(readings(header["issuer"], header["charset"])[0])
    return {
        "patient_origin": origin,
        "patient_forms": forms,
        "patient_near": loose,
        "birth": keyed("birth", birth, key) if birth and birth not in _PLACEHOLDER_DATES else "",
        "sex": keyed("sex", sex, key) if sex in {"M", "F"} else "",
        "issuer": keyed("issuer", issuer, key) if issuer and origin == "id" else "",
    }


def without_id(records: Iterable[Identified], rule: PatientRule) -> int:
    """Slices whose patient is named neither by an ID nor by the operator's fallback."""
    named = {"name-and-birth-date": {"id", "person"}, "study": {"id", "study"}}.get(
        rule.fallback or "", {"id"}
    )
    return sum(record.patient_origin not in named for record in records)


def alike(records: Iterable[Identified]) -> list[tuple[str, ...]]:
    """Groups of patients whose IDs differ only in writing: pseudonyms, two or more in each group."""
    by_form: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for form in (*record.patient_forms, *record.patient_near):
            by_form[form].add(record.patient)
    leader: dict[str, str] = {}

    def root(patient: str) -> str:
        while leader.setdefault(patient, patient) != patient:
            patient = leader[patient]
        return patient

    for patients in by_form.values():
        first, *others = sorted(patients)
        for other in others:
            leader[root(other)] = root(first)
    groups: dict[str, list[str]] = defaultdict(list)
    for patient in leader:
        groups[root(patient)].append(patient)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def of_several_people(records: Iterable[Identified]) -> frozenset[str]:
    """Patients whose headers state two birth dates or two sexes: perhaps two people under one ID."""
    births: dict[str, set[str]] = defaultdict(set)
    sexes: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.birth:
            births[record.patient].add(record.birth)
        if record.sex:
            sexes[record.patient].add(record.sex)
    return frozenset(
        patient for stated in (births, sexes) for patient, values in stated.items() if len(values) > 1
    )


def of_several_issuers(records: Iterable[Identified]) -> frozenset[str]:
    """Patients whose ID was given by two issuers: perhaps two people, whose numbers happen to be the same."""
    issuers: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.issuer:
            issuers[record.patient].add(record.issuer)
    return frozenset(patient for patient, values in issuers.items() if len(values) > 1)


def is_listed(record: Identified, listed: Collection[str]) -> bool:
    """Whether a list of pseudonyms and normalised forms names the patient of a slice."""
    return record.patient in listed or any(form in listed for form in record.patient_forms)


def _person(header: dict[str, Any]) -> str:
    """Name and birth date in one spelling; "" where either is missing or a placeholder."""
    birth = header["birth_date"]
    groups = readings(header["patient_name"], header["charset"])[0].split("=")
    name = next((plain for group in groups if (plain := _name(group))), "")
    if not name or is_placeholder(name) or not birth or birth in _PLACEHOLDER_DATES:
        return ""
    return f"{name}|{birth}"


def _name(group: str) -> str:
    return " ".join(re.split(r"[\s^,]+", normalised(group))).strip()


def _visible(text: str) -> str:
    return "".join(letter for letter in text if unicodedata.category(letter) not in ("Cf", "Cc"))


def _without_case(text: str) -> str:
    return text.casefold().upper()


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _declared(data: bytes, charset: str) -> str | None:
    from pydicom.charset import convert_encodings, decode_bytes  # site.yaml is read without it

    if not charset.strip():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote the header
            text: str = decode_bytes(data, convert_encodings(charset.split("\\")), set())
    except Exception:  # pydicom lets anything through that an unknown character set provokes
        return None
    return None if "�" in text or "\x1b" in text else text


def _is_paired(data: bytes) -> bool:
    """Whether all high bytes come in the pairs of GB 2312: so Chinese text looks, and Latin text hardly
    ever.
    """
    runs: Sequence[bytes] = re.findall(rb"[\x80-\xff]+", data)
    return bool(runs) and all(len(run) % 2 == 0 and min(run) >= 0xA1 for run in runs)
