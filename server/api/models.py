"""GET /v1/models, GET /v1/models/{id}"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api.responses import Model, ModelList, json_response
from server.api.serving import runtime_of, served_model
from server.frontend.served_model import ServedModel

router = APIRouter()


@router.get("/v1/models", summary="List the names of the served model")
async def list_models(request: Request) -> Response:
    model = served_model(runtime_of(request))
    return json_response(ModelList([_describe(model, name) for name in model.names]))


@router.get("/v1/models/{model_id:path}", summary="Describe the served model")
async def retrieve_model(request: Request, model_id: str) -> Response:
    return json_response(_describe(served_model(runtime_of(request), model_id), model_id))


def _describe(model: ServedModel, name: str) -> Model:
    return Model(id=name, created=model.created, root=model.root, max_model_len=model.info.max_model_len)
