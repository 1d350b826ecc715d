"""The tokenizer of the server under test, in the two forms that servers have: vLLM's and llama.cpp's."""

from __future__ import annotations

from conformance.client import Json, Server
from conformance.outcome import NotOffered, expect


async def token_ids(server: Server, text: str, *, special: bool = True) -> list[int]:
    """The ids of `text`, with what begins a prompt if `special`. Raises NotOffered."""
    answer = await server.post(
        "/tokenize", {"model": server.model, "prompt": text, "add_special_tokens": special}
    )
    if answer.status != 200 or "count" not in answer.json:
        # parse_special, since a completion's prompt is read in that way.
        body = {"content": text, "add_special": special, "parse_special": True}
        answer = await server.post("/tokenize", body)
    if answer.status != 200:
        raise NotOffered(f"/tokenize: {answer.status}")
    ids = answer.json["tokens"]
    expect(isinstance(ids, list) and all(type(token_id) is int for token_id in ids), "tokens are no integers")
    return list(ids)


async def text_of_ids(server: Server, ids: list[int]) -> str:
    """The text of `ids`. Raises NotOffered."""
    body: Json = {"model": server.model, "tokens": ids}
    answer = await server.post("/detokenize", body)
    if answer.status != 200:
        raise NotOffered(f"/detokenize: {answer.status}")
    text = answer.json.get("prompt", answer.json.get("content"))
    expect(isinstance(text, str), "the answer has no text")
    return str(text)
