"""Downloads a model from the Hugging Face hub into its usual cache.

Laws:
1. Only configuration, tokenizer and weights in safetensors or GGUF are ever asked for: no pickle, no code.
2. A file in the cache is complete: the library downloads under another name and renames. After a broken
   connection it goes on where it was (a Range request); a later start keeps the files that were finished.
3. If the hub cannot be reached, a copy in the cache will do.

HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_HUB_DISABLE_PROGRESS_BARS are honoured by the library.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from huggingface_hub import constants, errors
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # that of its HTTP library
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils.tqdm import tqdm

from server.model_download import CONFIG_FILES, check_space, disk_filled_up, listing, model_files
from server.model_source import DownloadProgress, ModelSourceError

logger = logging.getLogger(__name__)


def fetch(
    repo: str,
    file: str | None,
    revision: str,
    cache_dir: Path | None,
    progress: Callable[[DownloadProgress], None],
) -> Path:
    """Have `file` of a repository, or else the files that make up its model, in the cache.

    Draws a progress bar if stderr is a terminal. Returns the directory they are in; raises ModelSourceError.
    """
    endpoint = constants.ENDPOINT
    try:
        return _Repository(repo, revision, cache_dir).fetch(file, progress)
    except errors.GatedRepoError as error:
        reason = (
            f"{repo} is gated: accept the licence at {endpoint}/{repo} and set HF_TOKEN to a token of the "
            "account that did"
        )
        raise ModelSourceError(reason) from error
    except errors.RepositoryNotFoundError as error:
        reason = (
            f"{repo} does not exist at {endpoint}, or is private: check the spelling, or set HF_TOKEN to a "
            "token that may read it"
        )
        raise ModelSourceError(reason) from error
    except errors.RevisionNotFoundError as error:
        raise ModelSourceError(f"{repo} has no revision {revision!r}: check --revision") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "HF_TOKEN may be wrong or expired" if status in (401, 403) else "try again later"
        raise ModelSourceError(f"{endpoint} answered {status} for {repo}: {remedy}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_filled_up(repo) from error
        raise ModelSourceError(f"the download of {repo} failed: {error}") from error
    except ModelSourceError:
        raise
    except Exception as error:
        # A connection that stays broken raises classes of the HTTP and Xet libraries beneath huggingface_hub,
        # which it does not name.
        reason = (
            f"the download of {repo} failed ({type(error).__name__}: {error}): start again to go on, finished "
            "files are kept"
        )
        raise ModelSourceError(reason) from error


class _Repository:
    """A repository of the hub at one revision. Its methods raise the library's errors."""

    def __init__(self, repo: str, revision: str, cache_dir: Path | None) -> None:
        self._repo = repo
        self._revision = revision
        self._cache_dir = cache_dir

    def fetch(self, file: str | None, progress: Callable[[DownloadProgress], None]) -> Path:
        try:
            info = hub.model_info(self._repo, revision=self._revision, files_metadata=True)
        except (OSError, HTTPError) as error:
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
                raise
            return self._cached(file, error)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        if file is not None and file not in sizes:
            raise ModelSourceError(f"{self._repo} has no file {file}; it has {listing(sizes)}")
        wanted = [file] if file is not None else model_files(self._repo, sizes, f"{self._repo}:FILE")
        return self._download(info, {name: sizes[name] for name in wanted}, progress)

    def _cached(self, file: str | None, reason: Exception) -> Path:
        """The copy in the cache, after `reason` kept the hub from answering."""
        try:
            directory = Path(
                hub.snapshot_download(
                    self._repo,
                    revision=self._revision,
                    cache_dir=self._cache_dir,
                    allow_patterns=[file] if file is not None else [*CONFIG_FILES, "*.safetensors"],
                    local_files_only=True,
                )
            )
            if file is not None and not (directory / file).exists():
                raise errors.LocalEntryNotFoundError(f"{file} is not in {directory}")
        except errors.LocalEntryNotFoundError:
            first_line = str(reason).partition("\n")[0]
            raise ModelSourceError(
                f"{self._repo} is not in the cache, and {constants.ENDPOINT} cannot be reached ({first_line}): "
                "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give --model a local directory"
            ) from reason
        if not isinstance(reason, errors.OfflineModeIsEnabled):
            logger.warning("%s did not answer; using the cached copy of %s", constants.ENDPOINT, self._repo)
        return directory

    def _download(
        self, info: ModelInfo, sizes: dict[str, int], progress: Callable[[DownloadProgress], None]
    ) -> Path:
        """One file after another, so that a start that is cut off loses one unfinished file at most."""
        commit = info.sha
        absent = [name for name in sizes if not self._is_cached(name, commit)]
        total = sum(sizes[name] for name in absent)
        check_space(self._repo, total, self._cache_dir or Path(constants.HF_HUB_CACHE))
        directory = Path()
        # disable=None: the bar is drawn on terminals only.
        bar = tqdm(  # type: ignore[no-untyped-call]  # tqdm has no types
            desc=self._repo, total=total, unit="B", unit_scale=True, disable=None if absent else True
        )
        with bar:
            counter = _Counter(total, bar.update, progress)
            for index, name in enumerate(sizes):
                path = hub.hf_hub_download(
                    self._repo,
                    name,
                    # Given by name once, so that the library notes its commit, for starts without the network.
                    revision=self._revision if index == 0 else commit,
                    cache_dir=self._cache_dir,
                    tqdm_class=_bar_class(counter.add),
                )
                directory = Path(path).parent
        return directory

    def _is_cached(self, name: str, commit: str | None) -> bool:
        return isinstance(hub.try_to_load_from_cache(self._repo, name, self._cache_dir, commit), str)


class _Counter:
    """Sums up what was downloaded, for the terminal's bar and for the caller."""

    def __init__(
        self, total: int, draw: Callable[[int], object], progress: Callable[[DownloadProgress], None]
    ) -> None:
        self._done = 0
        self._total = total
        self._draw = draw
        self._progress = progress

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._draw(num_bytes)
        self._progress(DownloadProgress(self._done, self._total))


def _bar_class(add: Callable[[int], None]) -> type[Any]:
    """What the library shall take for its progress bar of one file: draws nothing and passes the bytes on."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            add(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, which the library may count beside those on the disk."""

        def set_transfer_postfix_str(self, postfix: str, refresh: bool = False) -> None:
            """Likewise their speed."""

    return Bar
