"""The server with the stand-in for its engine, and all the options of `gemma-server serve`."""

from __future__ import annotations

import sys

from server.__main__ import serve
from server.frontend import engine_process

if __name__ == "__main__":
    engine_process.ENGINE_MODULE = "benchmarks.front.engine"
    sys.exit(serve(sys.argv[1:]))
