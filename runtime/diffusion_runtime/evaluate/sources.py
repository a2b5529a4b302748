"""Where a network comes from: a folder in transformers' layout, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_runtime import strict_json
from diffusion_runtime.errors import HubError, InputError

CONFIG = "config.json"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WANTED = ("*.json", "*.txt", "*.safetensors")
"""Of a repository: no pickle is even downloaded."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def folder_of(source: str, what: str) -> Path:
    """The folder of ``source``, downloaded to the Hub's cache if it is a repository; ``what`` is the option's name.

    Raises InputError where it is neither, or holds no configuration or no safetensors; HubError where the Hub
    cannot be reached."""
    path = Path(source)
    if not path.is_dir():
        if path.exists() or not _REPOSITORY.fullmatch(source):
            raise InputError(f"{what} {source}: no such folder; expected a folder or a Hub id OWNER/NAME")
        path = _downloaded(source, what)
    if not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for kind in _PICKLES for file in path.glob(kind))
        said = f"only {', '.join(pickled)}, a pickle, which can run code" if pickled else "no weights"
        raise InputError(
            f"{what} {source}: holds {said}: expected .safetensors; save the network again with a current "
            "transformers, or name one that is stored as safetensors"
        )
    return path


def read_config(folder: Path) -> Mapping[str, Any]:
    """Its config.json. Raises InputError where that is missing or no JSON object."""
    return strict_json.read_object(folder / CONFIG, InputError)


def _downloaded(source: str, what: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    transport: type[Exception] = getattr(errors, "HTTPError", OSError)
    try:
        return Path(snapshot_download(source, allow_patterns=list(_WANTED)))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise InputError(
            f"{what} {source}: no such folder, and no such repository on the Hub, or it is private or gated"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, transport, OSError) as error:
        raise HubError(
            f"{what} {source}: no such folder, and the Hub cannot be reached "
            f"({' '.join(str(error).split())[:200]}); check the connection, or name a folder"
        ) from error
