"""The grammar of a turn with calls in FunctionGemma's form.

A call begins with a token that only the model can write, so that the text before it is free.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from server.frontend.function_gemma_schema import SHARED_RULES, SchemaRules
from server.frontend.tool_grammar import Instead
from server.tokenizer import END_CALL, START_CALL
from server.tool_format import Tool


def turn_grammar(tools: Sequence[Tool], loose: Collection[str], *, is_parallel: bool, instead: Instead) -> str:
    """As `tool_grammar.turn_grammar`. Raises GrammarError."""
    rules = list(SHARED_RULES)
    for number, tool in enumerate(tools):
        schema = SchemaRules(tool.parameters, f"p{number}", is_loose=tool.name in loose)
        rules += [f'call_{number}: {START_CALL} "call:{tool.name}" {schema.name} {END_CALL}', *schema.rules]
    calls = "(" + " | ".join(f"call_{number}" for number in range(len(tools))) + ")"
    calls += "+" if is_parallel else ""
    match instead:
        case None:
            start = calls
        case "TEXT":
            start = f"TEXT? | TEXT? {calls}"
        case "@answer":
            start = f"@answer | {calls}"
    return "\n".join([f"start: {start}", *rules])


def arguments_grammar(parameters: dict[str, Any], *, is_loose: bool) -> str:
    """Of a call's arguments alone. `is_loose`: but for what no grammar can express. Raises GrammarError."""
    schema = SchemaRules(parameters, "p", is_loose=is_loose)
    return "\n".join([f"start: {schema.name}", *SHARED_RULES, *schema.rules])
