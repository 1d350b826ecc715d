"""Traces, as a collector gets them: one that listens, one that is not there, and one that never answers."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server import tracing
from server.config import OptionError
from server.tracing import RequestTracer
from tests.api.support import MODEL, Script, live_server, wait_until
from tests.api.test_streaming import send_request

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes OTLP over HTTP, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, object] = {}
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def take(self, path: str, body: bytes) -> None:
        self.paths.append(path)
        if path != "/v1/traces":
            return
        self.bodies.append(body)
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            self.resource |= {each.key: plain(each.value) for each in group.resource.attributes}
            for scope in group.scope_spans:
                self.spans += scope.spans

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def one(self, name: str) -> Span:
        (span,) = [span for span in self.spans if span.name == name]
        return span


def plain(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    assert kind is not None
    if kind == "array_value":
        return [plain(each) for each in value.array_value.values]
    found: object = getattr(value, kind)
    return found


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: plain(each.value) for each in span.attributes}


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    names = ("OtelBatchSpanRecordProcessor", tracing.ENDING_THREAD)
    wait_until(lambda: not any(thread.name in names for thread in threading.enumerate()))


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_request_is_a_span_with_its_stages_below(collector: Collector) -> None:
    before = time.time_ns()
    with live_server(tracer=RequestTracer(collector.url)) as server:
        server.script.text, server.script.delay, server.script.cached_tokens = "abc", 0.01, 1
        body = {"prompt": "ab us", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9}
        headers = {"x-request-id": "mine", "traceparent": f"00-{TRACE}-{SPAN}-01"}
        usage = server.http.post("/v1/completions", json=body, headers=headers).json()["usage"]
    root = collector.one("llm_request")
    assert root.trace_id.hex() == TRACE
    assert root.parent_span_id.hex() == SPAN
    assert root.kind == Span.SPAN_KIND_SERVER
    assert before <= root.start_time_unix_nano <= root.end_time_unix_nano <= time.time_ns()
    stages = [collector.one(name) for name in ("queue", "prefill", "decode")]
    for stage in stages:
        assert (stage.trace_id, stage.parent_span_id) == (root.trace_id, root.span_id)
    assert stages[0].start_time_unix_nano == root.start_time_unix_nano
    assert stages[0].end_time_unix_nano == stages[1].start_time_unix_nano
    assert stages[1].end_time_unix_nano == stages[2].start_time_unix_nano
    assert stages[2].end_time_unix_nano == root.end_time_unix_nano
    assert seconds(stages[1]) >= 0.01
    assert seconds(stages[2]) >= 0.01
    found = attributes(root)
    latencies = {name: found.pop(name) for name in list(found) if name.startswith("gen_ai.latency.")}
    assert found == {
        "gen_ai.request.id": "mine",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 0,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": usage["completion_tokens"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 1,
    }
    queue, prefill, decode = map(seconds, stages)
    for name, expected in {
        "time_in_queue": queue,
        "time_to_first_token": queue + prefill,
        "time_in_model_prefill": prefill,
        "time_in_model_decode": decode,
        "time_in_model_inference": prefill + decode,
        "e2e": queue + prefill + decode,
    }.items():
        assert latencies.pop(f"gen_ai.latency.{name}") == pytest.approx(expected, abs=1e-6), name
    assert latencies == {}
    assert collector.resource["service.name"] == "gemma-server"


def test_each_choice_has_its_stages_and_without_a_parent_there_is_a_trace_for_each_request(
    collector: Collector,
) -> None:
    with live_server(tracer=RequestTracer(collector.url)) as server:
        server.complete(n=3)
        assert server.chat(stream=True).status_code == 200
    roots = [span for span in collector.spans if span.name == "llm_request"]
    assert len({root.trace_id for root in roots}) == 2
    assert {root.parent_span_id for root in roots} == {b""}
    assert {attributes(root)["gen_ai.request.n"] for root in roots} == {1, 3}
    decodes = [span for span in collector.spans if span.name == "decode"]
    of_three = [
        attributes(span)["gen_ai.choice.index"] for span in decodes if span.trace_id == roots[0].trace_id
    ]
    assert sorted(of_three) == [0, 1, 2]


def test_a_client_s_wish_not_to_be_traced_is_kept(collector: Collector) -> None:
    with live_server(tracer=RequestTracer(collector.url)) as server:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
        server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert collector.spans == []


def test_failures_and_clients_that_leave_are_spans_too(collector: Collector) -> None:
    with live_server(tracer=RequestTracer(collector.url)) as server:
        server.script.error_after = 1
        server.complete()
        server.engine.script = Script(delay=0.05, ends_with_stop=False)
        sock = send_request(server, stream=True)
        assert b"data: " in sock.recv(4096) + sock.recv(4096)
        sock.close()
        server.assert_idle()
        server.script.delay = 30
        sock = send_request(server)
        wait_until(lambda: len(server.engine.running) == 1)
        sock.close()
        server.assert_idle()
    failed, left, never_begun = [span for span in collector.spans if span.name == "llm_request"]
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert failed.status.message == ""
    for span, reason in ((failed, "error"), (left, "abort"), (never_begun, "abort")):
        assert attributes(span)["gen_ai.response.finish_reasons"] == [reason]
    assert attributes(left)["gen_ai.usage.completion_tokens"] >= 1
    assert "gen_ai.latency.time_to_first_token" not in attributes(never_begun)
    children = [span.name for span in collector.spans if span.parent_span_id == never_begun.span_id]
    assert children == ["queue"]


@pytest.mark.covers("S14", "S24")
def test_a_span_holds_no_text(collector: Collector) -> None:
    with live_server(tracer=RequestTracer(collector.url), api_key=["CANARY-KEY"], max_model_len=999) as server:
        server.http.headers["authorization"] = "Bearer CANARY-KEY"
        server.script.text = "OUTPUTCANARY"
        server.chat("CANARY", user="CANARY", stop=["CANARY"], metadata={"a": "CANARY"}, cache_salt="CANARY")
        server.chat("CANARY", response_format={"type": "json_schema", "json_schema": {"name": "CANARY"}})
    assert len(collector.spans) >= 4
    assert not any(b"CANARY" in body for body in collector.bodies)


@pytest.mark.covers("S14")
def test_the_environment_alone_has_nothing_sent(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    # The web framework would follow it, and send the words of exceptions along.
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.removesuffix("/v1/traces"))
    with live_server() as server:
        server.script.crash_after = 0
        assert server.complete().status_code == 500
    assert collector.paths == []


def test_a_collector_that_is_not_there_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "EXPORT_SECONDS", 0.3)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        tracer = RequestTracer(f"http://127.0.0.1:{unused.getsockname()[1]}/v1/traces")
        with live_server(tracer=tracer) as server:
            for _ in range(3):
                assert server.complete().status_code == 200
            started = time.monotonic()
        assert time.monotonic() - started < 4


def test_a_collector_that_never_answers_holds_up_neither_requests_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "EXPORT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer = RequestTracer(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        with live_server(tracer=tracer) as server:
            started = time.monotonic()
            for _ in range(3):
                assert server.complete().status_code == 200
            assert time.monotonic() - started < 2
            started = time.monotonic()
        assert time.monotonic() - started < 4


def test_without_its_packages_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(OptionError, match=r"gemma-server\[otel\]"):
        RequestTracer("http://127.0.0.1:1/v1/traces")
