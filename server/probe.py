"""`python -m server.probe [ready|startup|live]`: asks the server in this container how it is; exits 0 or 1.

For probes that run a command, and images without curl. Nothing is imported but the standard library, since it
runs every few seconds beside the server.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing

_PATHS = {"ready": "/readyz", "startup": "/startupz", "live": "/livez"}
_TIMEOUT_SECONDS = 3.0


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    what = arguments[0] if arguments else "ready"
    if what not in _PATHS or len(arguments) > 1:
        print(f"usage: python -m server.probe [{'|'.join(_PATHS)}]", file=sys.stderr)
        return 2
    default = "8080" if environment.get("AIP_MODE") else "8000"  # on Vertex AI
    port = environment.get("GEMMA_SERVER_PORT") or environment.get("AIP_HTTP_PORT") or default
    try:
        with closing(
            http.client.HTTPConnection("127.0.0.1", int(port), timeout=_TIMEOUT_SECONDS)
        ) as connection:
            connection.request("GET", _PATHS[what])
            answer = connection.getresponse()
            print(answer.status, answer.read(1000).decode("utf-8", "replace"))
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"no answer at port {port}: {error}")
        return 1
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
