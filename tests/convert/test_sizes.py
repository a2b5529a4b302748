"""Models for pictures of several sizes: one set of weights, and the same pictures as models of one size make."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from batches import Here
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.bundle.model_card import model_card
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.compile import compile_package
from diffusion_convert.components import of_checkpoint
from diffusion_convert.components.component import Shape
from diffusion_convert.conversion.events import Event, Phase
from diffusion_convert.conversion.plan import make_plan
from diffusion_convert.export import placeholders
from diffusion_convert.hub.client import RemoteFile
from diffusion_convert.hub.download import _choose, _wanted
from diffusion_convert.inspect import inspect
from diffusion_convert.inspect.show import as_text
from diffusion_convert.palettize.checked import palettize_checked
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.verification.folder import verify_models
from diffusion_runtime import load_pipeline, zips
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.integrity import check_files
from diffusion_runtime.cli import batch, generate
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.diffusers import load_diffusers_pipeline
from diffusion_runtime.errors import InputError, PackageError, UnsupportedError
from diffusion_runtime.picture_size import Size, parse_size
from diffusion_runtime.png_record import Settings
from diffusion_runtime.serve.orders import Order, Wanted
from diffusion_runtime.serve.worker import Setup, _Worker

pytestmark = pytest.mark.usefixtures("loaded_once")

SIZES = (Size(64, 64), Size(96, 64))
NEW, OLD = "macOS15", "macOS14"
TEXT, UNET = "Stable_Diffusion_version_sd1_text_encoder.mlpackage", "Stable_Diffusion_version_sd1_unet.mlpackage"


@dataclass(frozen=True)
class Bundles:
    """The same checkpoint for two sizes, and for each of them alone; what was converted for the second size."""

    several: Path
    alone: dict[Size, Path]
    added: list[str]

    @property
    def packages(self) -> Path:
        return self.several / "original" / "packages"


Make = Callable[[str], Bundles]


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``bundles("macOS15")``: 6 bits and no compiled models for that, 16 and both kinds for an older target. The
    second size is added to the first."""
    made: dict[str, Bundles] = {}

    def make(target: str) -> Bundles:
        if target not in made:
            made[target] = _make(tiny_checkpoint("sd1"), tmp_path_factory.mktemp(target), target)
        return made[target]

    return make


def _make(source: Path, folder: Path, target: str) -> Bundles:
    parts: list[str] = []

    def note(event: Event) -> None:
        if event.part and event.part not in parts:
            parts.append(event.part)

    def options(**more: Any) -> ConvertOptions:
        bits: dict[str, Any] = {"nbits": 6, "zip": False} if target == NEW else {}
        return ConvertOptions("original", target=target, **bits, **more)

    first, second = SIZES
    verify = target == NEW  # once is enough: what is verified is the same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placeholders, "MIN_SIZE", 64)
        convert(source, folder / "one", options(sizes=str(first), verify=verify))
        shutil.copytree(folder / "one", folder / "several")
        convert(source, folder / "several", options(sizes=["96x64"], verify=verify), note)
        convert(source, folder / "two", options(width=second.width, height=second.height, verify=False))
    return Bundles(folder / "several", {first: folder / "one", second: folder / "two"}, parts)


def _weights(folder: Path) -> int:
    """Bytes of the weight files on disk, hard links counted once."""
    files = (path.stat() for path in folder.rglob("weight.bin"))
    return sum({status.st_ino: status.st_size for status in files}.values())


@pytest.mark.parametrize("target", [NEW, OLD])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_those_of_models_of_one_size(bundles: Make, target: str, size: Size) -> None:
    made = bundles(target)
    asked: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "np"}
    several = load_pipeline(made.several)("a cat", height=size.height, width=size.width, **asked).images
    assert several.shape == (1, size.height, size.width, 3)
    np.testing.assert_array_equal(several, load_pipeline(made.alone[size])("a cat", **asked).images)


@pytest.mark.parametrize("target", [NEW, OLD])
def test_weights_lie_on_disk_once(bundles: Make, target: str) -> None:
    made = bundles(target)
    assert _weights(made.several) <= 1.03 * _weights(made.alone[SIZES[0]])


@pytest.mark.parametrize("target", [NEW, OLD])
def test_a_size_is_added_to_what_is_there(
    bundles: Make, tiny_checkpoint: Callable[[str], Path], target: str
) -> None:
    made = bundles(target)
    assert sorted(made.added) == sorted(
        ["safety_checker-96x64", "unet-original-96x64", "vae_decoder-96x64", "vae_encoder-96x64"]
    )
    assert manifest.read(made.packages).sizes == SIZES, "what was there first is the default"
    bits: dict[str, Any] = {"nbits": 6, "zip": False} if target == NEW else {}
    for sizes in ("96x64", "64x64"):
        again = convert(
            tiny_checkpoint("sd1"),
            made.several,
            ConvertOptions(target=target, attention="original", sizes=sizes, verify=target == NEW, **bits),
        )
        assert again.unchanged


def test_one_package_has_a_function_for_each_size(bundles: Make) -> None:
    made = bundles(NEW)
    ct = import_coremltools()
    for name in ("unet", "vae_decoder", "vae_encoder", "safety_checker"):
        component = manifest.read(made.packages).components[name]
        (file,) = component.files
        model = ct.models.MLModel(str(made.packages / file), skip_model_load=True, function_name="size_96x64")
        assert model.get_spec().description.defaultFunctionName == "size_64x64"
        assert {str(size): component.at(size).function for size in SIZES} == {
            "64x64": "size_64x64",
            "96x64": "size_96x64",
        }
        described = model._get_function_description("size_96x64")
        shapes = {one.name: tuple(one.type.multiArrayType.shape) for one in described.input}
        assert shapes == {one.name: one.shape for one in component.at(SIZES[1]).inputs}
    assert manifest.read(made.packages).components["text_encoder"].sizes == {}
    assert sorted(path.name for path in (made.several / "original").iterdir()) == ["packages"]
    with pytest.raises(UnsupportedError, match=r"functions size_64x64, size_96x64 .*convert with --target macOS14"):
        compile_package(made.packages / UNET, made.several / "never")


def test_the_card_tells_the_sizes_and_what_compiles_them(bundles: Make) -> None:
    card = (bundles(NEW).several / "README.md").read_text()
    assert "pictures of 64x64 and 96x64 pixels" in card
    assert "download REPOSITORY --variant original --kind packages -o models" in card, "there are no others"
    assert "Pictures are of 64x64 pixels, with `--height 64 --width 96` of 96x64, and so on." in card
    assert "compiled models, which are not here: on a Mac, `coreml-sd bundle --compiler xcrun` makes them" in card
    described = manifest.read(bundles(NEW).packages)
    low = {
        "sizes": {"96x64": described.components["unet"].at(SIZES[1]).model_copy(update={"psnr_db": {"x": 21.5}})}
    }
    unet = described.components["unet"].model_copy(update=low)
    changed = described.model_copy(update={"components": {**described.components, "unet": unet}})
    assert re.search(r"\| unet \| 6 bits \| .* \| 21.5 dB \|", model_card({"original": changed}, {})), (
        "of all sizes"
    )


def test_older_targets_have_a_folder_for_each_size(bundles: Make, tmp_path: Path) -> None:
    made = bundles(OLD)
    for kind in ("packages", "compiled"):
        root, inner = made.several / "original" / kind, made.several / "original" / kind / "96x64"
        alone = made.alone[SIZES[1]] / "original" / kind
        assert {path.name for path in inner.iterdir()} == {path.name for path in alone.iterdir()}
        assert {path.name for path in root.iterdir()} == {path.name for path in inner.iterdir()} | {"96x64"}
        told = manifest.read(inner)
        assert (told.sizes, told.kind) == ((SIZES[1],), kind)
        assert load_pipeline(inner).size == (64, 96)
        unets = [
            next(iter((place / file).rglob("weight.bin")))
            for place in (root, inner)
            for file in told.components["unet"].files
        ]
        assert unets[0].samefile(unets[1])
    names = {path.name for path in made.several.glob("*.zip")}
    assert names == {"coreml-sd1_original_compiled.zip", "coreml-sd1-96x64_original_compiled.zip"}
    for name, size in (("coreml-sd1", SIZES[0]), ("coreml-sd1-96x64", SIZES[1])):
        stem = f"{name}_original_compiled"
        with zipfile.ZipFile(made.several / f"{stem}.zip") as archive:
            (schema,) = json.loads(archive.read(f"{stem}/Unet.mlmodelc/metadata.json"))
            assert not any("96x64" in file.removeprefix(stem) for file in archive.namelist())
        unpacked = zips.unpack(made.several / f"{stem}.zip", tmp_path / name)
        check_files(manifest.read(unpacked), unpacked)
        assert load_pipeline(unpacked).sizes == (size,), "of no size that is not there"
        shape = next(one["shape"] for one in schema["inputSchema"] if one["name"] == "sample")
        assert shape == str([2, 4, size.height // 8, size.width // 8])


def test_what_is_lost_of_a_sizes_folder_is_put_there_again(
    bundles: Make, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    models = shutil.copytree(bundles(OLD).several, tmp_path / "copy")
    lost = ("vocab.json", TEXT, "manifest.json")
    place = models / "original" / "packages"
    for name in lost:
        (place / "96x64" / name).rename(tmp_path / name)
        with pytest.raises(PackageError, match=rf"96x64/{name}.* is missing"):
            check_files(manifest.read(place), place)
        parts = set[str]()
        options = ConvertOptions("original", target=OLD, sizes=SIZES, verify=False, zip=False)
        convert(tiny_checkpoint("sd1"), models, options, lambda event: parts.add(event.part))  # noqa: B023
        assert parts == {""}, "nothing is converted again"
        check_files(manifest.read(place), place)


def test_an_unknown_size_is_refused_with_those_that_there_are(bundles: Make) -> None:
    pipeline = load_pipeline(bundles(NEW).several)
    assert pipeline.sizes == SIZES
    with pytest.raises(InputError, match=r"128x64 pixels: these models make 64x64 and 96x64 \(width x height\)"):
        pipeline("a cat", height=64, width=128)


def test_generate_draws_the_size_that_is_asked_for(bundles: Make, tmp_path: Path) -> None:
    app, out, again = typer.Typer(), tmp_path / "cat.png", tmp_path / "again.png"
    generate.register(app)
    asked = [str(bundles(OLD).several), "--prompt", "a cat", "--steps", "1", "--seed", "1", "-o", str(out)]
    told = CliRunner().invoke(app, [*asked, "--height", "64", "--width", "96"])
    assert told.exit_code == 0, told.output
    repeated = CliRunner().invoke(app, ["--from", str(out), "-o", str(again)])
    assert repeated.exit_code == 0, repeated.output
    first, second = (np.array(Image.open(path)) for path in (out, again))
    assert first.shape == (64, 96, 3)
    np.testing.assert_array_equal(first, second)


def test_a_batch_and_diffusers_pipeline_are_of_the_size_that_is_asked_for(
    bundles: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion_runtime.batch.local.LocalWorkers", Here)
    (tmp_path / "a.txt").write_text("a cat\n")
    app, second = typer.Typer(), SIZES[1]
    batch.register(app)
    asked = [str(bundles(OLD).several), str(tmp_path / "a.txt"), "-o", str(tmp_path / "out"), "--steps", "2"]
    told = CliRunner().invoke(app, [*asked, "--seed", "1", "--height", "64", "--width", "96"])
    assert told.exit_code == 0, told.output
    (path,) = (tmp_path / "out").glob("*.png")
    alone = load_pipeline(bundles(OLD).alone[second])("a cat", num_inference_steps=2, seed=1).images[0]
    with Image.open(path) as found:
        np.testing.assert_array_equal(np.array(found), np.array(alone))
    models = bundles(NEW).several
    theirs = load_diffusers_pipeline(models, "text-to-image", height=second.height, width=second.width)
    picture = theirs("a cat", height=second.height, width=second.width, num_inference_steps=1).images[0]
    assert picture.size == second
    with pytest.raises(InputError, match="these models make 64x64 and 96x64"):
        load_diffusers_pipeline(models, "text-to-image", height=128)


def test_a_server_draws_each_size(bundles: Make) -> None:
    made = bundles(OLD)
    ours, its = Pipe()
    worker = _Worker(Setup(str(made.several), "models", {}), its, lambda: None)
    assert worker.about().sizes == SIZES
    second = SIZES[1]
    wanted = Wanted(Settings("a cat", seed=1, steps=2, width=second.width, height=second.height))
    assert worker.make(Order((wanted,))).refused is None
    *_, picture = (ours.recv() for _ in range(4))  # PNDM takes a step more
    alone = load_pipeline(made.alone[second])("a cat", num_inference_steps=2, seed=1).images[0]
    with Image.open(io.BytesIO(picture.png)) as found:
        np.testing.assert_array_equal(np.array(found), np.array(alone))


def test_image_to_image_and_latents_know_the_size(bundles: Make) -> None:
    made = bundles(OLD)
    picture = Image.new("RGB", (96, 64), "red")
    asked: dict[str, Any] = {"image": picture, "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    several, alone = load_pipeline(made.several, reduce_memory=True), load_pipeline(made.alone[SIZES[1]])
    found = several("a cat", height=64, width=96, **asked).images
    np.testing.assert_array_equal(found, alone("a cat", **asked).images)


def test_every_size_is_verified(bundles: Make, tiny_checkpoint: Callable[[str], Path]) -> None:
    made = bundles(NEW)
    for component in manifest.read(made.packages).components.values():
        for one in (component, *component.sizes.values()):
            assert one.psnr_db and min(one.psnr_db.values()) > 20
    found = list(verify_models(made.several, open_checkpoint(str(tiny_checkpoint("sd1"))), lambda _: None))
    sized = [
        f"{name} {size}" for name in ("unet", "vae_decoder", "vae_encoder", "safety_checker") for size in SIZES
    ]
    assert sorted(one.component for one in found) == sorted([*sized, "text_encoder"])
    assert all(one.holds for one in found)


def test_sdxl_and_a_controlnet_have_every_size(
    tiny_checkpoint: Callable[[str], Path], controlnets: Callable[[str], Path], tmp_path: Path
) -> None:
    """The residuals between them are of each size's shapes."""
    source, (control, *_) = tiny_checkpoint("sdxl"), sorted(controlnets("sdxl").iterdir())
    options = ConvertOptions(
        "original",
        components=["control_unet", "controlnet"],
        controlnets=[str(control)],
        sizes=list(map(str, SIZES)),
        target=NEW,
        verify=False,
    )
    models = convert(source, tmp_path / "models", options).output
    opened = open_checkpoint(str(source), ConvertOptions(controlnets=[str(control)]))
    found = list(verify_models(models, opened, lambda _: None))
    assert len(found) == 4
    assert [one.component for one in found if not one.holds] == []
    assert {one.component.rpartition(" ")[2] for one in found} == set(map(str, SIZES))


def test_inspect_lists_functions_and_sizes(bundles: Make) -> None:
    text = as_text(inspect(bundles(NEW).packages))
    assert "original, 64x64 and 96x64, batch 2" in text
    assert "functions size_64x64, size_96x64; without a name the first" in text
    assert "size_96x64: sample Float16 2x4x8x12;" in text


def test_a_stopped_run_goes_on_and_functions_are_palettized_together(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ConvertOptions("original", target=NEW, sizes=SIZES, components="vae_decoder", verify=False)

    def stop(event: Event) -> None:
        if event.part == "vae_decoder-96x64":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint("sd1"), tmp_path / "out", options, stop)
    parts = set[str]()
    convert(tiny_checkpoint("sd1"), tmp_path / "out", options, lambda event: parts.add(event.part))
    assert parts - {""} == {"vae_decoder-96x64"}
    package = tmp_path / "out/original/packages" / UNET.replace("unet", "vae_decoder")
    checked = palettize_checked(package, tmp_path / "small.mlpackage", PalettizeOptions(bits=8))
    assert set(checked.psnr_db) == {"size_64x64: image", "size_96x64: image"}
    assert _weights(tmp_path / "small.mlpackage") < 0.6 * _weights(package)
    for size in SIZES:
        model = TorchBackend().load(tmp_path / "small.mlpackage", function=size.function)
        assert model.inputs["z"].shape == (1, 4, size.height // 8, size.width // 8)


def test_chunks_share_weights_by_size_too(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    options = ConvertOptions("original", target=NEW, sizes=SIZES, components="unet", verify=False, chunk_unet=True)
    convert(tiny_checkpoint("sd1"), tmp_path / "halves", options)
    component = manifest.read(tmp_path / "halves/original/packages").components["unet"]
    assert len(component.files) == 2 and [one.function for one in component.sizes.values()] == [
        "size_64x64",
        "size_96x64",
    ]
    halves = [tmp_path / "halves/original/packages" / file for file in component.files]
    sizes = [_weights(half) for half in halves]
    assert max(sizes) < 1.2 * min(sizes), "both sizes are cut at the same place"
    first, second = (TorchBackend().load(half, function="size_96x64") for half in halves)
    inputs = {name: np.ones(spec.shape, spec.dtype) for name, spec in first.inputs.items()}
    given = {**inputs, **first(**inputs)}
    found = second(
        **{name: given.get(name, np.ones(spec.shape, spec.dtype)) for name, spec in second.inputs.items()}
    )
    assert found["noise_pred"].shape == (2, 4, 8, 12)


@pytest.mark.parametrize(("target", "bits"), [(NEW, {"nbits": 6}), (OLD, {"nbits_for": {"vae_decoder": 8}})])
def test_another_size_alone_takes_the_place_of_all(
    bundles: Make, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, target: str, bits: dict[str, Any]
) -> None:
    """What is there of that size, with other bits too, is not converted again."""
    shutil.copytree(bundles(target).several, tmp_path / "copy")
    components = ("unet", "vae_decoder") if target == NEW else "vae_decoder"
    options = ConvertOptions(
        "original", target=target, components=components, width=96, height=64, verify=target == NEW, **bits
    )
    phases = set[str]()
    notes = convert(
        tiny_checkpoint("sd1"), tmp_path / "copy", options, lambda event: phases.add(event.part and event.phase)
    ).notes
    assert any(note.startswith("replaces what is in") for note in notes)
    assert phases == ({""} if target == NEW else {"", Phase.PALETTIZE})
    made = manifest.read(tmp_path / "copy/original/packages")
    assert made.sizes == (SIZES[1],) and made.components["vae_decoder"].sizes == {}
    assert made.components["vae_decoder"].outputs[0].shape == (1, 3, 64, 96)


@pytest.mark.parametrize("family", ["sd1", "sd2-depth", "sdxl"])
def test_what_is_of_one_size_is_the_same_for_all(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    opened = open_checkpoint(str(tiny_checkpoint(family)))
    for component in of_checkpoint(opened).values():
        graphs = [component.build(opened, None, Shape(size.height, size.width, 2)) for size in SIZES]
        first, second = ((graph.inputs, graph.outputs) for graph in graphs)
        assert (first == second) == component.one_size, component.name


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sizes": "96"}, "size '96': expected WIDTHxHEIGHT in pixels, as 768x512"),
        ({"sizes": ["64x64", "64x64"]}, "--size 64x64 is given twice"),
        ({"sizes": "64x64", "width": 64, "height": 64}, "--size and --height with --width exclude each other"),
        ({"sizes": ["64x64", "100x64"]}, "--size 100x64: width 100: expected a multiple of 8 of at least 64"),
        ({"sizes": SIZES, "layout": "comfyui"}, "--layout comfyui and several sizes: its apps find a model"),
    ],
)
def test_sizes_that_cannot_be_used(
    tiny_checkpoint: Callable[[str], Path], options: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=what):
        make_plan(open_checkpoint(str(tiny_checkpoint("sd1"))), ConvertOptions("original", **options))


def test_of_a_repository_of_zips_the_first_size_is_downloaded() -> None:
    names = ("coreml-sd1-96x64_original_compiled.zip", "coreml-sd1_original_compiled.zip")
    there = {name: RemoteFile(1, "0", None) for name in names}
    assert list(_wanted(there, "original", "compiled")) == [names[1]]
    packages = {"original/packages/manifest.json": RemoteFile(1, "0", None)}
    with pytest.raises(
        InputError, match=r"has no compiled of original .*; there are packages of original: give --kind"
    ):
        _choose("me/models", packages, "original", "compiled")


def test_sizes_are_read_in_one_order() -> None:
    assert parse_size("768x512") == Size(width=768, height=512)
    assert ConvertOptions(sizes=[(768, 512), "512X512"]).sizes == (Size(768, 512), Size(512, 512))
