"""By which names the server can be asked, and from which web pages."""

from __future__ import annotations

import http.client

import pytest

from server.api.hosts import HostMiddleware
from tests.api.support import LiveServer, assert_error, live_server


async def no_app(*_: object) -> None: ...


@pytest.mark.covers("H14")
@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.", "app.localhost", "127.0.0.1", "127.0.0.1:80", "[::1]:8000"],
)
@pytest.mark.parametrize("bound_to", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_addresses_and_localhost_always_pass(host: str, bound_to: str) -> None:
    assert HostMiddleware(no_app, bound_to, ()).allows(host)
    assert HostMiddleware(no_app, bound_to, ("example.com",)).allows(host)


@pytest.mark.covers("H14")
@pytest.mark.parametrize("host", ["10.1.2.3:8000", "[2001:db8::1]"])
def test_probes_that_use_another_address_pass(host: str) -> None:
    assert HostMiddleware(no_app, "127.0.0.1", ()).allows(host)


@pytest.mark.covers("H14")
@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "notlocalhost", "127.0.0.1.evil.example"]
)
def test_names_pass_unless_the_server_is_on_loopback_or_was_given_some(host: str) -> None:
    assert HostMiddleware(no_app, "0.0.0.0", ()).allows(host)
    assert HostMiddleware(no_app, "10.0.0.1", ()).allows(host)
    assert not HostMiddleware(no_app, "127.0.0.1", ()).allows(host)
    assert not HostMiddleware(no_app, "0.0.0.0", ("example.com",)).allows(host)
    assert HostMiddleware(no_app, "127.0.0.1", ("*",)).allows(host)


def test_names_under_a_given_one_pass_where_a_star_says_so() -> None:
    hosts = HostMiddleware(no_app, "127.0.0.1", ("*.Example.com", "model.test"))
    assert hosts.allows("a.example.com")
    assert hosts.allows("Model.test:443")
    assert not hosts.allows("example.com")
    assert not hosts.allows("badexample.com")
    assert not hosts.allows("a.model.test")


@pytest.mark.covers("H14")
@pytest.mark.parametrize(
    "host", ["x/health?", "a@b", "localhost/livez", "", "a b", "localhost:80:80", "[::1", "é"]
)
@pytest.mark.parametrize("bound_to", ["127.0.0.1", "0.0.0.0"])
def test_what_is_no_name_never_passes(host: str, bound_to: str) -> None:
    assert not HostMiddleware(no_app, bound_to, ("*",)).allows(host)


@pytest.mark.covers("H14")
def test_a_name_that_is_not_the_server_s_is_refused_with_a_reason(server: LiveServer) -> None:
    response = server.http.post("/v1/completions", json={"prompt": "a"}, headers={"host": "evil.example"})
    message = assert_error(response, 400, code="host_not_allowed")
    assert "evil.example" in message
    assert "--allowed-hosts" in message
    assert not server.engine.submitted


def test_a_probe_in_http_1_0_needs_no_host(server: LiveServer) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.covers("H14", "R10")
@pytest.mark.parametrize(
    "target", ["http://localhost/livez/../v1/models", "http://evil.example/livez", "*", "http://x/v1/models"]
)
def test_a_request_for_a_whole_url_opens_no_other_path(target: str) -> None:
    with live_server(api_key=["key"]) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", target)
        assert connection.getresponse().status == 401
        connection.close()


@pytest.mark.covers("H13")
def test_pages_get_no_leave_unless_they_were_given_it() -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with live_server(allowed_origins=["https://chat.example"], api_key=["key"]) as server:
        allowed = {"origin": "https://chat.example"}
        answer = server.http.options("/v1/chat/completions", headers={**ask, **allowed})
        assert answer.status_code == 200  # without a key, which browsers do not send yet
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-credentials" not in answer.headers
        answer = server.http.get("/v1/models", headers={**allowed, "authorization": "Bearer key"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert server.http.get("/v1/models", headers=allowed).status_code == 401

        other = {"origin": "https://evil.example"}
        assert server.http.options("/v1/chat/completions", headers={**ask, **other}).status_code == 400
        answer = server.http.get("/v1/models", headers={**other, "authorization": "Bearer key"})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.covers("H13")
def test_all_pages_may_be_given_leave_without_credentials() -> None:
    with live_server(allowed_origins=["*"]) as server:
        answer = server.http.get("/v1/models", headers={"origin": "https://any.example", "cookie": "a=b"})
        assert answer.headers["access-control-allow-origin"] in ("*", "https://any.example")
        assert "access-control-allow-credentials" not in answer.headers
