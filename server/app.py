"""The HTTP application: what is put together, and in which order."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server import __version__
from server.api import chat, completions, error_handlers, health, models, openapi, prometheus, tokenize
from server.api.anthropic import routes as anthropic
from server.api.middleware import ApiKeyMiddleware, RequestContextMiddleware
from server.api.openai_responses import routes as openai_responses
from server.frontend.admission import Admission
from server.runtime import Runtime


def create_app(runtime: Runtime) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await runtime.start()
        try:
            yield
        finally:
            await runtime.stop()

    app = FastAPI(
        title="gemma-server",
        version=__version__,
        description="OpenAI's API for Google's Gemma models.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.runtime = runtime
    app.state.admission = Admission(runtime.config.max_queued_requests)
    # The last one added is the outermost.
    app.add_middleware(ApiKeyMiddleware, api_keys=runtime.config.api_key)
    app.add_middleware(
        RequestContextMiddleware,
        metrics=runtime.metrics.http,
        access_log=not runtime.config.disable_access_log,
    )
    error_handlers.install(app)
    for part in (chat, completions, openai_responses, anthropic, models, tokenize, health, prometheus):
        app.include_router(part.router)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    return app
