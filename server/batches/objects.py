"""OpenAI's objects for files and batches: what clients see, and what the store keeps."""

from __future__ import annotations

import enum
from typing import Literal

from msgspec import Struct


class BatchStatus(enum.StrEnum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    """The input file was not valid: nothing was computed."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self in FINAL_STATUSES


FINAL_STATUSES = (BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.CANCELLED, BatchStatus.EXPIRED)


class File(Struct, kw_only=True):
    id: str
    bytes: int
    created_at: int
    """Unix seconds, as all times here."""
    filename: str
    """The client's name for it. The content lies under the id."""
    purpose: Literal["batch", "batch_output"]
    expires_at: int | None
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"
    status_details: None = None


class RequestCounts(Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(Struct):
    """A reason why an input file cannot be run."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """From 1."""


class BatchErrors(Struct):
    data: list[BatchError]
    object: Literal["list"] = "list"


class InputTokensDetails(Struct):
    cached_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int = 0


class BatchUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, input_tokens: int, cached_tokens: int, output_tokens: int) -> BatchUsage:
        return cls(
            input_tokens,
            InputTokensDetails(cached_tokens),
            output_tokens,
            OutputTokensDetails(),
            input_tokens + output_tokens,
        )


class Batch(Struct, kw_only=True):
    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    status: BatchStatus = BatchStatus.VALIDATING
    object: Literal["batch"] = "batch"
    completion_window: Literal["24h"] = "24h"
    model: str | None = None
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    usage: BatchUsage | None = None
    metadata: dict[str, str] | None = None

    def advance(self, status: BatchStatus, now: int) -> None:
        """Enter a status, and note when."""
        self.status = status
        setattr(self, f"{status}_at", now)


class Page(Struct):
    """Part of a list; the next part begins after `last_id`."""

    data: list[Batch] | list[File]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"

    @classmethod
    def of(cls, items: list[Batch] | list[File], *, has_more: bool) -> Page:
        ids = [item.id for item in items]
        return cls(items, has_more, ids[0] if ids else None, ids[-1] if ids else None)


class DeletedFile(Struct):
    id: str
    deleted: Literal[True] = True
    object: Literal["file"] = "file"
