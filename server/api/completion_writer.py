"""The parts of one choice of a completion, as its request wants them."""

from __future__ import annotations

from msgspec import UNSET

from server.api.logprobs import CompletionLogprobsWriter, extend, prompt_logprobs, token_names, written
from server.api.protocol import CompletionRequest
from server.api.responses import CompletionChoice, CompletionLogprobs
from server.engine.types import FinishReason, PromptTokenLogprob
from server.frontend.generation import ChoiceDelta, ChoiceRequest
from server.tokenizer import BOS, Tokenizer


class ChoiceWriter:
    """Feed it the choice's deltas in order. The first part brings what belongs to the prompt."""

    def __init__(self, body: CompletionRequest, choice: ChoiceRequest, tokenizer: Tokenizer) -> None:
        self._body = body
        self._prompt_token_ids = choice.prompt_token_ids
        self._tokenizer = tokenizer
        self._is_first = True
        self._only_prompt = body.max_tokens == 0
        prompt = body.prompt[choice.prompt_index]
        is_whole = body.truncate_prompt_tokens is None
        self._typed_prompt = prompt if isinstance(prompt, str) and is_whole else None
        self._logprobs = None
        if body.logprobs is not None:
            names = token_names(tokenizer, as_ids=body.return_tokens_as_token_ids)
            self._logprobs = CompletionLogprobsWriter(
                tokenizer, names, skip_special_tokens=choice.skip_special_tokens
            )

    async def part(self, delta: ChoiceDelta) -> CompletionChoice:
        logprobs = None if self._logprobs is None else CompletionLogprobs([], [], [], [])
        part = CompletionChoice(delta.index, "", logprobs, delta.text.finish_reason)
        if self._is_first:
            self._is_first = False
            await self._add_prompt(part, delta)
        if self._only_prompt:
            part.finish_reason = FinishReason.LENGTH if part.finish_reason else None
            part.stop_reason = None if part.finish_reason else UNSET
            part.token_ids = [] if self._body.return_token_ids else UNSET
            return part
        part.text += delta.text.text
        part.stop_reason = delta.text.stop_reason if part.finish_reason else UNSET
        if self._logprobs is not None and logprobs is not None:
            extend(logprobs, self._logprobs.output(delta.text.logprobs or []))
        if self._body.return_token_ids:
            part.token_ids = delta.text.generated_token_ids
        return part

    async def _add_prompt(self, part: CompletionChoice, delta: ChoiceDelta) -> None:
        body, entries = self._body, delta.prompt_logprobs or []
        if body.return_token_ids:
            part.prompt_token_ids = self._prompt_token_ids
        if body.prompt_logprobs is not None:
            part.prompt_logprobs = await prompt_logprobs(entries, body.prompt_logprobs, self._tokenizer)
        if body.echo:
            part.text = self._echoed_text()
            if self._logprobs is not None and part.logprobs is not None:
                writer, num_top = self._logprobs, body.logprobs or 0
                echoed = await written(
                    len(entries), num_top, lambda: self._echoed_logprobs(writer, entries, num_top)
                )
                extend(part.logprobs, echoed)

    def _echoed_text(self) -> str:
        if self._typed_prompt is not None:
            return self._typed_prompt
        return self._tokenizer.decode(self._prompt_token_ids, skip_special_tokens=False)

    def _echoed_logprobs(
        self, writer: CompletionLogprobsWriter, entries: list[PromptTokenLogprob | None], num_top: int
    ) -> CompletionLogprobs:
        has_bos = self._prompt_token_ids[0] == self._tokenizer.bos_id
        hide_bos = has_bos and self._typed_prompt is not None and not self._typed_prompt.startswith(BOS)
        return writer.prompt(self._prompt_token_ids, entries, num_top, hide_bos=hide_bos)


def append(whole: CompletionChoice, part: CompletionChoice) -> None:
    """Have `whole`, a choice's first part, say what the next one says."""
    whole.text += part.text
    whole.finish_reason, whole.stop_reason = part.finish_reason, part.stop_reason
    if whole.logprobs is not None and part.logprobs is not None:
        extend(whole.logprobs, part.logprobs)
    if whole.token_ids is not UNSET and part.token_ids is not UNSET:
        whole.token_ids += part.token_ids
