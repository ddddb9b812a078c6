"""Write nginx's configuration: TLS, and only the calls of SuperNodes are passed to the SuperLink on loopback.

Flower's SuperLink serves hospitals (`/v1/fleet`), administrators (`/v1/control`, without a login) and its own
processes (`/v1/runtime`) on one port. Hospitals need a closed list of twelve calls; any other request gets
404 from the proxy.
"""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.federation.registry import Federation

FLEET_CALLS = (
    "register-node",
    "activate-node",
    "deactivate-node",
    "unregister-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""Flower 1.41's Fleet API, all of it POST; a test compares the list with the installed Flower."""

BODY_LIMIT_BYTES = 6 << 20
"""Flower sends arrays in objects of 5 MiB, one a call; 1 MiB more holds the frame, or a message without an
array.
"""
CONNECTIONS_PER_ADDRESS = 32
"""Calls at a time. A node makes about four; several hospitals may share an address behind a NAT gateway."""
CONNECTIONS = 128
"""Calls at a time of all addresses: each may hold a body, so that they hold at most 768 MiB."""
CALLS_PER_SECOND, CALLS_AT_ONCE = 300, 600
"""Of one address. A node that transfers a model makes about a hundred in a second; more get 503, after which
Flower tries again."""
TURNED_AWAY_PER_SECOND, TURNED_AWAY_AT_ONCE = 2, 20
"""Requests of one address that are logged although they are no calls. All get 404."""
MAX_URI_LOGGED = 120


def nginx_configuration(federation: Federation) -> str:
    """nginx.conf of a federation. Needs no root for ports above 1023; writes only below FED/proxy, errors to
    stderr.

    The path is compared as it was sent (`$request_uri`), before nginx decodes or joins anything, and must be
    exactly equal: an encoded, doubled or dotted path is not. So only twelve constants pass.
    """
    folder, settings = federation.proxy, federation.settings
    listen = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    calls = "|".join(FLEET_CALLS)
    user = ""
    if os.geteuid() == 0:  # as root nginx runs its workers as a user who may not enter this folder
        owner = pwd.getpwuid(federation.folder.stat().st_uid if federation.folder.exists() else 0).pw_name
        user = f"user {owner};\n"
    asked = ""
    if settings.client_certificates:
        asked = (
            f'\n        ssl_client_certificate "{federation.ca_certificate}";\n        ssl_verify_client on;'
        )
    return f"""\
# Written by fedqc from federation.yaml at every start: changes made here are lost.
daemon off;
{user}worker_processes 2;
pid "{folder}/nginx.pid";
error_log stderr warn;

events {{
    worker_connections 1024;
}}

http {{
    server_tokens off;
    default_type text/plain;
    client_body_temp_path "{folder}/client_body";
    proxy_temp_path "{folder}/proxy_temp";
    fastcgi_temp_path "{folder}/fastcgi_temp";
    uwsgi_temp_path "{folder}/uwsgi_temp";
    scgi_temp_path "{folder}/scgi_temp";

    # exact match, case included, on the path as sent; nothing else reaches the SuperLink
    map "$request_method $request_uri" $fleet_call {{
        default 0;
        "~^POST /v1/fleet/(?:{calls})$" 1;
    }}

    # rejected requests are logged, so many of each address and their beginning only; the regular calls of
    # nodes are not, nor is any body
    map "$status $limit_req_status" $turned_away {{
        default 0;
        "~REJECTED$" 0;
        "~^4" 1;
    }}
    map "$request_method $request_uri" $shown_request {{
        default "";
        "~^(?<shown>.{{0,{MAX_URI_LOGGED}}})" $shown;
    }}
    log_format turned_away escape=json
        '{{"at":"$time_iso8601","from":"$remote_addr","request":"$shown_request","status":$status}}';
    access_log "{folder}/turned-away.log" turned_away if=$turned_away;

    limit_conn_zone $binary_remote_addr zone=hospitals:4m;
    limit_conn_zone $server_name zone=everyone:1m;
    limit_conn_status 503;  # Flower tries again
    limit_conn_log_level info;
    limit_req_zone $binary_remote_addr zone=calls:4m rate={CALLS_PER_SECOND}r/s;
    limit_req_zone $binary_remote_addr zone=others:4m rate={TURNED_AWAY_PER_SECOND}r/s;
    limit_req_status 503;
    limit_req_log_level info;

    upstream superlink {{
        server 127.0.0.1:{settings.superlink_port};
        keepalive 16;
        keepalive_timeout 3s;  # below the SuperLink's own 5 s: it must never close a connection in use
    }}

    server {{
        listen {listen}:{settings.port} ssl;
        ssl_certificate "{federation.server_certificate}";
        ssl_certificate_key "{federation.server_key}";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
        ssl_session_tickets off;{asked}

        # slow clients are disconnected; a body is complete before it is passed to the SuperLink
        client_header_timeout 10s;
        client_body_timeout 10s;
        send_timeout 10s;
        reset_timedout_connection on;
        large_client_header_buffers 4 2k;
        client_max_body_size {BODY_LIMIT_BYTES};
        client_body_buffer_size {BODY_LIMIT_BYTES};  # an update never touches the proxy's disk
        limit_conn hospitals {CONNECTIONS_PER_ADDRESS};
        limit_conn everyone {CONNECTIONS};

        # a request that is not HTTP gets the same answer as a path that is not a call. `try_files` and not
        # `return`, which would answer before anything is counted
        error_page 400 414 494 =404 /turned-away;
        location = /turned-away {{
            internal;
            limit_req zone=others burst={TURNED_AWAY_AT_ONCE} nodelay;
            limit_req_status 404;
            try_files /none =404;
        }}

        location / {{
            if ($fleet_call = 0) {{
                rewrite ^ /turned-away last;
            }}
            limit_req zone=calls burst={CALLS_AT_ONCE} nodelay;
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_request_buffering on;
            proxy_buffers 24 256k;  # nor does a model that a node fetches
            proxy_busy_buffers_size 1m;
            proxy_max_temp_file_size 0;
            proxy_read_timeout 60s;
            proxy_next_upstream off;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate "{federation.ca_certificate}";
            proxy_ssl_name localhost;
            proxy_ssl_protocols TLSv1.3;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            # nodes sign their calls in Flower's own headers; those that name a user or an address do not pass
            proxy_set_header Authorization "";
            proxy_set_header Cookie "";
            proxy_set_header Forwarded "";
            proxy_set_header X-Forwarded-For "";
            proxy_set_header X-Forwarded-Proto "";
            proxy_set_header X-Forwarded-Host "";
        }}
    }}
}}
"""
