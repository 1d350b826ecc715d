"""The server's life: from an open port to a loaded model, and to its end.

The port is open before anything is loaded, so the load runs as a task in the background and `phase` tells the
probes how far it is. What takes long runs side by side: the engine's process imports its half while a thread of
this one finds the model and reads the tokenizer, and the main thread imports the HTTP side.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import enum
import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from server.cache_directory import cache_directory
from server.engine.models.config import GemmaConfig
from server.engine.models.config_reader import read_gguf
from server.engine.models.gguf import read_metadata
from server.engine.models.safetensors_dir import read_config
from server.engine.stages import StageTimes
from server.engine.types import EngineInfo, Loading, StepStats
from server.engine_options import engine_config
from server.frontend.client import EngineClient, EngineDeadError, EngineLoss
from server.frontend.grammar_check import GrammarChecker
from server.frontend.served_model import ServedModel
from server.frontend.vocabulary import make_byte_vocabulary, make_vocabulary
from server.gguf_tokenizer import tokenizer_for_gguf
from server.metrics import Metrics
from server.model_source import DownloadProgress, ModelFiles, ModelSourceError, resolve
from server.options import ServerConfig
from server.tokenizer import START_RESPONSE, Tokenizer

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Model = tuple[ModelFiles, Tokenizer, GemmaConfig, dict[str, float]]
"""With the seconds that each stage of finding and reading it took."""


class Phase(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    UNRESPONSIVE = "unresponsive"
    """The engine shows no sign of life. It returns to READY, or is ended and replaced."""
    RESTARTING = "restarting"
    """The engine has ended, and another one is being started."""
    FAILED = "failed"
    """The engine could not start, or died too often. For good: no other phase follows."""


class Runtime:
    """Holds what the routes need: the configuration, the engine, the model once it is loaded."""

    def __init__(self, config: ServerConfig, client: EngineClient) -> None:
        self.config = config
        self.client = client
        self.metrics = Metrics(lambda: client.pid)
        self.model: ServedModel | None = None
        self.phase = Phase.STARTING
        self.stage = "starting"
        """While STARTING or RESTARTING what is being done, for people; when FAILED why."""
        self.fraction = 0.0
        """0..1 of the stage."""
        self.download: DownloadProgress | None = None
        """Of the model, once it has begun."""
        self.exit_code = 0
        self.is_draining = False
        """The server was told to end: whoever balances requests should look for another."""
        self.takes_requests = True
        """False once only those that were accepted before are answered."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called once when the server can serve no more."""
        self._reading: concurrent.futures.Future[_Model] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._lost_at: float | None = None
        """`time.monotonic()` seconds at which the engine ended, while there is none."""
        client.on_loading = self._on_loading
        client.on_step = self.metrics.record_step
        client.on_loss = self._on_loss
        client.on_return = self._on_return
        client.on_silence = self._on_silence
        client.on_death = self._on_death
        client.make_vocabulary = lambda: make_vocabulary(*self._tokenizer_and_size())
        self.grammars = GrammarChecker(lambda: make_byte_vocabulary(*self._tokenizer_and_size()))

    def read_model(self) -> None:
        """Begin to find and read the model in a thread; `start` does, unless it was done already."""
        if self._reading is None:
            self._reading = _in_daemon_thread(self._find_and_read)

    async def start(self) -> None:
        """Begin to load; returns at once."""
        self.read_model()
        self._loading = asyncio.create_task(self._load())

    async def stop(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
        self.grammars.close()
        await self.client.stop()

    async def _load(self) -> None:
        started = time.monotonic()
        try:
            assert self._reading is not None
            files, tokenizer, model_config, read_seconds = await asyncio.wrap_future(self._reading)
            info = await self.client.start(
                engine_config(self.config, files.path, tokenizer.unsampleable_ids(model_config.vocab_size))
            )
        except (ModelSourceError, EngineDeadError, ValueError, OSError) as error:
            self._fail(str(error), os.EX_CONFIG)
            return
        except Exception as error:  # a bug: unless it ends the server, the probes say "starting" for ever
            # In words, too, which the log's tracebacks leave out: there has been no client yet.
            logger.exception("unexpected error: %s", error)
            self._fail("the model cannot be loaded", os.EX_SOFTWARE)
            return
        if self.phase is Phase.FAILED:  # the engine died right behind its answer
            return
        names = tuple(self.config.served_model_name) or (files.name,)
        self.model = ServedModel(
            names=names,
            root=self.config.model,
            created=int(time.time()),
            tokenizer=tokenizer,
            info=info,
            stop_token_ids=_stop_token_ids(tokenizer, model_config),
        )
        # What lives now lives for good; later collections, beside which nothing else runs, need not walk it.
        gc.collect()
        gc.freeze()
        self._enter(Phase.READY if self._lost_at is None else Phase.RESTARTING, Phase.STARTING)
        seconds = time.monotonic() - started
        stage_seconds = read_seconds | info.start_seconds
        self.metrics.set_model(self.model, seconds, stage_seconds)
        logger.info(
            "serving %s on %s in %s%s (%s back end) after %.1f s: %d tokens of context, %d MiB of weights, "
            "%d MiB of KV cache",
            names[0],
            info.device,
            info.dtype,
            "" if info.quantization == "none" else f" with {info.quantization} weights",
            info.backend,
            seconds,
            info.max_model_len,
            info.weight_bytes >> 20,
            info.kv_cache_bytes >> 20,
        )
        stages = ", ".join(f"{stage} {taken:.1f}" for stage, taken in stage_seconds.items())
        logger.info("seconds of the start, the first two beside the others: %s", stages)

    def _find_and_read(self) -> _Model:
        """Raises ModelSourceError, ValueError, for files that are not what they should be, and OSError."""
        stages = StageTimes("model files")
        files = resolve(
            self.config.model,
            revision=self.config.revision,
            download_dir=self.config.download_dir,
            progress=self._on_download,
        )
        self._on_loading(Loading("tokenizer", 0.0))
        stages.enter("tokenizer")
        tokenizer, model_config = _read_model(files)
        return files, tokenizer, model_config, stages.seconds()

    def _tokenizer_and_size(self) -> tuple[Tokenizer, int]:
        """Only a loaded model gets grammars."""
        assert self.model is not None
        return self.model.tokenizer, self.model.info.vocab_size

    def _on_download(self, progress: DownloadProgress) -> None:
        before = 0 if self.download is None else self.download.done_bytes
        self.metrics.download_bytes.inc(max(0, progress.done_bytes - before))
        self.download = progress
        self.stage = "download"
        self.fraction = progress.fraction

    def _on_loading(self, loading: Loading) -> None:
        self.stage = loading.stage
        self.fraction = loading.fraction

    def _on_loss(self, loss: EngineLoss) -> None:
        logger.error(
            "%s: %d sequences ended with it, %d wait for the next engine",
            loss.reason,
            loss.num_lost,
            loss.num_kept,
        )
        self._lost_at = self._lost_at or time.monotonic()
        self.stage, self.fraction = "restarting", 0.0
        self.metrics.supervision.lost(loss)
        if self.model is not None:
            self.metrics.record_step(StepStats())  # nothing runs
        self._enter(Phase.RESTARTING, Phase.READY, Phase.UNRESPONSIVE)

    def _on_return(self, info: EngineInfo) -> None:
        seconds = 0.0 if self._lost_at is None else time.monotonic() - self._lost_at
        logger.info("the engine is back after %.1f s", seconds)
        self._lost_at = None
        self.metrics.supervision.returned(seconds)
        if self.model is not None:  # its KV cache may have another size
            self.model = replace(self.model, info=info)
        self._enter(Phase.READY, Phase.RESTARTING)

    def _on_silence(self, is_silent: bool) -> None:
        if self._lost_at is not None or self.model is None:
            return
        logger.warning("the engine shows %s", "no sign of life" if is_silent else "signs of life again")
        if is_silent:
            self._enter(Phase.UNRESPONSIVE, Phase.READY)
        else:
            self._enter(Phase.READY, Phase.UNRESPONSIVE)

    def _enter(self, phase: Phase, *sources: Phase) -> None:
        """The server may be in another phase than the engine's, which then goes on."""
        if self.phase in sources:
            self.phase = phase

    def _on_death(self, reason: str) -> None:
        self._fail(reason, os.EX_CONFIG if self.model is None else os.EX_SOFTWARE)

    def _fail(self, reason: str, exit_code: int) -> None:
        """Only the first failure counts: one can be met both as the engine's death and by the load."""
        if self.phase is Phase.FAILED:
            return
        logger.error("%s", reason)
        self.phase = Phase.FAILED
        self.stage = reason
        self.exit_code = exit_code
        self.on_failure()


def _in_daemon_thread(work: Callable[[], _Result]) -> concurrent.futures.Future[_Result]:
    """As an executor's `submit`, but the process can end meanwhile: a download may take an hour."""
    done: concurrent.futures.Future[_Result] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whatever it is, it is raised again where the result is awaited
            done.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return done


def _read_model(files: ModelFiles) -> tuple[Tokenizer, GemmaConfig]:
    if files.tokenizer_file is not None:
        tokenizer, config = Tokenizer.from_file(files.tokenizer_file), read_config(files.path)
    else:
        tokenizer = Tokenizer.from_file(tokenizer_for_gguf(files.path, cache_directory()))
        config = read_gguf(read_metadata(files.path, with_pieces=False))
    tokenizer.check_fits(config.vocab_size)
    _return_freed_memory()
    return tokenizer, config


def _return_freed_memory() -> None:
    """Parsing a tokenizer leaves 180 MB of freed memory, which glibc would keep for this process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


def _stop_token_ids(tokenizer: Tokenizer, model_config: GemmaConfig) -> tuple[int, ...]:
    """The tokenizer's and those that the checkpoint lists. Ids that the model cannot sample end nothing."""
    listed = {token_id for token_id in model_config.eos_token_ids if 0 <= token_id < model_config.vocab_size}
    return tuple(sorted(listed.union(end_token_ids(tokenizer))))


def end_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id that ends a turn: a checkpoint's lists are known to leave `<end_of_turn>` or `<eos>` out.

    FunctionGemma begins a response behind its calls, and expects the rest of it from us.
    """
    response_id = tokenizer.function_ids.get(START_RESPONSE)
    ids = (tokenizer.eos_id, tokenizer.end_of_turn_id, response_id)
    return tuple(token_id for token_id in ids if token_id is not None)
