"""Write a hospital's two systemd units: an agent with the data and no network, a node with the network and no
data. Two system users, one shared group for the socket in run/.
"""

from __future__ import annotations

import sys
from pathlib import Path

from client.site.config import read_site
from common.files import write_as_owner
from common.systemd import Unit, escaped, quoted

AGENT, NODE = "fedqc-agent.service", "fedqc-node.service"
AGENT_USER, NODE_USER, GROUP = "fedqc-agent", "fedqc-node", "fedqc"

_HARDENING = [
    "CapabilityBoundingSet=",
    "ProtectKernelLogs=yes",
    "ProtectClock=yes",
    "RestrictRealtime=yes",
    "SystemCallArchitectures=native",
    "TimeoutStopSec=15",
]


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
    private = [state, folder / config.images]
    if config.has_sheet:
        private.append(folder / config.labels)
    command = (
        f"{quoted(python)} -P -m common.cli site start --site {quoted(folder)} --require-isolation --only"
    )
    agent_unit = Unit(
        comment=(
            f"Written by `fedqc site join` for {config.name}. Before the first start, once, as root:\n"
            f"  groupadd --system {GROUP}\n"
            f"  useradd --system --gid {GROUP} {AGENT_USER}; useradd --system --gid {GROUP} {NODE_USER}\n"
            f"  in the site folder: chown -R {AGENT_USER}:{GROUP} state run; "
            f"chown -R {NODE_USER}:{GROUP} node\n"
            f"  the images, the label sheet and *.yaml must be readable by {AGENT_USER}"
        ),
        description=f"fedqc agent of {config.name}: the data, no network",
        user=AGENT_USER,
        group=GROUP,
        command=f"{command} agent",
        settings=[
            "PrivateNetwork=yes",
            "RestrictAddressFamilies=AF_UNIX AF_NETLINK",
            f"ReadWritePaths={quoted(state)} {quoted(run)}",
            *_HARDENING,
        ],
        needs_network=False,
    )
    node_unit = Unit(
        comment=(
            f"Written by `fedqc site join` for {config.name}; see {AGENT} for the users.\n"
            "An HTTP proxy of the hospital goes into node/environment, as HTTPS_PROXY=http://host:port"
        ),
        description=f"fedqc node of {config.name}: the network, no data",
        user=NODE_USER,
        group=GROUP,
        command=f"{command} node",
        settings=[
            f"EnvironmentFile=-{escaped(node / 'environment')}",
            "PrivateDevices=yes",
            "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
            f"InaccessiblePaths={' '.join(quoted(path) for path in private)}",
            f"ReadWritePaths={quoted(node)} {quoted(run)}",
            *_HARDENING,
        ],
        needs_network=True,
        after=[AGENT],
    )
    return {AGENT: agent_unit.text(), NODE: node_unit.text()}


def write_units(site: Path) -> Path:
    """Write the units to SITE/systemd/, except those that exist: the operator may have changed them.

    Raises:
        ConfigError: see `unit_texts`.
    """
    folder = site / "systemd"
    folder.mkdir(exist_ok=True)
    for name, text in unit_texts(site).items():
        if not (folder / name).exists():
            write_as_owner(folder / name, text.encode(), mode=0o644)
    return folder
