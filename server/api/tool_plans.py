"""From the tools of a request to a plan for its turn, and to the grammar of that."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from server.api import ignored_fields
from server.api.constraints import OutputConstraints, check_grammar
from server.api.protocol import ChatCompletionRequest, declared_tools
from server.api.tools import DeclaredTool, ToolChoice
from server.errors import InvalidRequestError, shown
from server.frontend.grammar_check import GrammarChecker
from server.frontend.grammar_worker import Question
from server.frontend.tool_grammar import ToolPlan, arguments_grammar
from server.limits import MAX_TOOLS
from server.tool_format import Tool

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


async def plan_tools(
    declared: Sequence[DeclaredTool],
    choice: ToolChoice | None,
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
        return ToolPlan(), []
    _check_names(declared)
    loose = [item for item in declared if not await _is_enforceable(item, grammars)]
    loose_params = [item.parameters_param for item in loose]
    tools = {item.tool.name: item.tool for item in declared}
    choice = choice or ToolChoice("auto")
    for name in choice.names or ():
        if name not in tools:
            raise InvalidRequestError(
                f"'tool_choice' names {shown(name)}, which is none of 'tools'.", param="tool_choice"
            )
    if choice.mode == "none":
        return ToolPlan(), loose_params
    plan = ToolPlan(
        tools=tuple(tools.values()),
        names=frozenset(tools if choice.names is None else choice.names),
        loose=frozenset(item.tool.name for item in loose),
        is_required=choice.mode == "required",
        # Who names the function wants its one call, as with OpenAI.
        is_parallel=is_parallel and not choice.is_named,
    )
    return plan, loose_params


async def plan_chat_tools(
    body: ChatCompletionRequest, grammars: GrammarChecker, headers: dict[str, str]
) -> ToolPlan:
    """A chat completion's plan; `headers` tell what it cannot hold the model to. Raises as `plan_tools`."""
    plan, loose = await plan_tools(
        declared_tools(body.tools),
        body.tool_choice,
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
    question = Question(plan.grammar(constraints.grammar))
    return dataclasses.replace(constraints, grammar=await check_grammar(question, grammars, "tools"))


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


async def _is_enforceable(item: DeclaredTool, grammars: GrammarChecker) -> bool:
    """Whether all of the schema can be enforced; else all is but keywords that no grammar can express.

    Raises InvalidRequestError where it is no schema, or where strictness was asked for.
    """
    tool, param = item.tool, item.parameters_param
    if tool.parameters.get("type", "object") != "object":
        raise InvalidRequestError(f"'{param}' must be a schema of type 'object'.", param=param)
    try:
        await check_grammar(_question(tool, is_loose=False), grammars, param)
    except InvalidRequestError:
        if item.is_strict:
            raise
        await check_grammar(_question(tool, is_loose=True), grammars, param)
        return False
    return True


def _question(tool: Tool, *, is_loose: bool) -> Question:
    return Question(arguments_grammar(tool.parameters, is_loose=is_loose))
