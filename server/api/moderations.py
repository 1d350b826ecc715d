"""POST /v1/moderations, answered by a ShieldGemma."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, Struct, UnsetType
from pydantic import Field, PlainValidator, WithJsonSchema

from server.api.body import off_loop
from server.api.field_types import WireModel
from server.api.openapi import body_of
from server.api.prompts import rendered_token_ids
from server.api.protocol import MODEL, GenerationFields
from server.api.responses import Head
from server.api.serving import admit, answer, read_body, runtime_of, served_model
from server.api.terms import ENTERING, terms_of
from server.engine.types import SamplingParams
from server.errors import InvalidRequestError
from server.frontend.fitting import resolve_max_tokens
from server.frontend.generation import ChoiceRequest, Generation
from server.frontend.request_state import StopConditions
from server.frontend.served_model import ServedModel
from server.limits import MAX_PROMPTS
from server.moderation import Policy, answer_ids, question, score

router = APIRouter()

WARNING_HEADER = "x-warning"
WARNING = (
    "The served model is not a ShieldGemma by its name: it was not trained for this question, and its scores "
    "may mean nothing."
)


def _texts(value: Any) -> list[str]:
    """`input` in its three forms; the parts of one text become one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS:
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, dict) for item in value):
            parts = [item.get("text") if item.get("type") == "text" else None for item in value]
            if all(isinstance(part, str) for part in parts):
                return ["\n".join(part for part in parts if part is not None)]
            raise ValueError("must have parts of type text only: this model sees no images")
    raise ValueError(f"must be a string, a list of 1 to {MAX_PROMPTS} strings, or a list of text parts")


class ModerationRequest(WireModel):
    model: str | None = MODEL
    input: Annotated[
        list[str],
        PlainValidator(_texts),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            "required": ["type", "text"],
                        },
                        "minItems": 1,
                        "maxItems": MAX_PROMPTS,
                    },
                ]
            }
        ),
    ] = Field(description="A text, several texts, or one text in parts. Required.")


class ModerationResult(Struct):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


class Moderation(Struct):
    id: str
    model: str
    results: list[ModerationResult]
    warning: str | UnsetType = UNSET
    """Why the scores may mean nothing."""


@router.post(
    "/v1/moderations",
    dependencies=[ENTERING],
    summary="Which policies a text violates",
    openapi_extra=body_of(ModerationRequest, answer=Moderation),
)
async def create_moderation(request: Request) -> Response:
    runtime = runtime_of(request)
    body, headers = await read_body(request, ModerationRequest)
    model = served_model(runtime, body.model)
    policies: Sequence[Policy] = request.app.state.policies
    terms_of(request).admission.check_count(len(body.input) * len(policies))
    choices = await _choices(request, body.input, policies, model)
    generation = admit(request, model, choices, GenerationFields.model_validate({}))
    warning: str | UnsetType = UNSET
    if not any("shieldgemma" in name.lower() for name in (model.root, *model.names)):
        warning = headers[WARNING_HEADER] = WARNING
    head = Head.new("modr", model.names[0])
    return await answer(request, generation, _whole(generation, head, body.input, policies, warning), headers)


async def _choices(
    request: Request, texts: Sequence[str], policies: Sequence[Policy], model: ServedModel
) -> list[ChoiceRequest]:
    """One sequence of one token for each text and policy: the first text's policies come first."""
    try:
        ids = answer_ids(model.tokenizer)
        prompts = await off_loop(
            request,
            lambda: [question(text, policy, model.tokenizer) for text in texts for policy in policies],
        )
    except ValueError as error:
        raise InvalidRequestError(f"{str(error).capitalize()}.", param="model") from None
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=0, logprob_token_ids=ids)
    choices = []
    for index, token_ids in enumerate(await rendered_token_ids(prompts, model, "input")):
        resolve_max_tokens(len(token_ids), 1, model.info, param="input", max_tokens_param="input")
        choices.append(ChoiceRequest(index, token_ids, sampling, StopConditions()))
    return choices


async def _whole(
    generation: Generation,
    head: Head,
    texts: Sequence[str],
    policies: Sequence[Policy],
    warning: str | UnsetType,
) -> Moderation:
    scores = [0.0] * (len(texts) * len(policies))
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.text.logprobs:
                yes, no = (logprob for _, logprob in delta.text.logprobs[0].top)
                scores[delta.index] = score(yes, no)
    results = []
    for start in range(0, len(scores), len(policies)):
        of_text = dict(zip((policy.name for policy in policies), scores[start:], strict=False))
        categories = {policy.name: of_text[policy.name] >= policy.threshold for policy in policies}
        applied = {policy.name: ["text"] for policy in policies}
        results.append(ModerationResult(any(categories.values()), categories, of_text, applied))
    return Moderation(head.id, head.model, results, warning)
