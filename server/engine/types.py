"""The messages that cross the socket between the HTTP front and the engine process.

Everything here is a frozen msgspec struct, free of torch, so that both sides may import it. Laws of the
exchange:

1. The front sends `Start` once; the engine answers with `Loading` (any number) and then `Ready` once.
   `Vocabulary` comes at most once, before the first request that has a grammar.
2. For each `Submit` the engine answers any number of `SequenceOutput`s, of which exactly one, the last, has a
   `finish_reason`. An id that was aborted gets its terminal output too.
3. `Abort` is idempotent and may name ids that the engine never saw or has already finished.
4. `Began` names each sequence once, before the first step that computes it: if the engine dies in that step,
   the front knows whose it was.
5. `Inspect` is answered with a `Snapshot` of its number, between two steps.
6. A `Heartbeat` comes every HEARTBEAT_SECONDS from the process's first moment on, whatever the engine is doing.
7. End of file on the socket means that the other side is dead. There is no other death notice.
"""

from __future__ import annotations

import enum

import msgspec

HEARTBEAT_SECONDS = 0.5


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """A stop token was sampled, or the front matched a stop string."""
    LENGTH = "length"
    """`max_tokens` were generated or the model's context is full."""
    ABORT = "abort"
    """The front asked for it: the client left, or a stop string was found."""
    ERROR = "error"
    """The engine could not go on with this sequence; `SequenceOutput.error` says why."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token of one sequence is chosen. Ranges were checked by the front."""

    max_tokens: int
    """Tokens to generate at most, >= 1."""
    seed: int
    """Seed of the sequence's counter-based generator, 0 <= seed < 2**64."""
    min_tokens: int = 0
    """`stop_token_ids` cannot be sampled before so many tokens were generated."""
    temperature: float = 1.0
    """0 means greedy, as does what is too small to divide by."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence; the front leaves the end-of-sequence ids out under `ignore_eos`."""
    grammar: str | None = None
    """What the generated text must match: a grammar in llguidance's Lark syntax or its JSON form. Stop tokens
    can then be sampled only where the text may end. A `Vocabulary` has to come before the request."""
    allowed_token_ids: tuple[int, ...] = ()
    """Ids that can be sampled; empty: all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids, none of them empty, that are not generated: the last id of each is ruled out where the
    newest generated ids are those before it."""
    logprobs: int | None = None
    """None: no logprobs. k >= 0: the sampled token's and those of the k likeliest tokens."""
    logprob_token_ids: tuple[int, ...] = ()
    """With `logprobs`: tokens whose logprobs are reported at each position, likely or not."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for each prompt token but the first."""

    @property
    def is_constrained(self) -> bool:
        """Whether tokens are ruled out, so that none may be left."""
        return bool(self.grammar or self.allowed_token_ids or self.bad_words)


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate: what `Submit` carries."""

    request_id: str
    """Unique in the life of the engine; made by the front, never a client's own id."""
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str = ""
    """Sequences share cached prefixes only under one salt."""
    priority: int = 0
    """Sequences with a lower one go first. -2**63 <= priority < 2**63."""
    tenant: str = ""
    """Whose it is; empty where there are no API keys. Those of one priority share the engine evenly among
    tenants."""
    client_request_id: str = ""
    """As the client knows its request, which may have several sequences. For logs and snapshots."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs to know; built by the front from `ServerConfig`."""

    model_path: str
    """A directory with config.json and safetensors, or a .gguf file."""
    dtype: str = "auto"
    """auto | bfloat16 | float32 | float16"""
    quantization: str = "none"
    """Of the weight matrices: none | int8 | fp8 | int4"""
    kv_cache_dtype: str = "auto"
    """auto, which is `dtype` | fp8"""
    device: str = "auto"
    """auto | cpu | cuda"""
    max_model_len: int | None = None
    """None: the model's own context length."""
    max_num_seqs: int | None = None
    """None: chosen by device."""
    max_num_batched_tokens: int | None = None
    """Tokens in one step at most; None: chosen by device."""
    prefill_stretch: float = 2.0
    """How many times the time of a step without prompts one with them may take, while streams run."""
    async_scheduling: bool | None = None
    """Whether each step is launched while the one before it is computed; None: where the back end can."""
    enforce_eager: bool = False
    """Whether a device's steps are never recorded and replayed."""
    speculative_ngram_tokens: int | None = None
    """Guessed tokens that one step checks at most; 0: none. None: chosen by back end."""
    tensor_parallel_size: int = 1
    """Devices, with a process each, that compute one model together."""
    block_size: int = 16
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float | None = None
    """Share of the free memory that weights and KV pools may take; None: chosen by device."""
    kv_cache_memory_bytes: int | None = None
    """Overrides the measured size of the KV pools."""
    num_blocks_override: int | None = None
    """Overrides the number of blocks in each pool (testing)."""
    num_threads: int | None = None
    """Threads of the engine on a CPU; None: chosen from the cores at hand."""
    backend: str = "auto"
    """auto | native | triton | reference"""
    cpu_isa: str = "auto"
    """The native back end's instruction set level: auto | avx2 | avx512"""
    weight_cache: bool = True
    """Keep the weights in the native back end's form for later starts."""
    suppress_token_ids: tuple[int, ...] = ()
    """Ids that must never be sampled: rows of the embedding without a token, image control tokens."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the loaded engine tells the front about itself."""

    device: str
    dtype: str
    quantization: str
    backend: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_sequence_tokens: int
    """Prompt plus generated tokens of the longest sequence that the empty KV pools can hold."""
    vocab_size: int
    """Rows of the embedding: every token id must be below."""
    block_size: int
    num_blocks: dict[str, int]
    """Usable blocks in the KV pool of each attention type, by name ("full", "sliding")."""
    kv_cache_bytes: int
    weight_bytes: int
    start_seconds: dict[str, float]
    """By stage of the engine's start, in order: import, device, weights, kv cache, warm-up."""


# --- front -> engine ---------------------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, tag=True):
    config: EngineConfig


class Vocabulary(msgspec.Struct, frozen=True, tag=True):
    """What grammars are matched against."""

    lengths: bytes
    """Of each token's piece: native unsigned 32-bit integers, one for each row of the embedding."""
    pieces: bytes
    """One behind another; 0xFF and the name for a control token, which only a grammar that names it allows."""
    eos_token_id: int


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Inspect(msgspec.Struct, frozen=True, tag=True):
    number: int
    """Comes back in the answer."""
    max_waiting: int
    """Waiting sequences to describe at most."""


ToEngine = Start | Vocabulary | Submit | Abort | Inspect


# --- engine -> front ---------------------------------------------------------------------------------------


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The natural-log probability of one chosen token and of its likeliest alternatives.

    All are finite, as JSON needs them: -9999.0 stands for minus infinity.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, logprob): as many as were asked for, likeliest first, then the ids that were asked for by name
    and are not among them."""


class PromptTokenLogprob(TokenLogprob, frozen=True, array_like=True):
    rank: int
    """The token's place among all, the likeliest being 1; of equally likely ones the lower id comes first. 0
    where the model's logits were not finite."""


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one step produced for one sequence."""

    request_id: str
    token_ids: list[int] = []
    """Newly sampled ids; includes the stop token that ended the sequence, if one did."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`, where asked for."""
    prompt_logprobs: list[PromptTokenLogprob | None] | None = None
    """One for each prompt token (the first is None); rides on the output with the first token."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token, where one ended the sequence."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache; rides on the output with the first token, too, and on an
    error's."""
    scheduled_at: float = 0.0
    """Where `num_cached_tokens` is: `time.monotonic()` seconds at which the sequence first joined a batch."""
    error: str | None = None
    """Why the engine gave up, under FinishReason.ERROR: for the log, so it quotes nothing of the request."""
    is_contradictory: bool = False
    """Whether it did because what the request itself asks for left no token to sample."""


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges after a step and counts during it."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: dict[str, float] = {}
    """Share of usable blocks that live sequences hold, by pool name; cached but free blocks count as free."""
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Prompt tokens found there."""
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    """Generated tokens, of which the step may have computed several for one sequence."""
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of the draft tokens; those that turned out right."""
    step_seconds: float = 0.0
    """From when the device could begin with the step until it was taken in; 0 where none was."""
    wait_seconds: float = 0.0
    """Of them, those in which the host had nothing to do but wait for the device."""


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    outputs: list[SequenceOutput]
    stats: StepStats


class Began(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    seconds_in_turn: float
    """Since the present turn of the engine's loop began, a step or taking a message in; 0 between turns and
    while the model is loaded."""


class SequenceSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one sequence, but for its tokens."""

    request_id: str
    client_request_id: str
    tenant: str
    status: str
    """running | waiting | compiling (its grammar)"""
    priority: int
    age_seconds: float
    """Since it came to the engine."""
    num_prompt_tokens: int
    num_generated_tokens: int
    max_tokens: int
    num_computed_tokens: int
    """Of prompt and generated tokens, those whose KV entries are in the cache."""
    num_cached_tokens: int
    num_preemptions: int


class PoolSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The blocks of one KV pool."""

    num_blocks: int
    num_held: int
    """By live sequences."""
    num_free: int
    num_published: int
    """That the prefix cache can find, held or free."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine between two steps."""

    number: int
    running: list[SequenceSnapshot]
    waiting: list[SequenceSnapshot]
    """The first ones, in the order in which they would be admitted; then those whose grammar is compiled."""
    num_waiting: int
    """All of them."""
    pools: dict[str, PoolSnapshot]
    """By name of the attention type."""
    num_steps: int
    last_step_ago: float | None
    """Seconds since the last one ended."""
    step_seconds: list[float]
    """Of the last steps, the newest at the end."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    stage: str
    """What is being done, for people: "weights", "kv cache", "warm-up"."""
    fraction: float
    """0..1 of this stage."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start, for a reason that a person can act on; it exits after this."""

    message: str


FromEngine = StepOutput | Began | Snapshot | Heartbeat | Loading | Ready | Failed
