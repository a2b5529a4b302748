"""Repositories of models on the Hugging Face Hub, or on a server that speaks its API: what is there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from diffusion_runtime.atomic import is_disk_error
from diffusion_runtime.bundle.integrity import sha256
from diffusion_runtime.errors import HubError, InputError, PackageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAY_PASS = (408, 429, *range(500, 600))
"""HTTP states of a server or a connection that is overloaded or broken for now."""
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_UNREACHED = ("ConnectError", "ConnectTimeout")
"""httpx's names, of whichever generation of it the client uses, for a server with which nothing began."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """``sha256`` of a large file, else ``blob``, the name that git gives the content."""

    size: int
    blob: str
    sha256: str | None = None

    def equals(self, path: Path) -> bool:
        """Whether ``path`` holds the same bytes."""
        if path.stat().st_size != self.size:
            return False
        return sha256(path) == self.sha256 if self.sha256 else git_blob(path) == self.blob


def git_blob(path: Path) -> str:
    """The SHA-1 under which git stores the file's content: a name, no protection."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def open_api(endpoint: str | None, token: str | None) -> HfApi:
    """A client of ``endpoint`` (else HF_ENDPOINT, else the Hub) with ``token``, else the one that is logged in."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=token, library_name="coreml-sd")


def check_repo_id(repo_id: str) -> None:
    """Raise InputError unless ``repo_id`` is of the form owner/name."""
    if not _REPO_ID.fullmatch(repo_id) or ".." in repo_id:
        raise InputError(f"repository {repo_id!r}: expected OWNER/NAME, as in maker/coreml-stable-diffusion-v1-5")


def remote_files(api: HfApi, repo_id: str, revision: str) -> Mapping[str, RemoteFile]:
    """All files of a revision by path. Raises PackageError for a path that would leave a folder."""
    from huggingface_hub.hf_api import RepoFile

    found = {}
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision):
        if not isinstance(entry, RepoFile):
            continue
        pure = PurePosixPath(entry.path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in entry.path or ":" in entry.path:
            raise PackageError(f"{repo_id}: names a file {entry.path!r} outside of the repository; refused")
        found[entry.path] = RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
    return found


@contextmanager
def hub_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Turn the client's errors into one line that says what to do: HubError where that is to try again, else
    InputError. What the disk refuses passes."""
    from huggingface_hub import errors

    transport: type[Exception] = getattr(errors, "HTTPError", OSError)  # httpx's, for lost connections
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise InputError(
            f"{repo_id}: no such repository, or it is private or gated: check the name, accept its terms on the "
            "Hub, or log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo_id}: no such revision") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        if status in (401, 403):
            raise InputError(
                f"{repo_id}: {doing} is not allowed (HTTP {status}): log in with `hf auth login`"
            ) from error
        kind = HubError if status in _MAY_PASS else InputError
        raise kind(f"{repo_id}: {doing} failed: HTTP {status}: {_one_line(error)}") from error
    except (transport, OSError, RuntimeError) as error:  # RuntimeError: an upload that broke off
        if isinstance(error, OSError) and is_disk_error(error):
            raise
        reason = next((cause for cause in _causes(error) if type(cause).__name__ in _UNREACHED), None)
        if reason is not None:
            raise HubError(
                f"{repo_id}: {doing} failed: cannot reach the Hub ({_one_line(reason)}); check the connection, "
                "--endpoint and HF_ENDPOINT"
            ) from error
        raise HubError(
            f"{repo_id}: {doing} failed: {_one_line(error)}; try again, it goes on where it stopped"
        ) from error
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{repo_id}: {doing} failed: the server's answer is not the Hub's ({_one_line(error)}); check "
            "--endpoint and HF_ENDPOINT"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
