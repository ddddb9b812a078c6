"""TODO."""

from __future__ import annotations

import sys

from server.federation.registry import Federation


def unit_texts(federation: Federation, python: str = sys.executable) -> dict[str, str]:
    """systemd units by file name: the services (`federation start --no-proxy`) and the proxy.

    SuperLink and SuperExec are one unit because neither is of use without the other, and because somebody
    must tell the SuperLink who is enrolled. Both units come back after any end.
    """
    folder = federation.folder
    shared = f"""\
User=fedqc
Group=fedqc
WorkingDirectory={folder}
Restart=always
RestartSec=15
NoNewPrivileges=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes
ReadWritePaths="{folder}"
UMask=0077
"""
    start = f"""\
# Written by fedqc for the federation {federation.name}. Before the first start, once, as root:
#   useradd --system --user-group fedqc; chown -R fedqc:fedqc "{folder}"
[Unit]
Description=fedqc federation {federation.name}: SuperLink and SuperExec, on loopback
StartLimitIntervalSec=0
After=network-online.target
Wants=network-online.target

[Service]
ExecStart="{python}" -m common.cli federation start --no-proxy --federation "{folder}"
SuccessExitStatus=143
TimeoutStopSec=15
{shared}
[Install]
WantedBy=multi-user.target
"""
    proxy = f"""\
# Written by fedqc for the federation {federation.name}: the only door that is open.
[Unit]
Description=fedqc federation {federation.name}: TLS proxy on port {federation.settings.port}
StartLimitIntervalSec=0
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=/usr/sbin/nginx -e stderr -p "{federation.proxy}" -c "{federation.proxy}/nginx.conf"
ExecReload=/bin/kill -HUP $MAINPID
KillSignal=SIGQUIT
TimeoutStopSec=10
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
{shared}
[Install]
WantedBy=multi-user.target
"""
    return {"fedqc-federation.service": start, "fedqc-proxy.service": proxy}
