"""systemd units of a hospital: the agent has the data and no network, the node has the network and no data.

Two system users, one shared group for the socket in run/. Both come back after any end, forever: Flower
refuses a node's key for up to 60 seconds after a crash, which systemd's default limit of five starts would
not survive.
"""

from __future__ import annotations

import sys
from pathlib import Path

from client.site.config import read_site
from common.errors import ConfigError
from common.files import write_as_owner

AGENT, NODE = "fedqc-agent.service", "fedqc-node.service"
AGENT_USER, NODE_USER, GROUP = "fedqc-agent", "fedqc-node", "fedqc"

_HARDENING = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0077
Restart=always
RestartSec=15
TimeoutStopSec=15
"""


def unit_texts(site: Path, python: str = sys.executable) -> dict[str, str]:
    """The two units of a site folder by file name.

    Args:
        python: the interpreter of the environment that fedqc is installed in.
    Raises:
        ConfigError: `no-such-site` or `bad-site`; `bad-path` for a path that systemd cannot be given.
    """
    config, folder = read_site(site)
    folder = folder.absolute()
    state, node, run = folder / config.state, folder / "node", folder / "run"
    private = [state, folder / config.images, folder / config.labels]
    command = (
        f"{_quoted(python)} -P -m common.cli site start --site {_quoted(folder)} --require-isolation --only"
    )
    return {
        AGENT: f"""\
# Written by `fedqc site join` for {config.name}. Before the first start, once, as root:
#   groupadd --system {GROUP}
#   useradd --system --gid {GROUP} {AGENT_USER}; useradd --system --gid {GROUP} {NODE_USER}
#   in the site folder: chown -R {AGENT_USER}:{GROUP} state run; chown -R {NODE_USER}:{GROUP} node
#   the images, the label sheet and *.yaml must be readable by {AGENT_USER}
[Unit]
Description=fedqc agent of {config.name}: the data, no network
StartLimitIntervalSec=0

[Service]
User={AGENT_USER}
Group={GROUP}
ExecStart={command} agent
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK
PrivateTmp=yes
ReadWritePaths={_quoted(state)} {_quoted(run)}
{_HARDENING}
[Install]
WantedBy=multi-user.target
""",
        NODE: f"""\
# Written by `fedqc site join` for {config.name}; see {AGENT} for the users. A proxy of the hospital goes into node/environment,
# as HTTPS_PROXY=http://host:port
[Unit]
Description=fedqc node of {config.name}: the network, no data
StartLimitIntervalSec=0
Wants=network-online.target
After=network-online.target {AGENT}

[Service]
User={NODE_USER}
Group={GROUP}
EnvironmentFile=-{_escaped(node / "environment")}
ExecStart={command} node
PrivateDevices=yes
PrivateTmp=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
InaccessiblePaths={" ".join(_quoted(path) for path in private)}
ReadWritePaths={_quoted(node)} {_quoted(run)}
{_HARDENING}
[Install]
WantedBy=multi-user.target
""",
    }


def write_units(site: Path) -> Path:
    """Write the units to SITE/systemd/, except those that are there already: the operator may have changed
    them.
    """
    folder = site / "systemd"
    folder.mkdir(exist_ok=True)
    for name, text in unit_texts(site).items():
        if not (folder / name).exists():
            write_as_owner(folder / name, text.encode(), mode=0o644)
    return folder


def _quoted(path: Path | str) -> str:
    return f'"{_escaped(path)}"'


def _escaped(path: Path | str) -> str:
    text = str(path)
    if any(character in text for character in "\n\r\0\\\"'$") or text != text.strip():
        raise ConfigError(
            f"{text!r}: systemd cannot be given this path",
            code="bad-path",
            hint="use a folder with a plainer name",
        )
    return text.replace("%", "%%")
