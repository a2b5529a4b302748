"""Upload of a folder that `convert` wrote. What the server has already is not sent again, so it can be resumed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_convert.bundle.how_to_run import REPOSITORY
from diffusion_convert.bundle.model_card import CARD_NAME, PICTURES, card_of
from diffusion_convert.bundle.sizes import packed
from diffusion_convert.bundle.variants import Report, required_variants, sweep_variants
from diffusion_convert.bundle.zip_names import stem_of, zip_names
from diffusion_convert.hub.client import check_repo_id, hub_errors, open_api, remote_files
from diffusion_runtime import zips
from diffusion_runtime.atomic import locked, unfinished_file
from diffusion_runtime.bundle.integrity import Hashes, check_files
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.errors import InputError, PackageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True, slots=True)
class Upload:
    """What would be uploaded: paths relative to the folder, and bytes in all. ``card`` is the model card that names
    the repository; ``notes`` are for the user."""

    repo_id: str
    private: bool
    files: tuple[str, ...]
    size_bytes: int
    card: bytes
    notes: tuple[str, ...] = ()


def planned_upload(folder: Path, repo_id: str, private: bool = True, unverified: bool = False) -> Upload:
    """Check the folder against its manifests and list its files; nothing is written.

    Raises InputError for no such folder and, unless ``unverified``, for components that were not verified (models
    of other tools among them); PackageError where files are missing or changed.
    """
    check_repo_id(repo_id)
    unmeasured: list[str] = []
    described, known = required_variants(folder), Hashes()
    for attention, kinds in described.items():
        for kind, made in kinds.items():
            check_files(made, folder / attention / kind, known)
            if kind == "compiled":
                _check_zips(folder, attention, made, set(described), known)
            unmeasured += [
                f"{attention}/{kind} {name}" for name, part in made.components.items() if not part.psnr_db
            ]
    if unmeasured and not unverified:
        raise InputError(
            f"{folder}: not verified: {', '.join(unmeasured)}; convert without --no-verify, or publish with "
            "--unverified (models of other tools: after `verify --against SOURCE`)"
        )
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    sizes = {name: path.stat().st_size for name, path in found.items() if _published(path.relative_to(folder))}
    written = found[CARD_NAME].read_bytes() if CARD_NAME in found else card_of(folder, described).encode()
    card = _naming(written, repo_id)
    sizes[CARD_NAME] = len(card)
    return Upload(repo_id, private, tuple(sorted(sizes)), sum(sizes.values()), card, _notes(repo_id, sizes))


def _check_zips(folder: Path, attention: str, made: Manifest, variants: set[str], known: Hashes) -> None:
    for name, size in zip_names(made, attention, variants).items():
        path = folder / name
        models, without, instead = packed(made, folder / attention / "compiled", size, known)
        if path.exists() and (fault := zips.fault(path, models, known.of, without, instead)) is not None:
            raise PackageError(f"{path}: {fault}: make it again with `coreml-sd bundle {folder} --zip`")


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    unverified: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    report: Report = lambda _: None,
) -> str:
    """Upload the folder to the model repository ``repo_id``, made if it is not there; return its address.

    Raises as `planned_upload` does, HubError where the connection fails, and StorageError where another process is
    writing to the folder; it is locked during the upload. The model card is written if the folder has none, and
    names the repository. One commit for each variant's packages and compiled models, the zips, and last the model
    card.
    """
    check_repo_id(repo_id)
    if not folder.is_dir():
        required_variants(folder)
    with locked(folder):
        sweep_variants(folder)
        upload = planned_upload(folder, repo_id, private, unverified)
        _write_card(folder / CARD_NAME, upload.card)
        for note in upload.notes:
            report(f"note: {note}")
        api = open_api(endpoint, token)
        with hub_errors(repo_id, "upload"):
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            there = remote_files(api, repo_id, "main")
            missing = [name for name in upload.files if name not in there or not there[name].equals(folder / name)]
            report(f"{len(upload.files) - len(missing)} of {len(upload.files)} files are there already")
            for group, names in _groups(missing):
                report(f"uploading {group}: {len(names)} files")
                _commit(api, folder, repo_id, group, names)
        return str(url)


def _notes(repo_id: str, names: Iterable[str]) -> tuple[str, ...]:
    """Hugging Face's app builds the zips' addresses from the repository's name: they had better be the same."""
    stems = {stem for name in names if (stem := stem_of(name))}
    if not stems or repo_id.rpartition("/")[2] in stems:
        return ()
    owner = repo_id.rpartition("/")[0]
    fitting = " or ".join(f"{owner}/{stem}" for stem in sorted(stems))
    return (f"Hugging Face's app finds the zips only in a repository that is named like them: {fitting}",)


def _naming(card: bytes, repo_id: str) -> bytes:
    """The model card with the repository's id in its commands."""
    stands_for = REPOSITORY.encode()
    return re.sub(rb"(?<=download )%b\b|(?<=modelId: \")%b\b" % (stands_for, stands_for), repo_id.encode(), card)


def _write_card(path: Path, card: bytes) -> None:
    if not path.is_file() or path.read_bytes() != card:
        with unfinished_file(path) as unfinished:
            unfinished.write_bytes(card)


def _commit(api: HfApi, folder: Path, repo_id: str, group: str, names: list[str]) -> None:
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    api.create_commit(repo_id, operations, commit_message=f"Add {group}")


def _groups(names: list[str]) -> list[tuple[str, list[str]]]:
    """Files by what they belong to; the model card comes last, when all that it names is there."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        group = "/".join(parts[:2]) if len(parts) > 2 else "the model card" if name == CARD_NAME else name
        groups.setdefault(group, []).append(name)
    return sorted(groups.items(), key=lambda item: (item[0] == "the model card", item[0]))


def _published(path: Path) -> bool:
    """Models, tokenizers, manifests, zips, card, license and pictures; nothing hidden or left over."""
    if any(part.startswith(".") for part in path.parts):
        return False
    if len(path.parts) > 2:
        return True
    return path.suffix in (".zip", *PICTURES) or path.name in (CARD_NAME, "LICENSE", "LICENSE.md", "LICENSE.txt")
