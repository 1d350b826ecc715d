"""The command line: `gemma-server serve [options]`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from server import __version__, logs
from server.config import OptionError, load_config, unknown_variables
from server.options import ServerConfig

if TYPE_CHECKING:
    from server.batches.store import Store
    from server.tracing import RequestTracer

EXIT_BAD_USAGE = 2
"""As argparse has it."""

USAGE = """\
usage: gemma-server COMMAND [options]

commands:
  serve      serve a Gemma model over the OpenAI API
  run-batch  answer the requests in a file, without a server
  version    print the version

`gemma-server COMMAND --help` lists a command's options."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    run = COMMANDS.get(command)
    if run is None:
        print(f"gemma-server: no command {command!r}\n\n{USAGE}", file=sys.stderr)
        return EXIT_BAD_USAGE
    return run(arguments[1:])


def serve(arguments: Sequence[str]) -> int:
    # Not imported above: `--help` and `version` answer at once.
    from server.engine.parallel.places import HostPlace, PlaceError

    try:
        config = load_config(arguments)
        place = HostPlace.of(config.tensor_parallel_size)
    except (OptionError, PlaceError) as error:
        return _refuse(error)
    if place.index == 0:
        return _serve_clients(config)
    _begin(config, "rank")
    from server.rank_host import serve_ranks

    return serve_ranks(config, place)


def _serve_clients(config: ServerConfig) -> int:
    from server.api_keys import KeyRing, check_exposure
    from server.moderation import load_policies

    try:
        keys = KeyRing(config)
        check_exposure(config, keys)
        policies = load_policies(config.moderation_policies)
        tracer = None if config.otlp_traces_endpoint is None else _open_tracer(config.otlp_traces_endpoint)
        store = None if config.data_dir is None else _open_store(config)
    except OptionError as error:
        return _refuse(error)
    _begin(config, "front")
    logs.ignore_stack_signal()

    # What takes long is imported where it is known to be wanted, so that `--help` and mistakes answer at once.
    # First the engine's process and the thread that reads the model, which run while the rest is imported.
    from server.frontend.process_client import ProcessClient

    client = ProcessClient(config)
    logs.dump_stacks_on_signal(pass_on=client.dump_stacks)

    from server.runtime import Runtime

    runtime = Runtime(config, client)
    runtime.read_model()

    from server.app import create_app
    from server.http_server import HttpServer

    app = create_app(runtime, store, policies, keys=keys, tracer=tracer)
    server = HttpServer(app, runtime)

    def end() -> None:
        server.should_exit = True

    runtime.on_failure = end
    _on_signals(server.on_signal)
    if config.api_key_file is not None:
        # In a thread: a handler interrupts whatever runs, which may hold the log.
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=keys.reload, name="keys").start())
    server.run()
    return runtime.exit_code


def _refuse(error: ValueError) -> int:
    print(f"gemma-server: {error}", file=sys.stderr)
    return os.EX_CONFIG  # starting again with the same options would fail again


def _begin(config: ServerConfig, process: logs.Process) -> None:
    """Once the configuration is known to be right: signals, the log, and its first lines."""
    _on_signals(lambda number: sys.exit(0))  # an end that was asked for is no failure
    logs.configure(config.log_level, config.log_format, process)
    for warning in unknown_variables(os.environ):
        logging.getLogger("server").warning(warning)


def _on_signals(end: Callable[[int], None]) -> None:
    def asked_to_end(number: int, frame: FrameType | None) -> None:
        end(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, asked_to_end)


def _open_store(config: ServerConfig) -> Store:
    from server.batches.store import Store

    assert config.data_dir is not None
    return Store(config.data_dir, max_bytes=config.max_stored_bytes, max_files=config.max_stored_files)


def _open_tracer(endpoint: str) -> RequestTracer:
    from server.tracing import RequestTracer

    return RequestTracer(endpoint)


def version(arguments: Sequence[str]) -> int:
    print(__version__)
    return 0


def run_batch(arguments: Sequence[str]) -> int:
    from server.run_batch import run_batch

    return run_batch(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "run-batch": run_batch,
    "version": version,
}

if __name__ == "__main__":
    sys.exit(main())
