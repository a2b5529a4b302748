"""A conversion's life: it goes on where it stopped, appears whole or not at all, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_convert import convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion import convert as conversion
from diffusion_convert.conversion.events import Event
from diffusion_convert.conversion.plan import make_plan
from diffusion_convert.conversion.workspace import kept
from diffusion_convert.options import ConvertOptions
from diffusion_runtime import atomic
from diffusion_runtime.atomic import WORK_FOLDER
from diffusion_runtime.bundle import manifest
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import InputError, StorageError
from diffusion_runtime.families import TARGETS, AttentionKind, compiles
from diffusion_runtime.mil.program import DType
from diffusion_runtime.mil.weights import WeightWriter

PARTS = ("text_encoder", "vae_encoder")
OPTIONS = ConvertOptions(attention=(AttentionKind.ORIGINAL,), components=PARTS, compiled=False)
PHASES = ("reference", "load", "trace", "convert", "save", "verify")

Source = Callable[[str], Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "models"
    convert(tiny_checkpoint("sd1"), output, OPTIONS)
    return output


class StopAt:
    """Interrupts, as Ctrl-C does, at the first event of a part's phase; ``seen`` is what was begun until then."""

    def __init__(self, part: str, phase: str, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.part, self.phase, self.error = part, phase, error
        self.seen: list[tuple[str, str]] = []

    def __call__(self, event: Event) -> None:
        if (event.part, event.phase) not in self.seen:
            self.seen.append((event.part, event.phase))
        if (event.part, event.phase) == (self.part, self.phase):
            raise self.error


def test_result_is_whole(undisturbed: Path) -> None:
    packages = undisturbed / "original" / "packages"
    made = manifest.read(packages)
    assert tuple(made.components) == PARTS
    assert {path.name for path in undisturbed.iterdir()} == {"original"}
    assert {path.name for path in packages.iterdir()} == {
        "Stable_Diffusion_version_sd1_text_encoder.mlpackage",
        "Stable_Diffusion_version_sd1_vae_encoder.mlpackage",
        "manifest.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    for component in made.components.values():
        assert component.size_bytes > 0
        assert component.sha256.keys() == {
            f"{component.files[0]}/{name}"
            for name in (
                "Manifest.json",
                "Data/com.apple.CoreML/model.mlmodel",
                "Data/com.apple.CoreML/weights/weight.bin",
            )
        }


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_before_anything_is_finished_leaves_nothing(
    phase: str, tiny_checkpoint: Source, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint("sd1"), tmp_path / "new" / "models", OPTIONS, StopAt("text_encoder", phase))
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_conversion_goes_on(undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path) -> None:
    output = tmp_path / "models"
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint("sd1"), output, OPTIONS, StopAt("vae_encoder", "verify"))
    assert kept(output) == ("text_encoder",)
    assert [path.name for path in output.iterdir()] == [WORK_FOLDER]
    rest = StopAt("", "never")
    convert(tiny_checkpoint("sd1"), output, OPTIONS, rest)
    assert ("text_encoder", "convert") not in rest.seen
    assert ("vae_encoder", "reference") not in rest.seen
    assert ("vae_encoder", "convert") in rest.seen
    assert contents(output) == contents(undisturbed)


def test_stopped_while_the_result_is_renamed_into_place(
    undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "models"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion, "commit", _interrupt)
        convert(tiny_checkpoint("sd1"), output, OPTIONS)
    rest = StopAt("", "never")
    convert(tiny_checkpoint("sd1"), output, OPTIONS, rest)
    assert not any(part for part, _ in rest.seen)
    assert contents(output) == contents(undisturbed)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_there_is_not_made_again(undisturbed: Path, tiny_checkpoint: Source) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    events = StopAt("", "never")
    made = convert(tiny_checkpoint("sd1"), undisturbed, OPTIONS, events)
    assert made.unchanged
    assert made.variants["original"].components.keys() == set(PARTS)
    assert not any(part for part, _ in events.seen)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_another_conversion_takes_the_place_of_an_older_one(
    undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path
) -> None:
    output = shutil.copytree(undisturbed, tmp_path / "models")
    (output / "notes.txt").write_text("mine")
    other = ConvertOptions(
        attention=(AttentionKind.SPLIT_EINSUM,), components=("text_encoder",), compiled=False, target="iOS17"
    )
    notes = convert(tiny_checkpoint("sd1"), output, other).notes
    assert any(note.startswith(f"replaces what is in {output}") for note in notes)
    assert any(note.endswith(f": original ({', '.join(PARTS)})") for note in notes), "what goes is named"
    assert {path.name for path in output.iterdir()} == {"split_einsum", "notes.txt"}
    assert manifest.read(output / "split_einsum" / "packages").target == "iOS17"


def _remove(path: Path) -> None:
    path.unlink()


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_remove, _cut_short, _flip])
def test_what_is_damaged_is_made_again_and_no_more(
    damage: Callable[[Path], None], undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path
) -> None:
    output = shutil.copytree(undisturbed, tmp_path / "models")
    damage(
        next((output / "original/packages/Stable_Diffusion_version_sd1_vae_encoder.mlpackage").rglob("weight.bin"))
    )
    events = StopAt("", "never")
    assert not convert(tiny_checkpoint("sd1"), output, OPTIONS, events).unchanged
    assert {part for part, _ in events.seen} == {"", "vae_encoder"}
    assert contents(output) == contents(undisturbed)


@pytest.mark.parametrize("damage", [_remove, _cut_short, _flip])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_written_again(
    damage: Callable[[Path], None], name: str, undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path
) -> None:
    output, events = shutil.copytree(undisturbed, tmp_path / "models"), StopAt("", "never")
    damage(output / "original/packages" / name)
    assert not convert(tiny_checkpoint("sd1"), output, OPTIONS, events).unchanged
    assert {part for part, _ in events.seen} == {""}, "the models are kept"
    assert contents(output) == contents(undisturbed)


def test_components_and_variants_are_added_to_those_of_the_same_options(
    undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path
) -> None:
    """One by one, they become what one conversion would have made of all, and nothing is made twice."""
    output, events = tmp_path / "models", StopAt("", "never")
    for part in PARTS:
        made = convert(tiny_checkpoint("sd1"), output, replace(OPTIONS, components=(part,)), events)
    assert made.variants["original"].components.keys() == set(PARTS)
    assert contents(output) == contents(undisturbed)
    again = StopAt("", "never")
    assert convert(tiny_checkpoint("sd1"), output, replace(OPTIONS, components=PARTS[:1]), again).unchanged
    both = replace(OPTIONS, attention=(AttentionKind.SPLIT_EINSUM,), compiled=True)
    assert convert(tiny_checkpoint("sd1"), output, both, again).variants.keys() == {"original", "split_einsum"}
    for with_zips in (False, True):
        assert not convert(tiny_checkpoint("sd1"), output, replace(both, zip=with_zips), again).unchanged
    assert not any(part for part, _ in again.seen), "these components use no attention: there is nothing to convert"
    assert len(list(output.glob("*.zip"))) == 2
    zipped = replace(both, zip=True)
    assert convert(tiny_checkpoint("sd1"), output, zipped).unchanged
    for damage in (_remove, _cut_short, _flip):
        damage(next(output.glob("*.zip")))
        assert not convert(tiny_checkpoint("sd1"), output, zipped).unchanged
    assert convert(tiny_checkpoint("sd1"), output, zipped).unchanged


@pytest.mark.parametrize("exchange", [True, False])
def test_ctrl_c_between_two_renames_ends_well(
    exchange: bool, undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first rename on, the result is complete: the others are done, too, and what was kept is in it."""
    output = tmp_path / "models"
    convert(tiny_checkpoint("sd1"), output, replace(OPTIONS, components=PARTS[:1]))
    put: list[Path] = []
    original = atomic._put

    def stop(new: Path, target: Path, replaced: Path) -> None:
        nonlocal put
        put += [target] if target == output / "original" else []
        if len(put) == 1:
            raise KeyboardInterrupt
        original(new, target, replaced)

    monkeypatch.setattr(atomic, "_put", stop)
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint("sd1"), output, replace(OPTIONS, components=PARTS[1:]))
    assert len(put) == 2
    assert contents(output) == contents(undisturbed)


def test_a_kill_in_the_last_clean_up_leaves_nothing_after_the_next_command(
    undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path
) -> None:
    """The commit names the work that is done, so that any command removes it, not only a conversion."""
    output = shutil.copytree(undisturbed, tmp_path / "models")
    slot = output / WORK_FOLDER / "work-1"
    (slot / "new" / "original" / "old").mkdir(parents=True)
    (output / WORK_FOLDER / "conversion-1" / "parts").mkdir(parents=True)
    (output / WORK_FOLDER / "lock").touch()
    told = {"new": {"original": (output / "original").stat().st_ino}, "obsolete": [], "done": ["conversion-1"]}
    (slot / "commit.json").write_text(json.dumps(told))
    with atomic.unfinished_file(output / "picture.png") as unfinished:
        unfinished.touch()
    (output / "picture.png").unlink()
    assert contents(output) == contents(undisturbed)
    assert [path.name for path in output.iterdir()] == ["original"]


def test_a_variant_that_is_a_symbolic_link_is_refused(tiny_checkpoint: Source, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "original").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="original: is a symbolic link"):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", OPTIONS)
    assert (tmp_path / "models" / "original").is_symlink()


TEXT = ConvertOptions(attention=(AttentionKind.SPLIT_EINSUM_V2,), components=("text_encoder",), verify=False)
ZIPS = tuple(f"coreml-mine_split_einsum{version}_compiled.zip" for version in ("_v2", ""))


def test_the_output_may_be_the_checkpoints_own_folder(tiny_checkpoint: Source, tmp_path: Path) -> None:
    """Its files stay as they are, the card too, and what a conversion adds makes it no other checkpoint."""
    folder = shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "mine")
    (folder / "README.md").write_text("mine")
    before = contents(folder)
    convert(folder, folder, TEXT)
    assert {path.name for path in folder.iterdir()} - {Path(name).parts[0] for name in before} == {
        "split_einsum_v2",
        *ZIPS,
    }
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert convert(folder, folder, TEXT).unchanged
    for lost in (folder / ZIPS[0], folder / "split_einsum_v2" / "compiled" / "manifest.json"):
        lost.unlink()
        assert not convert(folder, folder, TEXT).unchanged
        assert lost.exists()
    convert(folder, folder, replace(TEXT, compiled=False))
    assert not [name for name in ZIPS if (folder / name).exists()], "zips of models that are not there any more"
    convert(folder, folder, replace(TEXT, zip=False))
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize("kind", ["packages", "compiled"])
def test_a_manifest_that_was_changed_by_hand_is_written_again(
    tiny_checkpoint: Source, tmp_path: Path, kind: str
) -> None:
    """Models as their hashes say, and pictures of another scale."""
    options = replace(TEXT, zip=False)
    convert(tiny_checkpoint("sd1"), tmp_path, options)
    file, parts = tmp_path / "split_einsum_v2" / kind / "manifest.json", set()
    before = file.read_text()
    told = json.loads(before)
    file.write_text(json.dumps(told | {"latents": told["latents"] | {"scale": 0.5}}))
    convert(tiny_checkpoint("sd1"), tmp_path, options, lambda event: parts.add(event.part))
    assert file.read_text() == before
    assert parts == {""}, "nothing is converted again for that"
    (tmp_path / "README.md").unlink()
    assert not convert(tiny_checkpoint("sd1"), tmp_path, options).unchanged
    assert "for Core ML" in (tmp_path / "README.md").read_text()
    assert convert(tiny_checkpoint("sd1"), tmp_path, options).unchanged


def test_nobody_elses_folder_is_replaced(tiny_checkpoint: Source, tmp_path: Path) -> None:
    photo = tmp_path / "original" / "photo.jpg"
    photo.parent.mkdir()
    photo.write_text("mine")
    with pytest.raises(InputError, match="original: exists already and was not written by coreml-sd"):
        convert(tiny_checkpoint("sd1"), tmp_path, TEXT)
    assert contents(tmp_path) == {"original/photo.jpg": b"mine"}


@pytest.mark.parametrize("target", TARGETS)
def test_what_cannot_be_compiled_is_said_before_work(target: str, tiny_checkpoint: Source) -> None:
    plan = make_plan(open_checkpoint(str(tiny_checkpoint("sd1"))), replace(TEXT, target=target))
    known = compiles(import_coremltools().target[target])
    assert plan.compiled == known
    assert [note for note in plan.notes if "packages only" in note] == [*plan.notes][: 0 if known else 1]


@pytest.mark.parametrize("finished", [0, 1])
def test_full_disk(finished: int, tiny_checkpoint: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished is kept: with more room, the same command goes on."""
    written = 0

    def add(self: WeightWriter, data: np.ndarray, dtype: DType) -> int:
        nonlocal written
        written += 1
        if finished <= len(kept(output)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, data, dtype)

    output, original = tmp_path / "models", WeightWriter.add
    monkeypatch.setattr(WeightWriter, "add", add)
    with pytest.raises(StorageError, match="the disk is full"):
        convert(tiny_checkpoint("sd1"), output, OPTIONS)
    assert written
    assert kept(output) == PARTS[:finished]
    assert output.exists() == bool(finished)


def test_too_little_room_is_said_before_work(
    tiny_checkpoint: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(StorageError, match=r"are needed, but its disk has 1 MB free"):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_the_size_counts_every_zip(tiny_checkpoint: Source) -> None:
    """split_einsum_v2 without split_einsum is zipped under both names; palettized weights are as small in zips."""
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))

    both = (AttentionKind.ORIGINAL, AttentionKind.SPLIT_EINSUM_V2)

    def size(**changes: Any) -> int:
        return make_plan(
            checkpoint, ConvertOptions(**{"attention": both, "components": ("unet",), "compiled": False, **changes})
        ).size_bytes

    one = size(attention="original")
    assert size() == 2 * one
    assert size(attention="original", compiled=True) == 3 * one
    assert size(compiled=True, zip=False) == 4 * one
    assert size(compiled=True) == 7 * one
    assert size(attention=("split_einsum", "split_einsum_v2"), compiled=True) == 6 * one
    assert size(attention="original", compiled=True, nbits=4) == 2 * one + one // 4


def test_output_that_is_a_file(tiny_checkpoint: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "models"):
        with pytest.raises(InputError, match="is a file"):
            convert(tiny_checkpoint("sd1"), output, OPTIONS)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_conversions_to_one_folder(tiny_checkpoint: Source, tmp_path: Path) -> None:
    output = tmp_path / "models"

    def second(event: Event) -> None:
        if (event.part, event.phase) == ("text_encoder", "load"):
            with pytest.raises(StorageError, match=r"/models: is being written by process \d+, `"):
                convert(tiny_checkpoint("sd1"), output, OPTIONS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint("sd1"), output, OPTIONS, second)


def test_without_verification(tiny_checkpoint: Source, tmp_path: Path) -> None:
    options = ConvertOptions(
        attention=(AttentionKind.ORIGINAL,), components=("text_encoder",), compiled=False, verify=False
    )
    made = convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    assert made.variants["original"].components["text_encoder"].psnr_db == {}


def _convert_in_child(source: Path, output: Path) -> None:
    os.setsid()
    convert(source, output, OPTIONS)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_remembered")
def test_killed_at_any_moment(undisturbed: Path, tiny_checkpoint: Source, tmp_path: Path) -> None:
    """SIGKILL ten times at random moments; what can be seen is whole at each, and the end is as if undisturbed."""
    output, rng, seconds = tmp_path / "models", random.Random(7), 4.0
    for _ in range(10):
        child = get_context("fork").Process(target=_convert_in_child, args=(tiny_checkpoint("sd1"), output))
        started = time.perf_counter()
        child.start()
        child.join(rng.uniform(0.0, seconds))
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        seconds = max(seconds, 2 * (time.perf_counter() - started))
        if (output / "original").exists():
            assert contents(output / "original") == contents(undisturbed / "original")
    convert(tiny_checkpoint("sd1"), output, OPTIONS)
    assert contents(output) == contents(undisturbed)


def test_records_name_no_place_on_this_machine(undisturbed: Path, tiny_checkpoint: Source) -> None:
    text = json.dumps(json.loads((undisturbed / "original/packages/manifest.json").read_text()))
    assert str(tiny_checkpoint("sd1").parent) not in text
