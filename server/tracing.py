"""Spans of requests for an OpenTelemetry collector, with vLLM's names and attributes.

Laws:
1. A request's spans are made when it is over, of clock readings that there are anyway.
2. Nobody waits for the collector. What it does not take is dropped, and a warning in the log says so.
3. A span holds ids, counts, times and parameters; no text.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from server import __version__
from server.config import OptionError
from server.engine.types import FinishReason
from server.frontend.records import RequestRecord, SequenceRecord
from server.request_scope import RequestScope

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

SERVICE_NAME = "gemma-server"
ENDING_THREAD = "traces-end"
EXPORT_SECONDS = 5.0
"""For one delivery to the collector, retries included."""


class RequestTracer:
    def __init__(self, endpoint: str) -> None:
        """`endpoint`: URL that takes OTLP's protobuf over HTTP. The exporter's other settings are the usual
        OTEL_ environment variables. Raises OptionError."""
        # A third of a second, and not installed everywhere: for those alone who ask for traces.
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise OptionError(
                "--otlp-traces-endpoint needs OpenTelemetry's packages: pip install 'gemma-server[otel]' "
                f"({error})"
            ) from None
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE_NAME)})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS))
        )
        self._tracer = self._provider.get_tracer(SERVICE_NAME, __version__)
        self._trace = trace

    def record(self, model: str, scope: RequestScope | None, request: RequestRecord) -> None:
        """The spans of a request that is over. `scope` names the client's span, if there is one."""
        trace = self._trace
        to_wall_clock = time.time_ns() - time.monotonic_ns()

        def nanoseconds(at: float) -> int:
            return int(at * 1e9) + to_wall_clock

        def child(name: str, start: float, end: float, attributes: dict[str, AttributeValue]) -> None:
            span = self._tracer.start_span(
                name, context=parent, start_time=nanoseconds(start), attributes=attributes
            )
            span.end(nanoseconds(end))

        root = self._tracer.start_span(
            "llm_request",
            context=self._client_context(scope),
            kind=trace.SpanKind.SERVER,
            start_time=nanoseconds(request.arrival),
            attributes=_attributes(model, request),
        )
        parent = trace.set_span_in_context(root)
        for index, sequence in enumerate(request.sequences):
            attributes: dict[str, AttributeValue] = {"gen_ai.choice.index": index}
            scheduled_at = sequence.scheduled_at or sequence.first_token_at
            child("queue", request.arrival, scheduled_at or sequence.ended_at, attributes)
            if sequence.first_token_at:
                child("prefill", scheduled_at, sequence.first_token_at, attributes)
                child("decode", sequence.first_token_at, sequence.ended_at, attributes)
        if any(sequence.finish_reason is FinishReason.ERROR for sequence in request.sequences):
            root.set_status(trace.StatusCode.ERROR)
        root.end(nanoseconds(max(sequence.ended_at for sequence in request.sequences)))

    def close(self) -> None:
        """Deliver what is left, in EXPORT_SECONDS or not at all. Blocks."""
        # Which alone may take half a minute.
        ending = threading.Thread(target=self._provider.shutdown, name=ENDING_THREAD, daemon=True)
        ending.start()
        ending.join(EXPORT_SECONDS)

    def _client_context(self, scope: RequestScope | None) -> Context | None:
        parent = scope.trace_parent if scope is not None else None
        if parent is None or not parent.span_id:
            return None
        trace = self._trace
        span_context = trace.SpanContext(
            int(parent.trace_id, 16),
            int(parent.span_id, 16),
            is_remote=True,
            trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.is_sampled else 0),
        )
        context: Context = trace.set_span_in_context(trace.NonRecordingSpan(span_context))
        return context


def _attributes(model: str, request: RequestRecord) -> dict[str, AttributeValue]:
    sequences, usage = request.sequences, request.usage
    params = sequences[0].params
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.n": len(sequences),
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.response.finish_reasons": [sequence.finish_reason.value for sequence in sequences],
        # vLLM's names, and those of the semantic conventions that came after them.
        "gen_ai.usage.num_sequences": len(sequences),
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.latency.e2e": max(sequence.ended_at for sequence in sequences) - request.arrival,
    }
    begun = [sequence for sequence in sequences if sequence.first_token_at]
    if begun:
        attributes |= _latencies(begun, request.arrival)
    return attributes


def _latencies(begun: list[SequenceRecord], arrival: float) -> dict[str, AttributeValue]:
    """In seconds; of several sequences, from the first that is so far to the last that is done."""
    first_token_at = min(sequence.first_token_at for sequence in begun)
    scheduled_at = min(sequence.scheduled_at or sequence.first_token_at for sequence in begun)
    ended_at = max(sequence.ended_at for sequence in begun)
    return {
        "gen_ai.latency.time_in_queue": scheduled_at - arrival,
        "gen_ai.latency.time_to_first_token": first_token_at - arrival,
        "gen_ai.latency.time_in_model_prefill": first_token_at - scheduled_at,
        "gen_ai.latency.time_in_model_decode": ended_at - first_token_at,
        "gen_ai.latency.time_in_model_inference": ended_at - scheduled_at,
    }
