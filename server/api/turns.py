"""From a conversation to an admitted turn: the part that the dialects of the API have in common."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from server.api.constraints import output_constraints
from server.api.params import NO_LOGPROBS, Logprobs, choices_of_prompt
from server.api.prompts import chat_token_ids, truncated
from server.api.protocol import GenerationFields
from server.api.serving import admit, runtime_of
from server.api.tool_plans import constrained_to
from server.chat_template import ChatMessage
from server.frontend.fitting import check_token_ids, resolve_max_tokens
from server.frontend.generation import ChoiceRequest
from server.frontend.served_model import ServedModel
from server.frontend.tool_plan import ToolPlan
from server.frontend.turn import Turn


async def begin_turn(
    request: Request,
    model: ServedModel,
    messages: Sequence[ChatMessage],
    fields: GenerationFields,
    *,
    tools: ToolPlan,
    max_tokens: int | None = None,
    max_tokens_if_they_fit: int | None = None,
    logprobs: Logprobs = NO_LOGPROBS,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    messages_param: str = "messages",
    max_tokens_param: str = "max_tokens",
) -> Turn:
    """Room for the answer to `messages`. The params are the dialect's names for fields, for errors.

    `max_tokens` must fit the model's context beside the prompt; of `max_tokens_if_they_fit`, as many as do are
    generated.

    Raises InvalidRequestError, and as `admit` does.
    """
    rendered = await chat_token_ids(
        messages,
        model,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        param=messages_param,
    )
    prompt = truncated(rendered, fields, model, max_tokens)
    max_tokens = resolve_max_tokens(
        len(prompt),
        max_tokens,
        model.info,
        param=messages_param,
        max_tokens_param=max_tokens_param,
        default=max_tokens_if_they_fit,
    )
    check_token_ids(prompt, model.info, messages_param)
    grammars = runtime_of(request).grammars
    constraints = await output_constraints(fields, model, grammars)
    constraints = await constrained_to(tools, constraints, grammars)
    choices = [
        ChoiceRequest(0, prompt, params.sampling, params.stop, fields.skip_special_tokens is not False)
        for params in choices_of_prompt(
            fields,
            model,
            max_tokens=max_tokens,
            logprobs=logprobs,
            count=fields.n or 1,
            constraints=constraints,
            tools=tools,
        )
    ]
    return Turn(admit(request, model, choices, fields), prompt, tools, max_tokens)
