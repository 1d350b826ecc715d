"""From the tools of a request to a plan for its turn, and to the grammar of that."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Callable, Sequence

from server.api import ignored_fields
from server.api.constraints import OutputConstraints, check_grammar, refusing
from server.api.prompts import INLINE_CHARS
from server.api.protocol import ChatCompletionRequest, declared_tools
from server.api.tools import DeclaredTool, ToolChoice
from server.errors import InvalidRequestError, shown
from server.frontend.grammar_check import GrammarChecker
from server.frontend.grammar_worker import Question
from server.frontend.served_model import ServedModel
from server.frontend.tool_forms import ToolForm
from server.frontend.tool_plan import NO_TOOLS, ToolPlan
from server.grammar_library import MAX_GRAMMAR_CHARS
from server.limits import MAX_TOOLS

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


async def plan_tools(
    declared: Sequence[DeclaredTool],
    choice: ToolChoice | None,
    model: ServedModel,
    grammars: GrammarChecker,
    *,
    is_parallel: bool,
) -> tuple[ToolPlan, list[str]]:
    """The plan, and the fields that it cannot hold the model to entirely.

    Raises InvalidRequestError and, if too many grammars wait to be compiled, QueueFullError.
    """
    if not declared:
        if choice is not None and choice.mode != "none":
            raise InvalidRequestError("'tool_choice' needs 'tools'.", param="tool_choice")
        return NO_TOOLS, []
    _check_names(declared)
    _check_size(declared)
    form = model.tool_form
    loose = [item for item in declared if not await _is_enforceable(item, form, grammars)]
    loose_params = [item.parameters_param for item in loose]
    tools = {item.tool.name: item.tool for item in declared}
    choice = choice or ToolChoice("auto")
    for name in choice.names or ():
        if name not in tools:
            raise InvalidRequestError(
                f"'tool_choice' names {shown(name)}, which is none of 'tools'.", param="tool_choice"
            )
    if choice.mode == "none":
        return NO_TOOLS, loose_params
    plan = ToolPlan(
        tools=tuple(tools.values()),
        names=frozenset(tools if choice.names is None else choice.names),
        loose=frozenset(item.tool.name for item in loose),
        is_required=choice.mode == "required",
        # Who names the function wants its one call, as with OpenAI.
        is_parallel=is_parallel and not choice.is_named,
        form=form,
    )
    return plan, loose_params


async def plan_chat_tools(
    body: ChatCompletionRequest, model: ServedModel, grammars: GrammarChecker, headers: dict[str, str]
) -> ToolPlan:
    """A chat completion's plan; `headers` tell what it cannot hold the model to. Raises as `plan_tools`."""
    plan, loose = await plan_tools(
        declared_tools(body.tools),
        body.tool_choice,
        model,
        grammars,
        is_parallel=body.parallel_tool_calls is not False,
    )
    ignored_fields.add_to_header(headers, loose)
    return plan


async def constrained_to(
    plan: ToolPlan, constraints: OutputConstraints, grammars: GrammarChecker
) -> OutputConstraints:
    """`constraints`, with the calls of `plan` as the one other thing that may be written."""
    if not plan.tools:
        return constraints
    grammar = await _written(lambda: plan.grammar(constraints.grammar), plan.num_chars, "tools")
    return dataclasses.replace(constraints, grammar=await check_grammar(Question(grammar), grammars, "tools"))


def _check_names(declared: Sequence[DeclaredTool]) -> None:
    if len(declared) > MAX_TOOLS:
        raise InvalidRequestError(
            f"'tools' must hold at most {MAX_TOOLS} tools, got {len(declared)}.", param="tools"
        )
    seen: dict[str, DeclaredTool] = {}
    for item in declared:
        name, param = item.tool.name, item.name_param
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"'{param}' must be 1 to 128 letters, digits, '_' and '-', got {shown(name)}.", param=param
            )
        if name in seen:
            raise InvalidRequestError(
                f"'{param}' is {shown(name)}, as '{seen[name].name_param}' is; names must be unique.",
                param=param,
            )
        seen[name] = item


def _check_size(declared: Sequence[DeclaredTool]) -> None:
    """They would be of one grammar: what is too large for that is refused before any of it is compiled."""
    size = sum(len(json.dumps(item.tool.parameters)) for item in declared)
    if size > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(
            f"'tools' have schemas of {size} characters; at most {MAX_GRAMMAR_CHARS} are allowed.",
            param="tools",
        )


async def _is_enforceable(item: DeclaredTool, form: ToolForm, grammars: GrammarChecker) -> bool:
    """Whether all of the schema can be enforced; else all is but keywords that no grammar can express.

    Raises InvalidRequestError where it is no schema, or where strictness was asked for.
    """
    tool, param = item.tool, item.parameters_param
    if tool.parameters.get("type", "object") != "object":
        raise InvalidRequestError(f"'{param}' must be a schema of type 'object'.", param=param)
    try:
        await _check_arguments(item, form, grammars, is_loose=False)
    except InvalidRequestError:
        if item.is_strict:
            raise
        await _check_arguments(item, form, grammars, is_loose=True)
        return False
    return True


async def _check_arguments(
    item: DeclaredTool, form: ToolForm, grammars: GrammarChecker, *, is_loose: bool
) -> None:
    param, parameters = item.parameters_param, item.tool.parameters
    grammar = await _written(
        lambda: form.arguments_grammar(parameters, is_loose=is_loose), len(json.dumps(parameters)), param
    )
    await check_grammar(Question(grammar), grammars, param)


async def _written(write: Callable[[], str], num_chars: int, param: str) -> str:
    """A grammar for schemas of so many characters, of which thousands take their time."""
    with refusing(param):
        return write() if num_chars <= INLINE_CHARS else await asyncio.to_thread(write)
