"""Every metric of the server, under vLLM's names where vLLM has it and under `gemma_` where it has not.

Laws:
1. Labels come from closed sets: the served model's name, route templates, status codes, reasons listed here.
2. There is one series of each `vllm:` gauge (`engine="0"`): gateways that pick a replica read the newest one.
3. Text format 0.0.4 whatever the scraper accepts: OpenMetrics would turn `vllm:x` into `vllm_x`, and the
   dashboards, autoscalers and gateways that read vLLM's names would find nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from server import __version__
from server.batches.objects import FINAL_STATUSES, BatchStatus
from server.engine.types import FinishReason, StepStats
from server.frontend.client import EngineLoss, LossCause
from server.frontend.served_model import ServedModel
from server.histogram import TokenHistogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Buckets as vLLM has them, so that its dashboards' heat maps line up.
TIME_TO_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_LATENCY_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKEN_COUNT_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5) if m * 10**e <= 200_000)
ITERATION_TOKEN_BUCKETS = tuple(
    float(n) for n in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
)
N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RESTART_BUCKETS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)

LABELS = ("model_name", "engine")
ABORT_STAGES = ("before_first_token", "after_first_token")

REQUEST_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", TIME_TO_FIRST_TOKEN_BUCKETS),
    "inter_token_latency_seconds": ("From one token to the next.", TOKEN_LATENCY_BUCKETS),
    "request_time_per_output_token_seconds": (
        "Decode time per token after the first, of one sequence.",
        TOKEN_LATENCY_BUCKETS,
    ),
    "e2e_request_latency_seconds": ("From arrival to the last token.", REQUEST_LATENCY_BUCKETS),
    "request_queue_time_seconds": ("From arrival to the first batch.", REQUEST_LATENCY_BUCKETS),
    "request_prefill_time_seconds": ("From the first batch to the first token.", REQUEST_LATENCY_BUCKETS),
    "request_decode_time_seconds": ("From the first token to the last.", REQUEST_LATENCY_BUCKETS),
    "request_inference_time_seconds": ("From the first batch to the last token.", REQUEST_LATENCY_BUCKETS),
    "request_prompt_tokens": ("Prompt tokens of a sequence.", TOKEN_COUNT_BUCKETS),
    "request_generation_tokens": ("Tokens generated for a sequence.", TOKEN_COUNT_BUCKETS),
    "request_params_max_tokens": ("`max_tokens` of a sequence.", TOKEN_COUNT_BUCKETS),
    "request_params_n": ("`n` of a request.", N_BUCKETS),
}
"""What `RequestMetrics.observe` takes: name without `vllm:`, help, buckets."""


class Metrics:
    """The server's registry and what writes to it. Belongs to the event loop's thread.

    The series of a model exist from `set_model` on: before, nobody knows the name that labels them.
    """

    def __init__(self, engine_pid: Callable[[], int]) -> None:
        """`engine_pid`: the process that runs the model; asked at each scrape."""
        # A process-wide switch of the library: `_created` series would double the page for nobody.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        ProcessCollector("gemma_engine", engine_pid, registry=self.registry)
        self.http = HttpMetrics(self.registry)
        self.batches = BatchMetrics(self.registry)
        self.supervision = SupervisionMetrics(self.registry)
        self._model_loaded = Gauge(
            "gemma_model_loaded",
            "1 once the model is loaded and the engine has answered.",
            registry=self.registry,
        )
        self.draining = Gauge("gemma_draining", "1 once the server was told to end.", registry=self.registry)
        self.download_bytes = Counter(
            "gemma_model_download_bytes", "Bytes of the model that were downloaded.", registry=self.registry
        )
        self.newest_step = StepStats()
        """What the engine's newest step reported."""
        self._engine: EngineMetrics | None = None
        self._requests: RequestMetrics | None = None

    @property
    def requests(self) -> RequestMetrics:
        """There is no request without a model."""
        if self._requests is None:
            raise RuntimeError("no model is set")
        return self._requests

    def set_model(self, model: ServedModel, load_seconds: float, stage_seconds: Mapping[str, float]) -> None:
        """Called once, when the model is loaded; `load_seconds` since the server's start."""
        info, name, registry = model.info, model.names[0], self.registry
        self._engine = EngineMetrics(registry, name)
        self._requests = RequestMetrics(registry, name)
        self._model_loaded.set(1)
        Gauge(
            "gemma_model_load_seconds",
            "Seconds from the server's start to the loaded model.",
            registry=registry,
        ).set(load_seconds)
        stages = Gauge(
            "gemma_startup_seconds",
            "Seconds of each stage of the start; files and tokenizer are read beside the engine's import.",
            ("stage",),
            registry=registry,
        )
        for stage, seconds in stage_seconds.items():
            stages.labels(stage).set(seconds)
        Gauge(
            "gemma_build_info",
            "Always 1; the labels tell.",
            ("version", "torch", "device", "dtype", "quantization"),
            registry=registry,
        ).labels(__version__, version("torch"), info.device, info.dtype, info.quantization).set(1)
        Gauge(
            "vllm:cache_config_info",
            "Always 1; the labels tell how the KV cache is laid out.",
            (*LABELS, "block_size", "num_gpu_blocks"),
            registry=registry,
            # Of several pools the smallest: what fits into it fits into all.
        ).labels(name, "0", str(info.block_size), str(min(info.num_blocks.values(), default=0))).set(1)

    def record_step(self, stats: StepStats) -> None:
        """Called for every step of the engine. It makes none before `set_model`: nobody can ask for one."""
        self.newest_step = stats
        if self._engine is not None:
            self._engine.record(stats)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class EngineMetrics:
    """What the steps of the engine report."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, LABELS, registry=registry).labels(model_name, "0")

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, LABELS, registry=registry).labels(model_name, "0")

        self._running = gauge("num_requests_running", "Sequences in the running batch.")
        self._waiting = gauge(
            "num_requests_waiting", "Sequences that are accepted but in no batch, preempted ones included."
        )
        self._kv_usage = gauge(
            "kv_cache_usage_perc", "Share (0..1) of KV blocks that live sequences hold, in the fullest pool."
        )
        self._preemptions = counter("num_preemptions", "Times a sequence was put back to be recomputed.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._drafts = counter("spec_decode_num_drafts", "Guesses of a sequence's next tokens.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Guessed tokens.")
        self._accepted_tokens = counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right.")
        self._iteration_tokens = Histogram(
            "vllm:iteration_tokens_total",
            "Tokens computed in one step.",
            LABELS,
            buckets=ITERATION_TOKEN_BUCKETS,
            registry=registry,
        ).labels(model_name, "0")
        self._step_seconds = Histogram(
            "gemma_engine_step_seconds",
            "Seconds of one step of the engine.",
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._wait_seconds = Histogram(
            "gemma_engine_wait_seconds",
            "Seconds of one step in which the host had nothing to do but wait for the device.",
            buckets=STEP_BUCKETS,
            registry=registry,
        )

    def record(self, stats: StepStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(max(stats.kv_usage.values(), default=0.0))
        self._preemptions.inc(stats.num_preemptions)
        self._queries.inc(stats.prefix_cache_queries)
        self._hits.inc(stats.prefix_cache_hits)
        self._drafts.inc(stats.num_drafts)
        self._draft_tokens.inc(stats.num_draft_tokens)
        self._accepted_tokens.inc(stats.num_accepted_tokens)
        num_tokens = stats.num_prefill_tokens + stats.num_decode_tokens
        if num_tokens:
            self._iteration_tokens.observe(num_tokens)
            self._step_seconds.observe(stats.step_seconds)
            self._wait_seconds.observe(stats.wait_seconds)


class RequestMetrics:
    """What is observed of one sequence while and after it is generated. Times in seconds."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, LABELS, registry=registry).labels(model_name, "0")

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of sequences that began to generate.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        ended = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason.",
            (*LABELS, "finished_reason"),
            registry=registry,
        )
        self.timeouts = Counter(
            "gemma_requests_timed_out",
            "Requests whose answer was not begun or not complete in time.",
            registry=registry,
        )
        self._ended = {reason: ended.labels(model_name, "0", reason.value) for reason in FinishReason}
        aborted = Counter(
            "gemma_requests_aborted",
            "Sequences whose client left, or that a deadline ended: those that got no token yet, and others.",
            ("stage",),
            registry=registry,
        )
        self._aborted = {stage: aborted.labels(stage) for stage in ABORT_STAGES}
        labels = dict(zip(LABELS, (model_name, "0"), strict=True))
        self._histograms = {
            name: TokenHistogram(f"vllm:{name}", text, labels, buckets, registry)
            for name, (text, buckets) in REQUEST_HISTOGRAMS.items()
        }

    def observe(self, name: str, value: float, count: int = 1) -> None:
        """Add `count` equal values to the histogram `name` of REQUEST_HISTOGRAMS."""
        self._histograms[name].observe(value, count)

    def ended(self, reason: FinishReason) -> None:
        self._ended[reason].inc()

    def aborted(self, *, has_begun: bool) -> None:
        self._aborted[ABORT_STAGES[has_begun]].inc()


class HttpMetrics:
    """What the HTTP side counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "gemma_http_requests",
            "Requests answered, by route template (`unmatched` for none) and status; 499: the client left.",
            ("route", "code"),
            registry=registry,
        )
        self._rejected = Counter(
            "gemma_requests_rejected", "Requests refused for want of capacity.", ("reason",), registry=registry
        )
        for reason in (
            *("queue_full", "rate_limit_exceeded", "shutting_down"),
            *("model_loading", "engine_unavailable", "engine_lost", "engine_silent"),
        ):
            self._rejected.labels(reason)
        self.disconnects = Counter(
            "gemma_client_disconnects", "Clients that left before their answer was complete.", registry=registry
        )
        self.open_streams = Gauge("gemma_sse_open_streams", "Streams being sent.", registry=registry)

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def rejected(self, reason: str) -> None:
        """`reason` is the code of the error that was answered."""
        self._rejected.labels(reason).inc()


class SupervisionMetrics:
    """How often the engine was replaced, and what that cost."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._restarts = Counter(
            "gemma_engine_restarts",
            "Engines that ended and were replaced, by why they ended.",
            ("cause",),
            registry=registry,
        )
        for cause in LossCause:
            self._restarts.labels(cause.value)
        self._lost = Counter(
            "gemma_engine_sequences_lost", "Sequences that ended with an engine.", registry=registry
        )
        self._kept = Counter(
            "gemma_engine_sequences_rerun",
            "Sequences without an output that were handed from an engine that ended to the next one.",
            registry=registry,
        )
        self._seconds = Histogram(
            "gemma_engine_restart_seconds",
            "From an engine's end until the next one was ready.",
            buckets=RESTART_BUCKETS,
            registry=registry,
        )

    def lost(self, loss: EngineLoss) -> None:
        self._restarts.labels(loss.cause.value).inc()
        self._lost.inc(loss.num_lost)
        self._kept.inc(loss.num_kept)

    def returned(self, seconds: float) -> None:
        self._seconds.observe(seconds)


class BatchMetrics:
    """What becomes of batches and their lines."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.unfinished = Gauge("gemma_batches_unfinished", "Batches on their way.", registry=registry)
        self._ended = Counter(
            "gemma_batches_ended", "Batches, by their last status.", ("status",), registry=registry
        )
        for status in FINAL_STATUSES:
            self._ended.labels(status)
        self._answered = Counter(
            "gemma_batch_requests",
            "Requests of batches, by what became of them.",
            ("outcome",),
            registry=registry,
        )
        for outcome in ("completed", "failed"):
            self._answered.labels(outcome)
        self._files = Gauge("gemma_stored_files", "Files in the data directory.", registry=registry)
        self._bytes = Gauge(
            "gemma_stored_bytes", "Bytes of files and results in the data directory.", registry=registry
        )

    def ended(self, status: BatchStatus) -> None:
        self._ended.labels(status).inc()

    def answered(self, *, is_success: bool) -> None:
        self._answered.labels("completed" if is_success else "failed").inc()

    def stored(self, num_files: int, num_bytes: int) -> None:
        self._files.set(num_files)
        self._bytes.set(num_bytes)
