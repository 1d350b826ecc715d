from __future__ import annotations

import os
import random
import re

import httpx
import pytest

from server.app import create_app
from server.engine.types import Loading, StepStats
from server.frontend.client import EngineLoss, LossCause
from server.metrics import REQUEST_HISTOGRAMS
from server.options import ServerConfig
from server.runtime import Phase
from tests.api.support import (
    FakeEngineClient,
    LiveServer,
    ScriptedRuntime,
    assert_error,
    live_server,
    make_info,
    wait_until,
)
from tests.api.test_streaming import send_request

LABELS = '{engine="0",model_name="google/gemma-tiny"}'


def statuses(server: LiveServer) -> dict[str, int]:
    paths = ("/livez", "/startupz", "/readyz", "/health")
    return {path: server.http.get(path).status_code for path in paths}


@pytest.mark.covers("L05")
def test_probes_tell_loading_from_ready_from_dead() -> None:
    with live_server(loaded=False) as server:
        server.runtime.stage, server.runtime.fraction = "weights", 0.25
        assert statuses(server) == {"/livez": 200, "/startupz": 503, "/readyz": 503, "/health": 503}
        response = server.http.get("/startupz")
        assert response.json() == {"status": "starting", "stage": "weights", "fraction": 0.25}
        assert int(response.headers["retry-after"]) > 0

        server.runtime.load()
        assert statuses(server) == {"/livez": 200, "/startupz": 200, "/readyz": 200, "/health": 200}

        server.runtime.phase, server.runtime.stage = Phase.FAILED, "engine died at /secret/path"
        assert statuses(server) == {"/livez": 503, "/startupz": 200, "/readyz": 503, "/health": 503}
        assert server.http.get("/readyz").json() == {"status": "failed"}
        assert_error(server.chat(), 503, code="engine_unavailable")


def test_head_asks_what_get_asks_and_is_answered_without_a_body() -> None:
    health_route = "/of/the/platform"
    with live_server(loaded=False, health_route=health_route) as server:
        for load in (lambda: None, server.runtime.load):
            load()
            for path in ("/livez", "/startupz", "/readyz", "/health", "/ping", health_route):
                head, get = server.http.head(path), server.http.get(path)
                assert (head.status_code, head.content) == (get.status_code, b""), path
                assert head.headers["content-type"] == get.headers["content-type"]
                assert head.headers.get("retry-after") == get.headers.get("retry-after")


@pytest.mark.covers("E01")
def test_while_the_engine_is_restarted_new_work_is_told_to_come_back() -> None:
    with live_server() as server:
        server.runtime.client.on_loss(EngineLoss(LossCause.ENDED, "signal 9 at /secret/path", 3, 2))
        assert statuses(server) == {"/livez": 200, "/startupz": 200, "/readyz": 503, "/health": 503}
        server.runtime.client.on_loading(Loading("weights", 0.25))
        assert server.http.get("/readyz").json() == {
            "status": "restarting",
            "stage": "weights",
            "fraction": 0.25,
        }
        for response in (server.chat(), server.chat(stream=True), server.complete()):
            assert_error(response, 503, code="engine_unavailable")
            assert int(response.headers["retry-after"]) > 0
        assert server.http.get("/v1/models").status_code == 200
        assert server.http.post("/tokenize", json={"prompt": "a"}).status_code == 200
        server.runtime.client.on_return(make_info())
        assert statuses(server) == {"/livez": 200, "/startupz": 200, "/readyz": 200, "/health": 200}
        assert server.chat().status_code == 200
        assert server.metric('gemma_engine_restarts_total{cause="ended"}') == 1
        assert server.metric('gemma_engine_restarts_total{cause="silent"}') == 0
        assert server.metric("gemma_engine_sequences_lost_total") == 3
        assert server.metric("gemma_engine_sequences_rerun_total") == 2
        assert server.metric("gemma_engine_restart_seconds_count") == 1
        server.assert_idle()


@pytest.mark.covers("E03")
def test_a_silent_engine_is_not_ready_and_nothing_is_ended_for_it() -> None:
    with live_server() as server:
        server.runtime.client.on_silence(True)
        assert statuses(server) == {"/livez": 200, "/startupz": 200, "/readyz": 503, "/health": 503}
        assert server.http.get("/readyz").json() == {"status": "unresponsive"}
        assert server.chat().status_code == 200
        server.runtime.client.on_silence(False)
        assert server.http.get("/readyz").json() == {"status": "ready"}


def test_a_server_that_failed_to_load_has_not_started() -> None:
    with live_server(loaded=False) as server:
        server.runtime.phase = Phase.FAILED
        assert statuses(server) == {"/livez": 503, "/startupz": 503, "/readyz": 503, "/health": 503}


def test_requests_that_come_while_the_model_loads_are_told_to_come_back() -> None:
    with live_server(loaded=False) as server:
        server.runtime.stage, server.runtime.fraction = "weights", 0.25
        for response in (
            server.chat(),
            server.chat(stream=True),
            server.complete(),
            server.http.get("/v1/models"),
            server.http.get("/v1/models/x"),
            server.http.post("/tokenize", json={"prompt": "a"}),
            server.http.post("/detokenize", json={"tokens": []}),
        ):
            message = assert_error(response, 503, code="model_loading")
            assert "weights" in message
            assert "25%" in message
            assert int(response.headers["retry-after"]) > 0
        assert server.metric('gemma_requests_rejected_total{reason="model_loading"}') == 7
        assert server.metric("gemma_model_loaded") == 0


def test_version_is_told(server: LiveServer) -> None:
    assert set(server.http.get("/version").json()) == {"version"}


def test_metrics_are_plain_text_whatever_is_asked_for(server: LiveServer) -> None:
    for accept in ("*/*", "application/openmetrics-text; version=1.0.0", "application/json"):
        response = server.http.get("/metrics", headers={"accept": accept})
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert f"vllm:num_requests_waiting{LABELS}" in response.text
        assert "vllm_" not in response.text
        assert "# EOF" not in response.text


def test_there_is_one_series_of_each_gauge(server: LiveServer) -> None:
    text = server.http.get("/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"):
        series = [line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
        assert len(series) == 1
    assert server.metric(
        'vllm:cache_config_info{block_size="16",engine="0",model_name="google/gemma-tiny",num_gpu_blocks="20"}'
    )


def test_a_step_is_recorded() -> None:
    with live_server() as server:
        for _ in range(2):
            server.runtime.client.on_step(
                StepStats(
                    num_running=3,
                    num_waiting=5,
                    kv_usage={"full": 0.25, "sliding": 0.5},
                    num_preemptions=1,
                    prefix_cache_queries=10,
                    prefix_cache_hits=4,
                    num_drafts=1,
                    num_draft_tokens=3,
                    num_accepted_tokens=2,
                    num_prefill_tokens=6,
                    num_decode_tokens=2,
                    step_seconds=0.25,
                    wait_seconds=0.125,
                )
            )
        assert server.metric(f"vllm:num_requests_running{LABELS}") == 3
        assert server.metric(f"vllm:num_requests_waiting{LABELS}") == 5
        assert server.metric(f"vllm:kv_cache_usage_perc{LABELS}") == 0.5
        assert server.metric(f"vllm:num_preemptions_total{LABELS}") == 2
        assert server.metric(f"vllm:prefix_cache_queries_total{LABELS}") == 20
        assert server.metric(f"vllm:prefix_cache_hits_total{LABELS}") == 8
        assert server.metric(f"vllm:spec_decode_num_drafts_total{LABELS}") == 2
        assert server.metric(f"vllm:spec_decode_num_draft_tokens_total{LABELS}") == 6
        assert server.metric(f"vllm:spec_decode_num_accepted_tokens_total{LABELS}") == 4
        assert server.metric(f"vllm:iteration_tokens_total_sum{LABELS}") == 16
        assert server.metric("gemma_engine_step_seconds_sum") == 0.5
        assert server.metric("gemma_engine_wait_seconds_sum") == 0.25
        assert server.metric("gemma_engine_wait_seconds_count") == 2


def test_a_request_is_observed() -> None:
    with live_server() as server:
        server.script.text, server.script.delay = "ab c", 0.01
        body = server.complete("ab us", n=2, max_tokens=9).json()
        num_prompt = body["usage"]["prompt_tokens"]
        num_output = body["usage"]["completion_tokens"]
        assert server.metric(f"vllm:prompt_tokens_total{LABELS}") == 2 * num_prompt
        assert server.metric(f"vllm:generation_tokens_total{LABELS}") == num_output
        stopped = '{engine="0",finished_reason="stop",model_name="google/gemma-tiny"}'
        assert server.metric(f"vllm:request_success_total{stopped}") == 2
        for name in REQUEST_HISTOGRAMS:
            count = server.metric(f"vllm:{name}_count{LABELS}")
            expected = {"request_params_n": 1, "inter_token_latency_seconds": num_output - 2}.get(name, 2)
            assert count == expected, name
        assert server.metric(f"vllm:request_prompt_tokens_sum{LABELS}") == 2 * num_prompt
        assert server.metric(f"vllm:request_params_max_tokens_sum{LABELS}") == 18
        e2e = server.metric(f"vllm:e2e_request_latency_seconds_sum{LABELS}")
        queue = server.metric(f"vllm:request_queue_time_seconds_sum{LABELS}")
        inference = server.metric(f"vllm:request_inference_time_seconds_sum{LABELS}")
        first = server.metric(f"vllm:time_to_first_token_seconds_sum{LABELS}")
        assert 0.02 < first < e2e
        assert abs(queue + inference - e2e) < 1e-6


@pytest.mark.covers("S15")
def test_http_metrics_are_labelled_by_route_template_only() -> None:
    with live_server() as server:
        server.chat()
        server.complete(n=0)
        for number in range(50):
            server.http.get(f"/scan{number}")
            server.http.get(f"/v1/models/m{number}")
            server.chat(model=f"m{number}", user=f"u{number}")
            server.http.get("/version", headers={"x-request-id": f"r{number}"})
        text = server.http.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("gemma_http_requests_total{")]
        series = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        assert series == {
            'gemma_http_requests_total{code="200",route="/v1/chat/completions"}': 1,
            'gemma_http_requests_total{code="404",route="/v1/chat/completions"}': 50,
            'gemma_http_requests_total{code="400",route="/v1/completions"}': 1,
            'gemma_http_requests_total{code="404",route="/v1/models/{model_id:path}"}': 50,
            'gemma_http_requests_total{code="404",route="unmatched"}': 50,
            'gemma_http_requests_total{code="200",route="/version"}': 50,
        }


def series_names(text: str) -> set[str]:
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


@pytest.mark.slow
@pytest.mark.covers("S15", "S24")
async def test_ten_thousand_strangers_add_no_series() -> None:
    runtime = ScriptedRuntime(ServerConfig(), FakeEngineClient())
    runtime.load()
    chance = random.Random(1)

    def anything() -> str:
        return "".join(chance.choice("abcdefghijkmnpqrstuvwxyz0123456789") for _ in range(12))

    async def one_of_each(client: httpx.AsyncClient) -> None:
        headers = {"x-request-id": anything(), "user-agent": anything(), "traceparent": anything()}
        body = {
            "prompt": "ab",
            "user": anything(),
            "metadata": {anything(): anything()},
            anything(): anything(),
        }
        await client.get(f"/{anything()}/{anything()}?{anything()}={anything()}", headers=headers)
        await client.get(f"/v1/models/{anything()}", headers=headers)
        await client.post("/v1/completions", json={**body, "model": anything()}, headers=headers)
        await client.post("/v1/completions", json=body, headers=headers)
        await client.request(anything().upper(), f"/{anything()}", headers=headers)

    transport = httpx.ASGITransport(create_app(runtime))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        await one_of_each(client)
        await client.get("/metrics")
        before = series_names((await client.get("/metrics")).text)
        for _ in range(2000):
            await one_of_each(client)
        assert series_names((await client.get("/metrics")).text) == before


def test_sequences_that_are_given_up_are_counted_by_how_far_they_came() -> None:
    with live_server() as server:
        server.script.ends_with_stop, server.script.delay = False, 0.01
        sock = send_request(server, stream=True, n=2)
        assert b"data: " in sock.recv(4096) + sock.recv(4096)
        wait_until(lambda: server.metric(f"vllm:generation_tokens_total{LABELS}") >= 4)
        sock.close()
        server.assert_idle()
        server.script.delay = 30
        sock = send_request(server)
        wait_until(lambda: len(server.engine.running) == 1)
        sock.close()
        server.assert_idle()
        assert server.metric('gemma_requests_aborted_total{stage="after_first_token"}') == 2
        assert server.metric('gemma_requests_aborted_total{stage="before_first_token"}') == 1
        server.script.delay, server.script.ends_with_stop = 0, True
        server.complete(stop=["b"])
        assert server.metric('gemma_requests_aborted_total{stage="after_first_token"}') == 2


def test_what_each_process_takes_is_told(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("resident_memory_bytes", "open_fds", "max_fds", "cpu_seconds_total", "start_time_seconds")
    for name in names:
        assert server.metric(f"process_{name}") > 0
        assert server.metric(f"gemma_engine_process_{name}") > 0
    monkeypatch.setattr(server.engine, "pid", os.getppid())
    assert server.metric("gemma_engine_process_start_time_seconds") <= server.metric(
        "process_start_time_seconds"
    )
    monkeypatch.setattr(server.engine, "pid", 1 << 30)  # one that has ended
    assert "gemma_engine_process" not in server.http.get("/metrics").text


WANTED = """
vllm:num_requests_waiting vllm:num_requests_running vllm:kv_cache_usage_perc vllm:cache_config_info
vllm:prompt_tokens_total vllm:generation_tokens_total vllm:num_preemptions_total
vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:request_success_total
vllm:time_to_first_token_seconds vllm:inter_token_latency_seconds vllm:request_time_per_output_token_seconds
vllm:e2e_request_latency_seconds vllm:request_queue_time_seconds vllm:request_inference_time_seconds
vllm:request_prefill_time_seconds vllm:request_decode_time_seconds vllm:request_prompt_tokens
vllm:request_generation_tokens vllm:request_params_max_tokens vllm:iteration_tokens_total
gemma_http_requests_total gemma_requests_rejected_total gemma_requests_aborted_total gemma_model_loaded
gemma_model_load_seconds gemma_startup_seconds gemma_engine_step_seconds gemma_engine_wait_seconds
gemma_client_disconnects_total gemma_sse_open_streams gemma_build_info process_start_time_seconds
process_resident_memory_bytes process_open_fds
"""
"""What dashboards, autoscalers, gateways and alerts ask for."""


def test_the_names_that_others_ask_for_are_there(server: LiveServer) -> None:
    server.complete()
    families = set(re.findall(r"^# TYPE (\S+) ", server.http.get("/metrics").text, re.MULTILINE))
    assert set(WANTED.split()) <= families


def test_build_and_load_are_told(server: LiveServer) -> None:
    text = server.http.get("/metrics").text
    assert 'gemma_build_info{device="cpu",dtype="float32",quantization="none",torch="' in text
    assert server.metric("gemma_model_loaded") == 1
    assert server.metric("gemma_model_load_seconds") == 1.5
    assert 'gemma_startup_seconds{stage="weights"} 0.5' in text
    assert server.metric("process_start_time_seconds") > 0
    assert "_created" not in text
