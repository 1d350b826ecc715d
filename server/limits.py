"""What a client may send at most, in one place. docs/limits.md is made from it.

Each is there because without it one request could cost more than its sender is entitled to: memory, or time
in which the event loop serves nobody else. What depends on the model (its context, its vocabulary) is checked
where the model is known, and what operators may want otherwise is an option.
"""

from __future__ import annotations

# --- connections -------------------------------------------------------------------------------------------

HEADER_SECONDS = 20.0
"""From a connection's first moment, or a later request's first byte, to the end of the request's headers. Who
has sent a part by then is answered 408."""
KEEP_ALIVE_SECONDS = 620
"""A connection may be idle so long. Balancers should close theirs first, since a request that meets a
connection on its way to be closed is lost. Google's do after 600 s, says its documentation; others after 60."""
SEND_SECONDS = 60.0
"""A client that takes in nothing for so long is cut off."""
MAX_HEADER_BYTES = 1 << 16
"""Request line and headers together; more is answered 400."""
MAX_CONNECTIONS = 1 << 16
"""Open at once, or as many as the limit of open files allows. For one more, the one is closed that has waited
longest for a request; if all have one, it is answered 503."""
RESERVED_FILES = 96
"""Of the limit of open files, what connections leave for all else."""

# --- bodies ------------------------------------------------------------------------------------------------

BODY_SECONDS = 30.0
"""From the end of the headers to the end of the body; then 408."""
MAX_NESTING = 200
"""Levels of lists and objects in each other; the parser's own."""
MAX_VALUES = 500_000
"""Values in all lists and objects of a body. The parser makes some ten million a second, and nothing else runs
meanwhile."""
MAX_STRINGS = 200_000
"""Strings in a body, keys included, each of which may cost ten times as much as a number."""
MAX_KEYS = 60_000
"""Keys in all objects of a body."""
MAX_OBJECTS = 30_000
"""Objects in a body, which are validated one by one."""
MAX_ESCAPES = 2_000_000
"""Backslashes in a body. A text with more of them can be sent as UTF-8."""

# --- fields ------------------------------------------------------------------------------------------------

MAX_MESSAGES = 10_000
"""In one conversation."""
MAX_CALLS = 1024
"""Tool calls in one message."""
MAX_NAME_CHARS = 128
"""Of a function that was called: its name is repeated with each result."""
MAX_TOOLS = 128
"""In one request, as in OpenAI's API."""
MAX_PROMPTS = 1024
"""Prompts in one completion request, as in vLLM, and texts in one moderation."""
MAX_N = 128
"""Choices for one prompt."""
MAX_STOP_STRINGS = 4
"""As in OpenAI's API."""
MAX_STOP_CHARS = 1000
"""In one stop string: each character of the output is compared with each."""
MAX_STOP_TOKEN_IDS = 256
"""Each costs a look at each token."""
MAX_LOGIT_BIAS = 1024
"""Entries of `logit_bias`, which are applied at each token."""
MAX_LOGPROB_TOKEN_IDS = 256
"""Tokens whose log probabilities are asked for by id."""
MAX_ALLOWED_TOKEN_IDS = 16_384
"""Of `allowed_token_ids`."""
MAX_BAD_WORDS = 128
"""Each is looked for at each token."""
MAX_BAD_WORD_CHARS = 1000
"""In one of them."""
MAX_CHOICES = 10_000
"""Texts of which the output is to be one."""
MAX_CACHE_SALT_CHARS = 128
"""It is part of each block's hash."""
