"""`bundle`, `compile` and `palettize` on damaged folders, beside other processes, and when they are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import small_bundle
from diffusion_convert.bundle.folder import BundleOptions, bundle_folder
from diffusion_convert.bundle.variants import read_variants
from diffusion_convert.compile import compile_package
from diffusion_convert.hub.publish import planned_upload
from diffusion_convert.palettize.checked import palettize_checked
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_runtime.atomic import WORK_FOLDER, locked, unfinished_file
from diffusion_runtime.bundle import integrity, manifest
from diffusion_runtime.bundle.integrity import check_files
from diffusion_runtime.errors import InputError, PackageError, StorageError
from diffusion_runtime.mil.package import open_package
from kill_points import Forks

ZIPS = BundleOptions(zips=True)
WEIGHTS = {
    "packages": f"{small_bundle.NAME}_vae_decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    "compiled": "VAEDecoder.mlmodelc/weights/weight.bin",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(folder: Path) -> None:
    """Every file is as its manifest says, and nothing unfinished lies about."""
    for attention, kinds in read_variants(folder).items():
        assert kinds.keys() == {"packages", "compiled"}
        for kind, made in kinds.items():
            check_files(made, folder / attention / kind)
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def finished(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_bundle.write_bundle(tmp_path_factory.mktemp("finished") / "out")
    forks.call(bundle_folder, folder, ZIPS)  # what it imports is there for those that are forked
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_bundle.write_bundle(tmp_path / "out")


@pytest.fixture
def source(folder: Path) -> Path:
    """A package of its own."""
    return folder / "original" / "packages" / f"{small_bundle.NAME}_unet.mlpackage"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weight.bin", "vocab.json", "merges.txt"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_damage_is_named_and_nothing_is_touched(kind: str, name: str, finished: Path, tmp_path: Path) -> None:
    """One damaged file among four equal ones that are not linked yet: it must not take the others' place. Those of
    the tokenizer are copied from the packages, and zipped."""
    folder = shutil.copytree(finished, tmp_path / "out")
    flip(folder / "split_einsum_v2" / kind / (WEIGHTS[kind] if name == "weight.bin" else name))
    before = contents(folder)
    with pytest.raises(PackageError, match=f"split_einsum_v2/{kind}/manifest.json: .*{name} has changed"):
        bundle_folder(folder, ZIPS)
    assert contents(folder) == before


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [zeros, emptied])
def test_what_a_power_cut_leaves_is_named(damage: Callable[[Path], None], finished: Path, tmp_path: Path) -> None:
    """Files that were renamed into place before their contents came to the disk: every single one, in turn."""
    folder = shutil.copytree(finished, tmp_path / "out")
    files = [file for file in sorted((folder / "original").rglob("*")) if file.is_file()]
    assert {"vocab.json", "merges.txt", "manifest.json", "weight.bin", "model.mil"} <= {file.name for file in files}
    for file in files:
        data = file.read_bytes()
        damage(file)
        inside = file.relative_to(folder / "original").parts
        named = "manifest.json" if file.name == "manifest.json" else "/".join(inside[1:])
        with pytest.raises(PackageError, match=re.escape(named)):
            planned_upload(folder, "maker/model")
        with pytest.raises(PackageError, match=re.escape(named)):
            bundle_folder(folder, ZIPS)
        file.write_bytes(data)
    assert contents(folder) == contents(finished)


def test_nothing_is_forced_to_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What README says of power cuts; whoever changes that changes README."""
    asked: list[str] = []
    for name in ("fsync", "fdatasync", "sync"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, lambda *_, name=name: asked.append(name))
    bundle_folder(folder, ZIPS)
    assert asked == []
    assert "they are not forced to the disk" in (Path(__file__).parents[3] / "README.md").read_text()


@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer_2/added_tokens.json"])
def test_every_file_of_both_tokenizers_has_its_hash(name: str, tmp_path: Path) -> None:
    """SDXL's packages: wherever the two tokenizers lie, and with all their files."""
    folder = small_bundle.write_bundle(tmp_path / "out", ("original",))
    packages = folder / "original" / "packages"
    for place in ("tokenizer", "tokenizer_2"):
        (packages / place).mkdir()
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(packages / file, packages / place)
    (packages / "tokenizer_2" / "added_tokens.json").write_text('{"<cat-toy>": 1}')
    told = {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer_2"}
    hashes = integrity.tokenizer_hashes(packages, told.values())
    made = manifest.read(packages).model_copy(update={**told, "tokenizer_sha256": hashes})
    manifest.write(made, packages)
    bundle_folder(folder, ZIPS)
    compiled = manifest.read(folder / "original" / "compiled").tokenizer_sha256
    assert sorted(compiled) == [
        "merges.txt",
        *(f"tokenizer_2/{file}" for file in ("added_tokens.json", "merges.txt", "vocab.json")),
        "vocab.json",
    ]
    flip(packages / name)
    with pytest.raises(PackageError, match=f"manifest.json: does not fit the files: {name} has changed"):
        bundle_folder(folder, ZIPS)


def test_a_manifest_without_hashes_of_the_tokenizer_is_read(tmp_path: Path) -> None:
    """As version 0.1 and earlier commits wrote it: what is compiled of it has them."""
    folder = small_bundle.write_bundle(tmp_path / "out", ("original",))
    path = folder / "original" / "packages" / "manifest.json"
    told = json.loads(path.read_text())
    del told["tokenizer_sha256"]
    path.write_text(json.dumps(told))
    bundle_folder(folder, ZIPS)
    assert manifest.read(folder / "original" / "compiled").tokenizer_sha256.keys() == {"vocab.json", "merges.txt"}


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_compiled_folder_without_its_vocabulary_is_compiled_again(
    name: str, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    (folder / "original" / "compiled" / name).unlink()
    bundle_folder(folder, ZIPS)
    assert contents(folder) == contents(finished)


def test_a_compiled_folder_without_one_of_its_models_is_compiled_again(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(folder / "original" / "compiled" / "TextEncoder.mlmodelc")
    told: list[str] = []
    bundle_folder(folder, ZIPS, told.append)
    assert contents(folder) == contents(finished)
    assert [line for line in told if "compiling" in line] == [f"compiling {folder / 'original' / 'packages'}"]


def test_each_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, int]] = []
    original = integrity.sha256

    def counted(path: Path) -> str:
        hashed.append((path.stat().st_ino, path.stat().st_mtime_ns))
        return original(path)

    monkeypatch.setattr(integrity, "sha256", counted)
    bundle_folder(folder, ZIPS)
    assert hashed and len(hashed) == len(set(hashed))
    check(folder)


def test_symbolic_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    """In models of other tools: what a link names is the user's, not the folder's to share."""
    packages = small_bundle.write_bundle(tmp_path / "out", ("original",)) / "original" / "packages"
    (packages / manifest.FILE_NAME).unlink()
    weights = packages / WEIGHTS["packages"]
    shutil.move(weights, tmp_path / "secret")
    weights.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"weight\.bin: is a symbolic link out of"):
        bundle_folder(tmp_path / "out", ZIPS)
    assert not list((tmp_path / "out").glob("*.zip"))


def test_what_killed_processes_have_left_is_neither_packed_nor_kept(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    for place in (folder, folder / "original" / "packages", folder / "original" / "compiled"):
        (place / WORK_FOLDER / "work-1" / "new" / "x.mlpackage").mkdir(parents=True)
    (folder / "original" / "compiled" / ".old.unfinished").write_text("of an older version")
    older = folder / ".coreml-diffusion" / "replaced" / "original"
    older.mkdir(parents=True)
    (older / "manifest.json").write_text("of version 0.1: nobody reads it")
    for path in folder.glob("*.zip"):
        path.unlink()
    bundle_folder(folder, ZIPS)
    (folder / "original" / "compiled" / ".old.unfinished").unlink()
    assert (older / "manifest.json").is_file()
    assert [name for name in planned_upload(folder, "maker/model").files if ".coreml-diffusion" in name] == []
    shutil.rmtree(folder / ".coreml-diffusion")
    assert contents(folder) == contents(finished), "the zips too"
    check(folder)


@pytest.mark.usefixtures("finished")
def test_pairs_of_bundles(forks: Forks, folder: Path) -> None:
    for _ in range(10):
        codes = forks.race(*[partial(bundle_folder, folder, ZIPS)] * 2)
        assert 0 in codes and set(codes) <= {0, 2}
        check(folder)
        for name in ("original/compiled", "split_einsum_v2/compiled"):
            shutil.rmtree(folder / name)


@pytest.mark.usefixtures("finished")
def test_pairs_of_compilations(source: Path, forks: Forks, tmp_path: Path) -> None:
    for _ in range(20):
        codes = forks.race(*[partial(compile_package, source, tmp_path / "compiled")] * 2)
        assert 0 in codes and set(codes) <= {0, 2}
        assert {path.name for path in (tmp_path / "compiled").iterdir()} == {f"{source.stem}.mlmodelc"}
        open_package(tmp_path / "compiled" / f"{source.stem}.mlmodelc")


def palettize(source: Path, output: Path) -> None:
    palettize_checked(source, output, PalettizeOptions(bits=4), compare=False)


@pytest.fixture
def large(tiny_package: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_package("iOS16"), tmp_path / "large.mlpackage")


def test_pairs_of_palettizations(large: Path, forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out" / "small.mlpackage"
    forks.call(palettize, large, tmp_path / "imported.mlpackage")
    for _ in range(5):
        codes = forks.race(*[partial(palettize, large, output)] * 2)
        assert 0 in codes and set(codes) <= {0, 2}
        assert [path.name for path in output.parent.iterdir()] == [output.name]
        open_package(output)


@pytest.mark.parametrize("link", [False, True])
def test_palettizing_onto_a_package_survives_kills(link: bool, large: Path, forks: Forks, tmp_path: Path) -> None:
    """Also onto a symbolic link: what it names is replaced. At every step there is a whole package to be read."""
    output = named = tmp_path / "out" / "small.mlpackage"
    forks.call(palettize, large, named)
    whole = contents(named)
    if link:
        output = tmp_path / "link.mlpackage"
        output.symlink_to(named)
    step = 0
    while forks.kill_at(partial(palettize, large, output), step := step + 2):
        assert contents(output) == whole
        with unfinished_file(named.parent / "any") as unfinished:
            unfinished.touch()
        (named.parent / "any").unlink()
        assert [path.name for path in named.parent.iterdir()] == [named.name]
    assert step > 10
    assert contents(output) == whole and output.is_symlink() == link


def test_bundling_survives_kills(forks: Forks, tmp_path: Path, finished: Path) -> None:
    folder = small_bundle.write_bundle(tmp_path / "out")
    step, kills = 0, 0
    while forks.kill_at(partial(bundle_folder, folder, ZIPS), step := step + 17):
        kills += 1
        for attention, kinds in read_variants(folder).items():
            for kind, made in kinds.items():
                check_files(made, folder / attention / kind)
    assert kills > 5
    assert contents(folder) == contents(finished)
    check(folder)


def test_a_folder_that_another_process_writes_to(folder: Path) -> None:
    with locked(folder), pytest.raises(StorageError, match=r"/out: is being written by process \d+, `"):
        bundle_folder(folder, ZIPS)
