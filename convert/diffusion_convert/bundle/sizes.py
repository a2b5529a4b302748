"""A folder for each further size of a variant, complete for apps that know one size.

DIR/{attention}/compiled/          the models for the first size, as if there was no other
DIR/{attention}/compiled/768x512/  those for another: hard links of what is the same, and a manifest of its own

Packages of several functions have all sizes in them: there are no such folders.
"""

from __future__ import annotations

from pathlib import Path

from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.integrity import Hashes, measured, tokenizer_files, tokenizer_hashes
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.bundle.views import of_size
from diffusion_runtime.links import share_file, share_tree
from diffusion_runtime.picture_size import Size


def size_folder(folder: Path, size: Size | None) -> Path:
    """Where the models for a size are; None: the first."""
    return folder if size is None else folder / str(size)


def packed(
    made: Manifest, folder: Path, size: Size | None, known: Hashes | None = None
) -> tuple[Path, set[str], dict[str, bytes]]:
    """What a zip of the models for a size holds, None: the first: the folder, without which of its own, and what
    instead of the content of files: the first size's manifest knows no other there."""
    others = set(map(str, made.size_folders))
    if size is not None or not others:
        return size_folder(folder, size), others, {}
    alone = of_size(made, made.sizes[0])
    components = {
        name: one.model_copy(update={**measured(folder, one.files, known), "sizes": {}})
        for name, one in alone.components.items()
    }
    told = manifest.as_bytes(alone.model_copy(update={"components": components}))
    return folder, others, {manifest.FILE_NAME: told}


def write_size_folders(made: Manifest, folder: Path, known: Hashes | None = None) -> None:
    """Complete the folders of further sizes in ``folder``, whose manifest is ``made``: what is not there already is
    linked from it."""
    for size in made.size_folders:
        place = folder / str(size)
        place.mkdir(exist_ok=True)
        components = {}
        for name, component in of_size(made, size).components.items():
            files = tuple(file.removeprefix(f"{size}/") for file in component.files)
            for source, name_there in zip(component.files, files, strict=True):
                if not (place / name_there).exists():
                    share_tree(folder / source, place / name_there)
            components[name] = component.model_copy(update={**measured(place, files, known), "files": files})
        tokenizers = (made.tokenizer, made.tokenizer_2, made.tokenizer_3)
        for where in (where for where in tokenizers if where is not None):
            for file in tokenizer_files(folder / where):
                share_file(file, place / where / file.name)
        update = {"tokenizer_sha256": tokenizer_hashes(place, tokenizers, known), "components": components}
        manifest.write(of_size(made, size).model_copy(update=update), place)
