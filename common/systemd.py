"""Write systemd units of services that are restarted after any end, with little access to the system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError

RESTART_S = 15

_SERVICE = f"""\
Restart=always
RestartSec={RESTART_S}
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
LockPersonality=yes
LimitCORE=0
UMask=0077
"""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One service."""

    comment: str  # what an administrator does before the first start
    description: str
    user: str
    group: str
    command: str  # ExecStart: paths by `quoted`
    settings: Sequence[str]  # further lines of [Service]
    needs_network: bool
    after: Sequence[str] = ()  # other units

    def text(self) -> str:
        """The unit file.

        StartLimitIntervalSec=0: systemd would otherwise give up after five starts, and Flower refuses the key
        of a node that crashed for up to 60 seconds.
        """
        comment = "".join(f"# {line}\n" for line in self.comment.splitlines())
        after = [*(["network-online.target"] if self.needs_network else []), *self.after]
        order = "Wants=network-online.target\n" if self.needs_network else ""
        order += f"After={' '.join(after)}\n" if after else ""
        settings = "".join(f"{line}\n" for line in self.settings)
        return (
            f"{comment}[Unit]\nDescription={self.description}\nStartLimitIntervalSec=0\n{order}\n"
            f"[Service]\nUser={self.user}\nGroup={self.group}\nExecStart={self.command}\n{settings}{_SERVICE}\n"
            "[Install]\nWantedBy=multi-user.target\n"
        )


def quoted(path: Path | str) -> str:
    """A path as one word of a unit's line.

    Raises:
        ConfigError: systemd cannot be given this path (code `bad-path`).
    """
    return f'"{escaped(path)}"'


def escaped(path: Path | str) -> str:
    """A path for a setting that takes no quotes. Raises as `quoted`."""
    text = str(path)
    if any(character in text for character in "\n\r\0\\\"'$") or text != text.strip():
        raise ConfigError(
            f"{text!r}: cannot be written into a systemd unit",
            code="bad-path",
            hint="use a folder whose name has no quotes, backslashes or $",
        )
    return text.replace("%", "%%")
