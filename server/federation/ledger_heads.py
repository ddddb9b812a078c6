"""Keep the last head of each site's privacy ledger: `state/ledger-heads/<site>.json`.

A hospital's ledger cannot notice that ledger and head file were set back together, or that the whole folder
was copied or moved. The coordinator is its witness: it keeps what the site signed last, and says it in each
later question; the site refuses where that is no ancestor of its ledger. The coordinator learns how many
entries the ledger has, which counts what the site was asked, by whomever, and nothing of a patient.

A note belongs to the signing key under which it came: a site that is enrolled again with new keys is a new
installation.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from common.errors import ConfigError
from common.files import locked, write_bytes
from common.wire import LEDGER_HEAD
from server.federation.registry import Enrolment, Federation


@dataclass(frozen=True, kw_only=True)
class _Note:
    head: str
    signing_key: str

    @property
    def length(self) -> int:
        return int(self.head.partition(":")[0])


class LedgerHeads:
    """The heads of a federation's sites; see `server.messaging.signatures.Witness`."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._folder = federation.state / "ledger-heads"

    def of_site(self, site: str) -> str:
        """The head that a site reported last under its present key; "" where it reported none."""
        return next(
            (self._of(enrolment) for enrolment in self._federation.sites() if enrolment.site == site), ""
        )

    def of_node(self, node: int) -> str:
        """As `of_site`, of the site whose node has this number at the SuperLink."""
        return next(
            (self._of(enrolment) for enrolment in self._federation.sites() if enrolment.node_id == node), ""
        )

    def keep(self, site: str, head: str) -> None:
        """Note a head, unless a longer ledger of the same key is known: a stored answer that is sent again
        carries an earlier one.
        """
        key = self._federation.site(site).request.signing_key
        new = _Note(head=head, signing_key=key)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self._folder / "lock"):  # several runs may have answers at once
            known = self._read(site)
            if known is not None and known.signing_key == key and known.length >= new.length:
                return
            note = {"head": head, "signing_key": key, "at": datetime.now(UTC).isoformat(timespec="seconds")}
            write_bytes(self._folder / f"{site}.json", json.dumps(note).encode(), 0o600)

    def _of(self, enrolment: Enrolment) -> str:
        known = self._read(enrolment.site)
        if known is None or known.signing_key != enrolment.request.signing_key:
            return ""
        return known.head

    def _read(self, site: str) -> _Note | None:
        """Raises ConfigError (code `bad-ledger-head`): the note is damaged."""
        path = self._folder / f"{site}.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if re.fullmatch(LEDGER_HEAD, values["head"]) and values["head"]:
                return _Note(head=values["head"], signing_key=str(values["signing_key"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise ConfigError(
            f"{path}: damaged, or cannot be read",
            code="bad-ledger-head",
            hint="restore it from the backup; without it a ledger that was set back goes unnoticed",
        )
