"""Which names the server answers to.

A page of any site can have its own name resolve to 127.0.0.1, and then talk to a server there from the browser
of whoever looks at it; the browser sends that name as Host. So a server on a loopback address answers to no
names but `localhost` and those it was given. An address as Host harms nothing: a page that has one came from
there.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_responses import error_response
from server.config import is_loopback
from server.errors import HostNotAllowedError, shown

ANY = "*"

_HOST = re.compile(r"([a-z0-9_.-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?", re.IGNORECASE)


class HostMiddleware:
    """Refuses a Host header that names another host than the allowed ones, and one that is no name at all.

    The path is never taken from it. Who sends none, as probes in HTTP/1.0 do, is no browser, and is let in.
    """

    def __init__(self, app: ASGIApp, bound_to: str, allowed: Sequence[str]) -> None:
        """`allowed`: names, beside localhost's; `*.example.com` stands for those under one, `*` for any. If it
        is empty, `bound_to` decides."""
        self._app = app
        if not allowed and not is_loopback(bound_to):
            allowed = (ANY,)
        self._allowed = ("localhost", "*.localhost", *(name.lower() for name in allowed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                host = value.decode("latin-1")
                if name == b"host" and not self.allows(host):
                    error = HostNotAllowedError(
                        f"This server does not answer to the Host {shown(host)}. Ask for it by"
                        " address or as localhost, or start it with --allowed-hosts NAME."
                    )
                    await error_response(error, scope["path"])(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def allows(self, host: str) -> bool:
        """Whether a Host header may be `host`, which may end with a port."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].lower().removesuffix(".")
        return _is_address(name) or any(_matches(name, pattern) for pattern in self._allowed)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _matches(name: str, pattern: str) -> bool:
    return pattern == ANY or name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))
