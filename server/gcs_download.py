"""Downloads a model from Google Cloud Storage into a directory of the cache.

Laws:
1. Only configuration, tokenizer and weights in safetensors or GGUF are ever asked for: no pickle, no code.
2. A file under its own name is complete and has the checksum that the bucket states. Until then it is
   `NAME.partial`, beside which `NAME.chunks` says what of it is on the disk. After a start that was cut off the
   next one goes on from there.
3. What is fetched is one generation of each object; another one starts afresh.
4. If the bucket cannot be reached, a complete copy in the cache will do.
5. One process at a time downloads into a directory; others wait, and find the files.

The library takes its credentials from the environment (Workload Identity, GOOGLE_APPLICATION_CREDENTIALS); with
STORAGE_EMULATOR_HOST it asks an emulator, without any.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
import urllib3
from google.api_core import exceptions
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY
from google_crc32c import Checksum

from server.cache_directory import cache_directory, written_whole
from server.model_download import check_space, disk_filled_up, model_files
from server.model_source import DownloadProgress, ModelSourceError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
NUM_THREADS = 8
ATTEMPTS = 6
"""For a chunk."""
FIRST_WAIT_SECONDS = 0.5
"""Before the second attempt; before each later one twice as long."""
LIST_SECONDS = 20.0
"""In which the bucket must answer, or a copy is used."""
_READ_BYTES = 1 << 22
_RECORD = ".objects"
_UNREACHABLE = (
    requests.exceptions.RequestException,
    urllib3.exceptions.HTTPError,  # which the library lets through where a body breaks off
    exceptions.ServerError,
    exceptions.TooManyRequests,
    exceptions.RetryError,
    TransportError,  # a token cannot be renewed
)


def fetch(
    bucket: str, path: str, download_dir: Path | None, progress: Callable[[DownloadProgress], None]
) -> Path:
    """Have the model under gs://bucket/path in the cache: a .gguf object, or the files of a directory.

    Returns the file or the directory. Raises ModelSourceError.
    """
    place = f"gs://{bucket}/{path}".rstrip("/")
    base = (cache_directory() / "gs" if download_dir is None else download_dir) / bucket
    is_file = path.endswith(".gguf")
    directory = base.joinpath(*(quote(part, safe=" ") for part in path.split("/") if part))
    if is_file:
        directory = directory.parent
    try:
        with _locked(directory):
            _fetch_into(directory, place, bucket, path, is_file, progress)
    except exceptions.NotFound as error:
        raise ModelSourceError(f"{place}: the bucket does not exist, or an object has gone: {error}") from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        reason = (
            f"{place} may not be read ({error.code}): give the service account roles/storage.objectViewer on "
            "the bucket"
        )
        raise ModelSourceError(reason) from error
    except _UNREACHABLE as error:
        raise _failed(place, error) from error
    except GoogleAuthError as error:
        reason = (
            f"{place}: no credentials of Google Cloud ({error}): use Workload Identity, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to a key file"
        )
        raise ModelSourceError(reason) from error
    except exceptions.PreconditionFailed as error:
        raise ModelSourceError(f"{place} was replaced during the download: start again") from error
    except exceptions.GoogleAPIError as error:
        raise _failed(place, error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_filled_up(place) from error
        raise ModelSourceError(f"the download of {place} failed: {error}") from error
    return directory / path.rpartition("/")[2] if is_file else directory


def _failed(place: str, error: Exception) -> ModelSourceError:
    return ModelSourceError(
        f"the download of {place} failed ({error}): start again to go on, what came is kept"
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_into(
    directory: Path,
    place: str,
    bucket: str,
    path: str,
    is_file: bool,
    progress: Callable[[DownloadProgress], None],
) -> None:
    record = _Record(directory)
    try:
        objects = _wanted(_client(), place, bucket, path, is_file)
    except _UNREACHABLE as error:
        if not record.has_all or (is_file and not (directory / path.rpartition("/")[2]).exists()):
            raise
        logger.warning("%s cannot be reached (%s); using the copy in %s", place, error, directory)
        return
    if not is_file:
        # Another checkpoint's shards would be loaded with this one's.
        record.forget_all_but(found.name for found in objects)
    files = [_File(directory, found) for found in objects if not record.has(found)]
    total = sum(file.num_missing_bytes for file in files)
    logger.info("%s: %d of %d files to fetch, %.1f MB", place, len(files), len(objects), total / 1e6)
    check_space(place, total, directory)
    counter = _Counter(total, progress)
    for file in files:
        file.fetch(counter)
        record.add(file.source)
    record.has_all = True
    record.write()


def _client() -> Any:
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return storage.Client.create_anonymous_client()
    # Reading needs no project, and not all credentials name one.
    return storage.Client(project=None)


@dataclass(frozen=True, slots=True)
class _Object:
    blob: Any
    name: str
    """Without its directory."""
    generation: int
    size: int
    crc32c: str
    """Base64."""


def _wanted(client: Any, place: str, bucket: str, path: str, is_file: bool) -> list[_Object]:
    """The objects that make up the model. Raises ModelSourceError, and the library's errors."""
    directory, _, file = path.rpartition("/") if is_file else (path.strip("/"), "", "")
    prefix = f"{directory}/" if directory else ""
    blobs = {
        blob.name[len(prefix) :]: blob
        for blob in client.list_blobs(
            bucket, prefix=prefix, delimiter="/", retry=DEFAULT_RETRY.with_timeout(LIST_SECONDS)
        )
    }
    if not is_file and not blobs:
        raise ModelSourceError(f"{place} has no objects: check the name")
    if is_file and file not in blobs:
        raise ModelSourceError(f"{place} does not exist")
    names = [file] if is_file else model_files(place, blobs, f"{place}/FILE.gguf")
    return [
        _Object(blob, name, int(blob.generation), int(blob.size), blob.crc32c)
        for name in names
        for blob in (blobs[name],)
    ]


class _Record:
    """Which generation of which object the files of a directory are."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        content = _read_json(directory / _RECORD)
        self._generations: dict[str, int] = content.get("generations", {})
        self.has_all: bool = content.get("has_all", False)
        """Whether the directory holds a whole model."""

    def has(self, found: _Object) -> bool:
        is_current = self._generations.get(found.name) == found.generation
        return is_current and (self._directory / found.name).exists()

    def add(self, found: _Object) -> None:
        self._generations[found.name] = found.generation
        self.has_all = False
        self.write()

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Removes the files, too."""
        gone = self._generations.keys() - set(names)
        if gone:  # noted first: what is left after a kill must not pass for a whole model
            self.has_all = False
            self.write()
        for name in gone:
            (self._directory / name).unlink(missing_ok=True)
            del self._generations[name]

    def write(self) -> None:
        with written_whole(self._directory / _RECORD) as file:
            file.write(json.dumps({"generations": self._generations, "has_all": self.has_all}).encode())


class _File:
    """One object on its way to the disk."""

    def __init__(self, directory: Path, source: _Object) -> None:
        self.source = source
        self._target = directory / source.name
        self._partial = directory / f"{source.name}.partial"
        self._record = directory / f"{source.name}.chunks"
        self._lock = threading.Lock()
        self._done: set[int] = self._chunks_on_disk()

    @property
    def num_missing_bytes(self) -> int:
        return sum(stop - start for start, stop in map(self._range, self._missing()))

    def _missing(self) -> list[int]:
        num_chunks = -(-self.source.size // CHUNK_BYTES)
        return [index for index in range(num_chunks) if index not in self._done]

    def fetch(self, counter: _Counter) -> None:
        """Raises ModelSourceError for a checksum that is not the bucket's twice in a row, and the library's
        errors."""
        for is_last in (False, True):
            self._fetch_missing(counter)
            if _crc32c(self._partial) == self.source.crc32c:
                break
            self._partial.unlink()
            self._record.unlink()
            if is_last:
                raise ModelSourceError(
                    f"{self.source.name} does not have the checksum that its bucket states, twice in a row: "
                    "check the network and the disk, or upload it again"
                )
            logger.warning("%s came with a wrong checksum; fetching it again", self.source.name)
            self._done = set()
        os.replace(self._partial, self._target)
        self._record.unlink()

    def _chunks_on_disk(self) -> set[int]:
        record = _read_json(self._record)
        if record.get("generation") != self.source.generation or record.get("chunk_bytes") != CHUNK_BYTES:
            return set()
        return set(record["done"]) if self._partial.exists() else set()

    def _fetch_missing(self, counter: _Counter) -> None:
        # In place: what a former start has written stays.
        descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, self.source.size)
            self._write_record()
            _side_by_side(lambda index: self._fetch_chunk(descriptor, index, counter), self._missing())
        finally:
            os.close(descriptor)

    def _fetch_chunk(self, descriptor: int, index: int, counter: _Counter) -> None:
        start, stop = self._range(index)
        data = self._read(start, stop)
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, memoryview(data)[written:], start + written)
        # The record must not be ahead of the data, whatever ends the machine.
        os.fdatasync(descriptor)
        with self._lock:
            self._done.add(index)
            self._write_record()
        counter.add(stop - start)

    def _read(self, start: int, stop: int) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                data: bytes = self.source.blob.download_as_bytes(
                    start=start,
                    end=stop - 1,
                    raw_download=True,
                    if_generation_match=self.source.generation,
                    checksum=None,  # there is none of a part
                    retry=None,  # ours counts what came, too
                )
                if len(data) == stop - start:
                    return data
                problem: Exception = requests.exceptions.ConnectionError(
                    f"{len(data)} bytes came instead of {stop - start}"
                )
            except _UNREACHABLE as error:
                problem = error
            if attempt < ATTEMPTS:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        raise problem

    def _range(self, index: int) -> tuple[int, int]:
        return index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, self.source.size)

    def _write_record(self) -> None:
        record = {
            "generation": self.source.generation,
            "chunk_bytes": CHUNK_BYTES,
            "done": sorted(self._done),
        }
        with written_whole(self._record) as file:
            file.write(json.dumps(record).encode())


def _side_by_side(work: Callable[[int], None], items: Iterable[int]) -> None:
    """Call `work` with each of the items, in NUM_THREADS threads; raises what the first failure raised.

    The threads are daemons, which an executor's are not: a server told to end does not wait for the file.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    failures: list[BaseException] = []
    for item in items:
        waiting.put(item)

    def run() -> None:
        while not failures:
            try:
                work(waiting.get_nowait())
            except queue.Empty:
                return
            except BaseException as error:  # raised again below, by the thread that waits
                failures.append(error)

    threads = [threading.Thread(target=run, name="gcs", daemon=True) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class _Counter:
    """Sums up what came, for the caller; from any thread."""

    def __init__(self, total: int, progress: Callable[[DownloadProgress], None]) -> None:
        self._done = 0
        self._total = total
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._progress(DownloadProgress(self._done, self._total))


def _crc32c(path: Path) -> str:
    """As the bucket states it, in base64."""
    checksum: Any = Checksum()  # type: ignore[no-untyped-call]  # the library has no types
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            checksum.update(data)
    return base64.b64encode(checksum.digest()).decode()


def _read_json(path: Path) -> dict[str, Any]:
    """Empty if there is none, or one that was cut off."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
