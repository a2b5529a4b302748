"""Download of one variant from the Hub: only its files, compared with the server's hashes and the manifest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_convert.bundle import zip_names
from diffusion_convert.bundle.variants import Report
from diffusion_convert.hub.client import RemoteFile, check_repo_id, hub_errors, open_api, remote_files
from diffusion_runtime import zips
from diffusion_runtime.atomic import locked, move_into_place, remove
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.integrity import check_files
from diffusion_runtime.errors import HubError, InputError, PackageError
from diffusion_runtime.families import ATTENTIONS
from diffusion_runtime.real_path import is_there

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_STAGING = "download-"
_ATTEMPTS = 4


def download(
    repo_id: str,
    output: Path,
    *,
    variant: str | None = None,
    kind: str = "compiled",
    revision: str = "main",
    endpoint: str | None = None,
    token: str | None = None,
    report: Report = lambda _: None,
) -> Path:
    """Download ``{variant}/{kind}`` of a repository to ``output/{variant}/{kind}`` and return that folder.

    Where the repository has a zip of the variant's compiled models instead of their folder, that is unpacked. The
    revision is resolved once. The folder appears when everything in it has been checked; a download that was cut
    off goes on where it stopped, from a hidden work folder in ``output``.

    Raises InputError for what is not there, PackageError for damage, HubError where the connection fails, and
    StorageError where the disk does or another process is writing to ``output``.
    """
    check_repo_id(repo_id)
    if kind not in KINDS:
        raise InputError(f"--kind {kind!r}: expected {' or '.join(KINDS)}")
    with locked(output) as hidden:
        api = open_api(endpoint, token)
        with hub_errors(repo_id, "download"):
            commit = str(api.repo_info(repo_id, revision=revision).sha)
            there = remote_files(api, repo_id, commit)
        chosen = _choose(repo_id, there, variant, kind)
        target = output / chosen / kind
        if target.exists():
            raise _there_already(target)
        wanted = _wanted(there, chosen, kind)
        size = sum(remote.size for remote in wanted.values())
        report(f"{repo_id} at {commit[:12]}: {chosen}, {len(wanted)} files, {size / 1e6:.1f} MB")
        staging = hidden / f"{_STAGING}{commit}"
        for other in hidden.glob(f"{_STAGING}*"):
            if other != staging:
                remove(other)
        for name, remote in wanted.items():
            report(f"downloading {name}")
            _fetch(api, repo_id, commit, name, remote, staging)
        _put_in_place(staging, wanted, chosen, kind, target)
        remove(staging)
        return target


def _choose(repo_id: str, there: Mapping[str, RemoteFile], variant: str | None, kind: str) -> str:
    """The variant asked for, else the first that the repository has."""
    found = [name for name in ATTENTIONS if _wanted(there, name, kind)]
    if variant is None and found:
        return found[0]
    if variant in found:
        return str(variant)
    shown = ", ".join(found) or "none"
    other = next(name for name in KINDS if name != kind)
    others = [name for name in ATTENTIONS if variant in (None, name) and _wanted(there, name, other)]
    hint = f"; there are {other} of {', '.join(others)}: give --kind {other}" if others else ""
    raise InputError(f"{repo_id}: has no {kind} of {variant or 'any variant'} (found: {shown}){hint}")


def _wanted(there: Mapping[str, RemoteFile], variant: str, kind: str) -> dict[str, RemoteFile]:
    """The files of a variant, hidden ones left out, or the one zip that holds them."""
    inside = {
        name: remote
        for name, remote in there.items()
        if name.startswith(f"{variant}/{kind}/") and not any(part.startswith(".") for part in name.split("/"))
    }
    if inside or kind != "compiled":
        return inside
    zips_of = {name: remote for name, remote in there.items() if name.endswith(zip_names.ending(variant))}
    ordered = sorted(zips_of.items(), key=lambda item: zip_names.is_of_further_size(item[0]))
    return dict(ordered[:1])


def _fetch(api: HfApi, repo_id: str, commit: str, name: str, remote: RemoteFile, staging: Path) -> None:
    """One file to ``staging``, going on with a partial one, in several tries where the server or the connection
    fails. Raises PackageError for other content."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with hub_errors(repo_id, f"download of {name}"):
                path = Path(api.hf_hub_download(repo_id, name, revision=commit, local_dir=staging))
            break
        except HubError:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(2**attempt)
    if not remote.equals(path):
        size = path.stat().st_size
        path.unlink()
        raise PackageError(
            f"{repo_id}: {name} is damaged: {size} bytes of {remote.size}, or other content than the server's hash "
            "says; download it again"
        )


def _put_in_place(staging: Path, wanted: Mapping[str, RemoteFile], variant: str, kind: str, target: Path) -> None:
    folder = staging / variant / kind
    if len(wanted) == 1 and next(iter(wanted)).endswith(".zip"):
        remove(staging / "unpacked")
        folder = zips.unpack(staging / next(iter(wanted)), staging / "unpacked")
    if is_there(folder / manifest.FILE_NAME, PackageError):
        check_files(manifest.read(folder), folder)
    if not move_into_place(folder, target):
        raise _there_already(target)


def _there_already(target: Path) -> InputError:
    return InputError(f"{target}: exists already; remove it or choose another folder")
