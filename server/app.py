"""The HTTP application: what is put together, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from server import __version__
from server.api import (
    batches,
    chat,
    completions,
    debug,
    error_handlers,
    files,
    health,
    models,
    moderations,
    openapi,
    prometheus,
    render,
    tokenize,
    vertex,
)
from server.api.anthropic import routes as anthropic
from server.api.auth import OPEN_PATHS, ApiKeyMiddleware
from server.api.dispatch import RouteRequests
from server.api.hosts import HostMiddleware
from server.api.inner import InnerRoutes
from server.api.middleware import RequestContextMiddleware
from server.api.openai_responses import routes as openai_responses
from server.api_keys import KeyRing
from server.batches.lines import LINE_OVERHEAD_BYTES
from server.batches.runner import BatchRunner
from server.batches.store import Store
from server.frontend.accounts import Accounts
from server.frontend.admission import Admission
from server.moderation import BUILT_IN_POLICIES, Policy
from server.runtime import Runtime
from server.tracing import RequestTracer

BATCH_ROUTERS = (chat.router, completions.router, openai_responses.router, moderations.router)
"""What the lines of a batch may ask for, too."""
OTHER_ROUTERS = (
    anthropic.router,
    models.router,
    tokenize.router,
    render.router,
    files.router,
    batches.router,
    health.router,
    debug.router,
    prometheus.router,
)


def create_app(
    runtime: Runtime,
    store: Store | None = None,
    policies: Sequence[Policy] = BUILT_IN_POLICIES,
    *,
    keys: KeyRing | None = None,
    tracer: RequestTracer | None = None,
) -> FastAPI:
    """`policies` are those of moderations. Without a `store`, files and batches are off; it is closed with the
    application, and so is the `tracer`. `keys` are the configuration's if not given: raises OptionError."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        runner: BatchRunner | None = app.state.batches
        await runtime.start()
        if runner is not None:
            await runner.start()
        try:
            yield
        finally:
            if runner is not None:
                await runner.stop()
                await runner.store.close()
            await runtime.stop()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="gemma-server",
        version=__version__,
        description="OpenAI's API for Google's Gemma models.",
        lifespan=lifespan,
        redirect_slashes=False,
        # FastAPI's own, which would send exceptions with their words, and so with clients', to whatever
        # collector the environment names.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.runtime = runtime
    app.state.policies = policies
    app.state.tracer = tracer
    config = runtime.config
    app.state.keys = KeyRing(config) if keys is None else keys
    app.state.accounts = Accounts()
    app.state.admission = Admission(config.max_queued_requests, config.max_queued_tokens)
    # The last one added is the outermost.
    app.add_middleware(HostMiddleware, bound_to=config.host, allowed=config.allowed_hosts)
    others = {config.predict_route, *_paths_of((*BATCH_ROUTERS, *OTHER_ROUTERS))}
    app.add_middleware(
        ApiKeyMiddleware, keys=app.state.keys, open_paths=OPEN_PATHS | ({config.health_route} - others)
    )
    if config.allowed_origins:
        # Outside of the keys, since browsers ask whether they may send one without sending it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(
        RequestContextMiddleware,
        metrics=runtime.metrics,
        access_log=not config.disable_access_log,
    )
    error_handlers.install(app)
    # Last come the routes that an option names: at a path that is there already they change nothing.
    for router in (*BATCH_ROUTERS, *OTHER_ROUTERS, *vertex.routers(config)):
        app.include_router(router)
    app.state.routes = InnerRoutes(app)
    app.state.requests = RouteRequests(app.state.routes, runtime, app.state.admission, BATCH_ROUTERS)
    app.state.batches = None if store is None else _runner(store, app.state.requests, runtime)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    return app


def _paths_of(routers: Iterable[APIRouter]) -> set[str]:
    return {route.path for router in routers for route in router.routes if isinstance(route, APIRoute)}


def _runner(store: Store, requests: RouteRequests, runtime: Runtime) -> BatchRunner:
    config = runtime.config
    return BatchRunner(
        store,
        requests,
        runtime.metrics.batches,
        concurrency=config.batch_concurrency,
        max_requests=config.max_batch_requests,
        max_line_bytes=config.max_body_bytes + LINE_OVERHEAD_BYTES,
    )
