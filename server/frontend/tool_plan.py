"""Which tools a turn may call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from server.frontend.tool_forms import JSON_FORM, ToolForm
from server.frontend.tool_grammar import Instead
from server.tool_format import Tool


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request says about tools; without any the model is told nothing, and writes free text."""

    tools: tuple[Tool, ...] = ()
    """That the model is told of."""
    names: frozenset[str] = frozenset()
    """Of those that it may call; not empty if `tools` is not."""
    loose: frozenset[str] = frozenset()
    """Names of those whose arguments are held to what a grammar can express of their schemas."""
    is_required: bool = False
    """Whether it must call one, and write nothing else."""
    is_parallel: bool = True
    """Whether it may call several."""
    form: ToolForm = JSON_FORM
    """The model's."""

    @property
    def num_chars(self) -> int:
        """About as many as the declarations of the tools have."""
        return sum(
            len(tool.name) + len(tool.description) + len(json.dumps(tool.parameters)) for tool in self.tools
        )

    def grammar(self, answer: str | None = None) -> str:
        """What the model's text must match, as llguidance takes it; there must be tools. Raises GrammarError.

        `answer`: a grammar of what may be written instead of calls; anything, if there is none.
        """
        instead: Instead = "TEXT" if answer is None else "@answer"
        turn = self.form.turn_grammar(
            [tool for tool in self.tools if tool.name in self.names],
            self.loose,
            is_parallel=self.is_parallel,
            instead=None if self.is_required else instead,
        )
        if answer is None or self.is_required:
            return turn
        return json.dumps({"grammars": [{"name": "turn", "lark_grammar": turn}, *_named_answer(answer)]})


NO_TOOLS = ToolPlan()


def _named_answer(grammar: str) -> list[dict[str, Any]]:
    """A grammar in either of llguidance's forms, as one of several."""
    if grammar.startswith("{"):
        first, *others = json.loads(grammar)["grammars"]
        return [{**first, "name": "answer"}, *others]
    return [{"name": "answer", "lark_grammar": grammar}]
