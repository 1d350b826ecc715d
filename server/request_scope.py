"""Which request the running code works for: what its log lines and its spans are filed under.

The scope is a context variable, so that it holds for the tasks that a request starts, and ends with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
"""The W3C's Trace Context; what a version after 00 adds comes behind another dash."""
_CLOUD_TRACE = re.compile(rb"([0-9a-f]{32})(?:/([0-9]{1,20}))?(?:;o=([0-9]))?")
"""X-Cloud-Trace-Context, which Google's load balancers add: TRACE_ID/SPAN_ID;o=OPTIONS, the span in decimal."""


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The span of the client's trace that the request belongs to."""

    trace_id: str
    """32 hexadecimal digits, not all of them 0."""
    span_id: str
    """16 hexadecimal digits, not all of them 0; empty if the client names none."""
    is_sampled: bool


@dataclass(frozen=True, slots=True)
class RequestScope:
    request_id: str
    """The client's own, if it is short and plain: see `RequestContextMiddleware`."""
    trace_parent: TraceParent | None = None


request_scope: ContextVar[RequestScope | None] = ContextVar("request_scope", default=None)


def trace_parent(headers: Iterable[tuple[bytes, bytes]]) -> TraceParent | None:
    """What the headers (names in lower case) say, `traceparent` first; None if that is nothing, or nonsense."""
    found = [(name, value) for name, value in headers if name in (b"traceparent", b"x-cloud-trace-context")]
    for wanted, read in ((b"traceparent", _read_traceparent), (b"x-cloud-trace-context", _read_cloud_trace)):
        values = [value for name, value in found if name == wanted]
        if len(values) == 1 and (parent := read(values[0])) is not None:
            return parent
    return None


def _read_traceparent(value: bytes) -> TraceParent | None:
    match = _TRACEPARENT.fullmatch(value.strip())
    if match is None or (value.startswith(b"00-") and match.end(3) != match.end()):
        return None
    trace_id, span_id, flags = (part.decode() for part in match.groups())
    if int(trace_id, 16) == 0 or int(span_id, 16) == 0:
        return None
    return TraceParent(trace_id, span_id, bool(int(flags, 16) & 1))


def _read_cloud_trace(value: bytes) -> TraceParent | None:
    match = _CLOUD_TRACE.fullmatch(value.strip().lower())
    if match is None:
        return None
    trace_id, span, options = match.groups(default=b"0")
    if int(trace_id, 16) == 0 or int(span) >= 1 << 64:
        return None
    return TraceParent(trace_id.decode(), f"{int(span):016x}" if int(span) else "", options == b"1")
