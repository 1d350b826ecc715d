"""What the front knows about the model once it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.types import EngineInfo
from server.frontend.tool_forms import ToolForm, form_of
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    names: tuple[str, ...]
    """The names under which clients may ask for it; the first is used in answers."""
    root: str
    """The model id or path that was given on the command line."""
    created: int
    """Unix seconds at which it was loaded."""
    tokenizer: Tokenizer
    info: EngineInfo
    stop_token_ids: tuple[int, ...]
    """End of sequence, end of turn and what the checkpoint's generation config adds."""

    @property
    def tool_form(self) -> ToolForm:
        """How it is told of tools and writes calls."""
        return form_of(self.tokenizer)
