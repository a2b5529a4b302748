"""A checkpoint on the Hugging Face Hub: what is needed of one commit, through huggingface_hub's cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_convert.checkpoint import diffusers_unet
from diffusion_convert.checkpoint.diffusers_folder import (
    CARD,
    INDEX,
    NETWORKS,
    SCHEDULERS,
    TOKENIZERS,
    open_folder,
    part_names,
    read_license,
    weight_files,
)
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.vocabulary import T5_FILES, TOKENIZER_FILES
from diffusion_convert.hub import client
from diffusion_runtime import strict_json
from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.bundle.integrity import sha256
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError, HubError
from diffusion_runtime.real_path import real_path

if TYPE_CHECKING:
    from huggingface_hub import HfApi


FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")
"""How names of files end, which are no names of repositories."""


def open_repository(
    repo_id: str,
    revision: str | None = None,
    family: str | None = None,
    variant: str | None = None,
    without: Collection[str] = (),
) -> Checkpoint:
    """The checkpoint in a repository of the Hub, downloaded where it is not in the cache.

    ``revision`` (branch, tag or commit; None: the main branch) is resolved to a commit once, which is used for
    all files. Tokens are taken from HF_TOKEN and the login. Where the Hub cannot be reached, or HF_HUB_OFFLINE is
    set, what the cache has of that revision is used. Raises CheckpointError or InputError, in one line.
    """
    folder = _fetch(repo_id, revision, partial(checkpoint_files, variant=variant, without=without))
    source = Source(name=repo_id, revision=folder.name, license=read_license(folder))
    return open_folder(folder, source, family, variant, without)


def fetch_unet(repo_id: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a UNet that has a repository of its own, or of a whole checkpoint."""
    return _fetch(repo_id, revision, partial(unet_files, variant=variant))


def fetch_network(repo_id: str, part: str) -> Path:
    """The folder of a network ("vae", "controlnet"): of a repository that holds nothing else, or of a checkpoint's,
    in whose folder ``part`` it lies."""
    return _fetch(repo_id, None, partial(network_files, part=part))


def network_folder(source: str, part: str) -> tuple[Path, Source]:
    """The folder of a network, and where it is from. ``source``: a folder on this machine, or `fetch_network`'s
    repository; that of a pipeline may be named, in whose folder ``part`` the network lies."""
    folder = Path(source).expanduser()
    name, revision = diffusers_unet.name_of(real_path(folder)), None
    if not folder.is_dir():
        folder = fetch_network(repository_id(source), part)
        name, revision = source, folder.name
    inner = folder / part
    is_pipeline = not (folder / "config.json").is_file() and (inner / "config.json").is_file()
    origin = Source(name=name, revision=revision, license=read_license(folder))
    return inner if is_pipeline else folder, origin


def repository_id(source: str) -> str:
    """``source``, if it is of the form owner/name. Raises CheckpointError otherwise: it means a path, and there is
    nothing at that path."""
    if not is_repository_id(source):
        raise CheckpointError(f"{source}: no such file or folder")
    return source


def is_repository_id(source: str) -> bool:
    """Whether ``source`` is of the form owner/name, and nothing about it says that a path is meant."""
    owner, slash, name = source.partition("/")
    plain = all(part and part[0] not in ".~" and "/" not in part for part in (owner, name))
    return bool(slash) and plain and not name.endswith(FILES)


def is_file_id(source: str) -> bool:
    """Whether ``source`` is a file of weights in the form OWNER/NAME/FILE, and does not begin as a path does."""
    return source.count("/") > 1 and source.endswith(FILES) and not source.startswith(("/", ".", "~"))


def network_file(source: str) -> tuple[Path, str, Source] | None:
    """The file of a network that ``source`` names, here or as OWNER/NAME/PATH on the Hub, what it is called, and
    where it is from; None where a folder is named."""
    path = Path(source).expanduser()
    if not path.exists() and is_file_id(source):
        path = fetch_file(source)
    if not path.is_file():
        return None
    # Not resolved: a file in the Hub's cache is a link to one that is called by its hash.
    return path, diffusers_unet.name_of(path.absolute()), Source(name=path.name, sha256=sha256(path))


def fetch_file(place: str, folder: str | None = None) -> Path:
    """A file on the Hub, named as OWNER/NAME/PATH, with the ``folder`` of a network beside it.
    Raises CheckpointError where there is none of that name."""
    repo_id, path = _apart(place)
    beside = "" if folder is None else f"{path.rpartition('/')[0]}/{folder}".lstrip("/")

    def needed(names: frozenset[str], read_json: ReadJson) -> tuple[str, ...]:
        if path not in names:
            raise CheckpointError(f"{repo_id}: has no file {path}; it has {', '.join(sorted(names)[:5])}, …")
        return (path, *(_network_files(names, read_json, beside) if beside else ()))

    return _found(_fetch(repo_id, None, needed) / path, place)


def fetch_one(repo_id: str, known: Sequence[str]) -> Path:
    """The first of the ``known`` files that a repository has. Raises CheckpointError where it has none."""

    def needed(names: frozenset[str], _: ReadJson) -> tuple[str, ...]:
        found = tuple(name for name in known if name in names)[:1]
        if not found:
            raise CheckpointError(f"{repo_id}: has no {' and no '.join(known)}: name a file, {repo_id}/FILE")
        return found

    folder = _fetch(repo_id, None, needed)
    return next(folder / name for name in known if (folder / name).exists())


def fetch_folder(place: str) -> Path:
    """The folder of a network on the Hub, named as OWNER/NAME/PATH."""
    repo_id, path = _apart(place)

    def needed(names: frozenset[str], read_json: ReadJson) -> tuple[str, ...]:
        if not (files := _network_files(names, read_json, path)):
            raise CheckpointError(f"{repo_id}: has no folder {path} with a config.json")
        return tuple(files)

    return _found(_fetch(repo_id, None, needed) / path, place)


def _apart(place: str) -> tuple[str, str]:
    """The repository, and what is named of it."""
    owner, _, rest = place.partition("/")
    name, _, path = rest.partition("/")
    if not path or place.startswith(("/", ".", "~")) or ".." in place.split("/"):
        raise CheckpointError(f"{place}: no such file, and no OWNER/NAME/PATH of the Hugging Face Hub")
    return f"{owner}/{name}", path.rstrip("/")


def _found(path: Path, place: str) -> Path:
    if not path.exists():
        raise CheckpointError(f"{place}: is not in the cache of the Hugging Face Hub, which cannot be reached")
    return path


MAIN_REVISION = "main"
"""What the Hub calls the branch that is meant where none is named."""
ReadJson = Callable[[str], Mapping[str, Any]]
"""One of the repository's JSON files, by its name."""
Needed = Callable[[frozenset[str], ReadJson], tuple[str, ...]]
"""What is read of a repository's files, given their names."""


def checkpoint_files(
    names: frozenset[str], read_json: ReadJson, variant: str | None = None, without: Collection[str] = ()
) -> tuple[str, ...]:
    """The files of a checkpoint, except those of the parts in ``without``. model_index.json says which parts there
    are. Empty if there is no model_index.json."""
    if INDEX not in names:
        return ()
    needed = {INDEX, CARD}
    for part in (part for part in part_names(read_json(INDEX)) if part not in without):
        if part in NETWORKS:
            needed |= _network_files(names, read_json, part, variant)
        elif part in SCHEDULERS:
            needed.add(f"{part}/scheduler_config.json")
        elif part in TOKENIZERS:
            needed |= {f"{part}/{name}" for name in (*TOKENIZER_FILES, *T5_FILES)}
    return tuple(sorted(needed & names))


def unet_files(names: frozenset[str], read_json: ReadJson, variant: str | None = None) -> tuple[str, ...]:
    """The files of a UNet at the top of a repository and the card; of a whole checkpoint model_index.json alone."""
    return (INDEX,) if INDEX in names else _with_card(_network_files(names, read_json, "", variant), names)


def network_files(names: frozenset[str], read_json: ReadJson, part: str) -> tuple[str, ...]:
    """The files of a network, in the folder ``part`` or at the top, and the card."""
    found = _network_files(names, read_json, part) or _network_files(names, read_json, "")
    return _with_card(found, names)


def _with_card(found: set[str], names: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted((found | {CARD}) & names)) if found else ()


def _network_files(names: frozenset[str], read_json: ReadJson, folder: str, variant: str | None = None) -> set[str]:
    """The files of the network in a folder of a repository, "" for its top; none where there is no network."""
    prefix = f"{folder}/" if folder else ""
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if "config.json" not in inside:
        return set()
    files = weight_files(inside, lambda name: read_json(prefix + name), variant)
    indices = {name for name in inside if name.endswith(".json") and ".index." in name} if len(files) > 1 else set()
    return {f"{prefix}{name}" for name in {"config.json", *files, *indices} & inside}


def _fetch(repo_id: str, revision: str | None, needed: Needed) -> Path:
    from huggingface_hub import constants, errors

    client.check_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        return _cached(repo_id, revision)
    api = client.open_api(None, None)
    transport: type[Exception] = getattr(errors, "HTTPError", OSError)  # httpx's, for lost connections
    with client.hub_errors(repo_id, "downloading"):
        try:
            info = api.model_info(repo_id, revision=revision)
        except errors.HfHubHTTPError:
            raise
        except (transport, OSError):
            return _cached(repo_id, revision, HubError)
        return _download(api, repo_id, revision, info, needed)


def _download(api: HfApi, repo_id: str, revision: str | None, info: Any, needed: Needed) -> Path:
    commit = str(info.sha)
    names = frozenset(sibling.rfilename for sibling in info.siblings or ())

    def read_json(name: str) -> Mapping[str, Any]:
        path = api.hf_hub_download(repo_id, name, revision=commit)
        return strict_json.read_object(Path(path), CheckpointError)

    files = needed(names, read_json)
    if not files:
        raise CheckpointError(
            f"{repo_id}: nothing that can be converted: the repository has no {INDEX} (it has "
            f"{', '.join(sorted(names)[:5]) or 'no files'}); download a single .safetensors file and name that"
        )
    folder = Path(api.snapshot_download(repo_id, revision=commit, allow_patterns=list(files)))
    _note_revision(folder, revision or MAIN_REVISION)
    return folder


def _note_revision(snapshot: Path, name: str) -> None:
    """Note in the cache what the revision's name stands for, to be found by it offline, as huggingface_hub does:
    refs/NAME next to snapshots/COMMIT. Asked to, it would resolve the name once more, perhaps to another commit."""
    if name == snapshot.name or ".." in Path(name).parts or Path(name).is_absolute():
        return
    note = snapshot.parent.parent / "refs" / name
    with unfinished_file(note) as unfinished:
        unfinished.write_text(snapshot.name, encoding="utf-8")


def _cached(
    repo_id: str, revision: str | None, failure: type[HubError] | type[CheckpointError] = CheckpointError
) -> Path:
    """The snapshot in the cache; raises ``failure`` where there is none."""
    from huggingface_hub import errors, snapshot_download

    try:
        # Asked for everything, it would miss what was not needed. Whether the needed is there, is seen later.
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[INDEX]))
    except (errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        raise failure(
            f"{repo_id}: there is no such folder here, the Hugging Face Hub cannot be reached, and its cache does "
            f"not hold {'the main revision' if revision is None else f'revision {revision}'} of such a repository; "
            "check the spelling and the connection (HF_HUB_OFFLINE must not be set to download)"
        ) from error
