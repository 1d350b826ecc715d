"""The engine's life around its core: receive, step, send, until there is nobody left to serve.

`serve` is the loop itself, fed by a queue and emptied by a function, so that a thread can run it as well as a
process. `main` is the child process: `python -m server.engine.loop --fd N`, with N one end of a socket pair.
One of its threads reads the socket, one writes to it, one sends heartbeats, and the main thread alone touches
the model.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable

import msgspec

from server import logs
from server.engine import transport
from server.engine.core import EngineCore
from server.engine.lifeline import die_with_parent
from server.engine.pulse import Pulse
from server.engine.stages import StageTimes
from server.engine.types import (
    Abort,
    Began,
    Failed,
    FromEngine,
    Inspect,
    Loading,
    Ready,
    Start,
    Submit,
    ToEngine,
    Vocabulary,
)

logger = logging.getLogger("server.engine.loop")  # whose name is __main__ in the child


class Wake:
    """The core has work that no message of the front brought."""


Inbox = queue.SimpleQueue[ToEngine | Wake | None]
"""What the front sent, in order; None when it has closed."""


def serve(inbox: Inbox, send: Callable[[FromEngine], None], pulse: Pulse) -> int:
    """Load what the first message says, then run until the inbox ends. Returns the exit code.

    An exception means that the engine's state can no longer be trusted; the caller lets the process die.
    """
    # The model's code takes a while to import; the caller's threads run meanwhile.
    imports = StageTimes("import")
    from server.engine.build import StartError, build_engine

    import_seconds = imports.seconds()
    start = inbox.get()
    if not isinstance(start, Start):
        return 0
    try:
        core, info = build_engine(
            start.config,
            progress=lambda stage, fraction: send(Loading(stage, fraction)),
            wake=lambda: inbox.put(Wake()),
        )
    except StartError as error:
        send(Failed(str(error)))
        return os.EX_CONFIG  # which a restart would not help
    # What lives now lives for good; later collections need not walk it.
    gc.collect()
    gc.freeze()
    core.on_begun = lambda request_ids: send(Began(request_ids))
    send(Ready(msgspec.structs.replace(info, start_seconds=import_seconds | info.start_seconds)))
    _run(core, inbox, send, pulse)
    return 0


def _run(core: EngineCore, inbox: Inbox, send: Callable[[FromEngine], None], pulse: Pulse) -> None:
    while True:
        while not inbox.empty() or not core.has_work():
            message = inbox.get()
            if message is None:
                return
            with pulse.turn():
                _handle(core, message, send)
        with pulse.turn():
            send(core.step())


def _handle(core: EngineCore, message: ToEngine | Wake, send: Callable[[FromEngine], None]) -> None:
    match message:
        case Vocabulary():
            core.set_vocabulary(message)
        case Submit(request):
            core.add(request)
        case Abort(request_ids):
            core.abort(request_ids)
        case Inspect(number, max_waiting):
            send(core.snapshot(number, max_waiting))
        case Wake():
            pass  # it did what it is for
        case Start():
            logger.warning("ignored a second Start message")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text")
    arguments = parser.parse_args()
    logs.configure(arguments.log_level, arguments.log_format, "engine")
    logs.dump_stacks_on_signal()
    die_with_parent()
    # Ctrl-C reaches the whole process group; the front decides when the engine ends, by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    connection = socket.socket(fileno=arguments.fd)
    inbox: Inbox = queue.SimpleQueue()
    outbox: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), name="reader", daemon=True).start()
    writer = threading.Thread(target=_write, args=(connection, outbox), name="writer", daemon=True)
    writer.start()
    pulse = Pulse()
    pulse.beat(outbox.put)
    code = serve(inbox, outbox.put, pulse)
    outbox.put(None)
    writer.join()
    return code


def _read(connection: socket.socket, inbox: Inbox) -> None:
    try:
        while (payload := transport.read_frame(connection)) is not None:
            try:
                inbox.put(transport.decode_to_engine(payload))
            except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
                logger.error("dropped a message that is not in the protocol: %s", error)
    except ConnectionResetError:
        pass  # the front closed while something of this side was on its way
    except (OSError, transport.FrameError) as error:
        logger.error("lost the connection to the front: %s", error)
    finally:
        inbox.put(None)  # whatever it was, without its reader the loop would wait for ever


def _write(connection: socket.socket, outbox: queue.SimpleQueue[FromEngine | None]) -> None:
    try:
        while (message := outbox.get()) is not None:
            connection.sendall(transport.encode_frame(message))
    except OSError:
        # The front is gone; the reader notices the same and ends the loop.
        return


if __name__ == "__main__":
    sys.exit(main())
