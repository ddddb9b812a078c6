"""Write the coordinator's two systemd units: Flower's services on loopback, and the TLS proxy."""

from __future__ import annotations

import sys

from common.systemd import Unit, quoted
from server.federation.registry import Federation

SERVICES, PROXY = "fedqc-federation.service", "fedqc-proxy.service"
USER = "fedqc"


def unit_texts(federation: Federation, python: str = sys.executable) -> dict[str, str]:
    """systemd units by file name: the services (`federation start --no-proxy`) and the proxy.

    SuperLink and SuperExec are one unit: neither is of use without the other, and `federation start`
    registers the enrolled sites at the SuperLink.

    Raises:
        ConfigError: the folder or the interpreter has a path that systemd cannot be given (code `bad-path`).
    """
    folder = quoted(federation.folder)
    shared = [
        f"WorkingDirectory={federation.folder}",
        "PrivateDevices=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        f"ReadWritePaths={folder}",
    ]
    services = Unit(
        comment=(
            f"Written by fedqc for the federation {federation.name}. Before the first start, once, as root:\n"
            f"  useradd --system --user-group {USER}; chown -R {USER}:{USER} {folder}"
        ),
        description=f"fedqc federation {federation.name}: SuperLink and SuperExec, on loopback",
        user=USER,
        group=USER,
        command=f"{quoted(python)} -m common.cli federation start --no-proxy --federation {folder}",
        settings=["SuccessExitStatus=143", "TimeoutStopSec=15", *shared],
        needs_network=True,
    )
    prefix, configuration = quoted(federation.proxy), quoted(federation.proxy / "nginx.conf")
    proxy = Unit(
        comment=f"Written by fedqc for the federation {federation.name}: the only port open to others.",
        description=f"fedqc federation {federation.name}: TLS proxy on port {federation.settings.port}",
        user=USER,
        group=USER,
        command=f"/usr/sbin/nginx -e stderr -p {prefix} -c {configuration}",
        settings=[
            "ExecReload=/bin/kill -HUP $MAINPID",
            "KillSignal=SIGQUIT",
            "TimeoutStopSec=10",
            "AmbientCapabilities=CAP_NET_BIND_SERVICE",
            "CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
            *shared,
        ],
        needs_network=True,
    )
    return {SERVICES: services.text(), PROXY: proxy.text()}
