"""Finding models: our folders and variants, and folders that others made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import toy_models
from diffusion_runtime import load_pipeline
from diffusion_runtime.backends import ComputeUnits
from diffusion_runtime.bundle import find as bundle
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import family_of
from diffusion_runtime.pipeline import Pipeline


def marked(folder: Path, name: str) -> None:
    """A variant that is nothing but its manifest."""
    folder.mkdir(parents=True)
    data = {
        "format_version": 1,
        "name": name,
        "family": "sd1",
        "source": {"name": name},
        "kind": "packages",
        "attention": "original",
        "height": 64,
        "width": 64,
        "batch_size": 2,
        "target": "macOS13",
        "latents": {"channels": 4, "factor": 8, "scale": 0.18215},
        "prediction_type": "epsilon",
        "components": {},
        "scheduler": {},
    }
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    for attention in ("original", "split_einsum_v2"):
        for kind in ("packages", "compiled"):
            marked(root / attention / kind, f"{attention}/{kind}")
    return root


@pytest.mark.parametrize(
    ("backend", "units", "chosen"),
    [
        ("torch", None, "original"),
        ("torch", ComputeUnits.CPU_AND_NE, "original"),
        ("coreml", None, "split_einsum_v2"),
        ("coreml", ComputeUnits.ALL, "split_einsum_v2"),
        ("coreml", ComputeUnits.CPU_AND_NE, "split_einsum_v2"),
        ("coreml", ComputeUnits.CPU_AND_GPU, "original"),
        ("coreml", ComputeUnits.CPU_ONLY, "original"),
    ],
)
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_variant_follows_from_backend_and_compute_units(
    variants: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    backend: str,
    units: ComputeUnits | None,
    chosen: str,
) -> None:
    monkeypatch.setattr("sys.platform", system)
    kind = "compiled" if (system, backend) == ("darwin", "coreml") else "packages"
    found = bundle.find(variants, backend=backend, compute_units=units)
    assert found.manifest.name == f"{chosen}/{kind}"
    assert f"using {chosen}/{kind} (also there: " in found.notes[0]


@pytest.mark.parametrize("inside", ["", "original", "original/packages"])
def test_any_level_of_the_folder_can_be_named(toy_folder: Path, inside: str) -> None:
    root = toy_folder.parent.parent
    assert bundle.find(root / inside).folder == toy_folder


def test_an_unpacked_zip_can_be_named(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "coreml-toy_original_compiled")
    assert bundle.find(tmp_path).manifest.name == "toy"


def broken(kind: str, toy_folder: Path, folder: Path) -> Path:
    if kind == "missing":
        return folder / "nowhere"
    if kind == "empty":
        return folder
    if kind == "one model":
        return toy_folder / f"{toy_models.APPLE}unet.mlpackage"
    shutil.copytree(toy_folder, folder / "models")
    if kind == "a model is gone":
        shutil.rmtree(folder / "models" / f"{toy_models.APPLE}unet.mlpackage")
    elif kind == "no json":
        (folder / "models" / "manifest.json").write_text("{")
    elif kind == "future":
        data = json.loads((folder / "models" / "manifest.json").read_text())
        (folder / "models" / "manifest.json").write_text(json.dumps({**data, "format_version": 99}))
    return folder / "models"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "nowhere: no such folder"),
        ("empty", "holds no models: expected manifest.json, Stable_Diffusion_version_"),
        ("one model", "is one model; name the folder that holds all of them"),
        ("a model is gone", "manifest.json names what is not there: Stable_Diffusion_version_toy_unet.mlpackage"),
        ("no json", "manifest.json: cannot be read as JSON"),
        ("future", "manifest format 99 is newer than this version reads"),
    ],
)
def test_what_holds_no_models_is_one_clear_line(toy_folder: Path, tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises((InputError, PackageError)) as caught:
        bundle.find(broken(kind, toy_folder, tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_package_is_refused_by_name(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "models")
    specification = next((tmp_path / "models" / f"{toy_models.APPLE}unet.mlpackage").rglob("model.mlmodel"))
    specification.write_bytes(specification.read_bytes()[:100])
    with pytest.raises(PackageError, match=r"model\.mlmodel"):
        picture(load_pipeline(tmp_path / "models", "torch"))


def picture(pipeline: Pipeline) -> np.ndarray:
    return np.asarray(pipeline("a red circle", negative_prompt="white", num_inference_steps=4, seed=5).images[0])


def without_manifest(toy_folder: Path, folder: Path) -> Path:
    """What Apple's converter writes, with the tokenizer's two files beside it."""
    ignored = shutil.ignore_patterns("manifest.json", "tokenizer_config.json", "special_tokens_map.json")
    shutil.copytree(toy_folder, folder, ignore=ignored)
    return folder


def compiled(toy_folder: Path, folder: Path) -> Path:
    """What Hub repositories hold: compiled models by their short names."""
    from diffusion_convert.compile import compile_package

    folder.mkdir()
    names = {
        "text_encoder": "TextEncoder",
        "unet": "Unet",
        "vae_decoder": "VAEDecoder",
        "vae_encoder": "VAEEncoder",
    }
    for component, name in names.items():
        compile_package(toy_folder / f"{toy_models.APPLE}{component}.mlpackage", folder, name)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(toy_folder / name, folder)
    return folder


@pytest.mark.parametrize("made_by", [without_manifest, compiled], ids=["apple's converter", "the hub"])
def test_folders_of_others_make_the_same_picture(
    toy_folder: Path, tmp_path: Path, made_by: Callable[[Path, Path], Path]
) -> None:
    others = load_pipeline(made_by(toy_folder, tmp_path / "others"), "torch")
    assert np.array_equal(picture(others), picture(load_pipeline(toy_folder, "torch")))
    assert {part.compute_units for part in others.manifest.components.values()} == {"cpu-and-gpu"}
    note, unchecked = others.notes
    assert "has no manifest.json: taken for sd1, 64x64, epsilon prediction, latent scale 0.18215" in note
    assert "pictures are not checked" in unchecked


def test_chunks_win_over_the_whole_unet_and_compute_the_same(toy_folder: Path, tmp_path: Path) -> None:
    folder = without_manifest(toy_folder, tmp_path / "others")
    toy_models.chunks(folder)
    pipeline = load_pipeline(folder, "torch")
    described = pipeline.manifest.components["unet"]
    assert [name.removeprefix(toy_models.APPLE) for name in described.files] == [
        "unet_chunk1.mlpackage",
        "unet_chunk2.mlpackage",
    ]
    assert [tensor.name for tensor in described.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    whole = picture(load_pipeline(toy_folder, "torch")).astype(int)
    assert np.abs(picture(pipeline) - whole).max() <= 1  # what goes from one to the other is float16


def test_a_tokenizer_elsewhere_can_be_named(toy_folder: Path, tmp_path: Path) -> None:
    folder = without_manifest(toy_folder, tmp_path / "deep" / "others")
    (folder / "vocab.json").unlink()
    with pytest.raises(InputError, match=r"no vocab.json and merges.txt next to the models: name .* --tokenizer"):
        load_pipeline(folder, "torch")
    assert np.array_equal(
        picture(load_pipeline(folder, "torch", tokenizer=toy_folder)), picture(load_pipeline(toy_folder, "torch"))
    )


def test_the_tokenizer_of_the_compiled_variant_serves_the_packages(toy_folder: Path, tmp_path: Path) -> None:
    folder = without_manifest(toy_folder, tmp_path / "original" / "packages")
    (tmp_path / "original" / "compiled").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).rename(tmp_path / "original" / "compiled" / name)
    assert np.array_equal(picture(load_pipeline(folder, "torch")), picture(load_pipeline(toy_folder, "torch")))


def test_a_name_that_is_no_folder_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"the folder of models cannot be read|no such folder"):
        load_pipeline("a prompt in the wrong place " * 20, "torch")


def test_compute_units_mean_nothing_to_torch_and_that_is_said(toy_folder: Path) -> None:
    notes = load_pipeline(toy_folder, "torch", "cpu-and-ne").notes
    assert notes == ("compute units cpu-and-ne are Core ML's: the torch backend takes no notice of them",)


def test_what_a_folder_cannot_say_can_be_given(toy_folder: Path, tmp_path: Path) -> None:
    folder = without_manifest(toy_folder, tmp_path / "others")
    given = load_pipeline(folder, "torch", prediction_type="v_prediction", latent_scale=0.5)
    assert given.manifest.prediction_type == given.manifest.scheduler["prediction_type"] == "v_prediction"
    assert given.manifest.latents.scale == 0.5
    with pytest.raises(InputError, match="prediction type 'w': expected one of epsilon"):
        load_pipeline(folder, "torch", prediction_type="w")
    with pytest.raises(InputError, match=r"latent scale -1\.0: expected a positive number"):
        load_pipeline(folder, "torch", latent_scale=-1.0)


def test_models_of_two_checkpoints_in_one_folder_are_told_apart(toy_folder: Path, tmp_path: Path) -> None:
    folder = without_manifest(toy_folder, tmp_path / "others")
    name = f"{toy_models.APPLE}unet.mlpackage"
    shutil.copytree(folder / name, folder / name.replace("toy", "another"))
    with pytest.raises(InputError, match=r"models of several checkpoints \(another, toy\)"):
        load_pipeline(folder, "torch")


@pytest.mark.parametrize(
    ("sample", "width", "family"),
    [
        ((2, 4, 64, 64), 768, "sd1"),
        ((2, 9, 64, 64), 768, "sd1-inpainting"),
        ((2, 4, 64, 64), 1024, "sd2-base"),
        ((1, 4, 96, 96), 1024, "sd2-v"),
        ((2, 9, 64, 64), 1024, "sd2-inpainting"),
        ((2, 5, 64, 64), 1024, "sd2-depth"),
        ((2, 7, 128, 128), 1024, "x4-upscaler"),
    ],
)
def test_the_family_is_read_from_the_interface(sample: tuple[int, ...], width: int, family: str) -> None:
    assert family_of(sample[1], width, max(sample[2:])).name == family


@pytest.mark.parametrize(
    ("attention", "units", "bad"),
    [
        ("original", ComputeUnits.CPU_AND_NE, True),
        ("original", ComputeUnits.ALL, True),
        ("original", ComputeUnits.CPU_AND_GPU, False),
        ("split_einsum_v2", ComputeUnits.CPU_AND_GPU, True),
        ("split_einsum", ComputeUnits.CPU_AND_NE, False),
        ("split_einsum_v2", ComputeUnits.ALL, False),
        ("original", ComputeUnits.CPU_ONLY, False),
    ],
)
def test_bad_pairings_of_attention_and_compute_units_are_known(
    attention: str, units: ComputeUnits, bad: bool
) -> None:
    assert (bundle.bad_pairing(attention, units) is not None) == bad


def test_a_safety_checker_that_is_asked_for_and_lacking_is_said(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "models")
    data = json.loads((tmp_path / "models" / "manifest.json").read_text())
    (tmp_path / "models" / "manifest.json").write_text(json.dumps({**data, "requires_safety_checker": True}))
    assert "pictures are not checked" in load_pipeline(tmp_path / "models", "torch").notes[-1]
    assert load_pipeline(tmp_path / "models", "torch", check_safety=False).notes == ()


@pytest.mark.parametrize("text", ["cpu-and-ne", "CPU_AND_NE", "cpu_and_ne"])
def test_compute_units_are_read_in_every_spelling(text: str) -> None:
    assert bundle.parse_units(text) is ComputeUnits.CPU_AND_NE


def test_unknown_compute_units_list_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown compute units 'tpu': expected one of all, cpu-and-gpu"):
        load_pipeline("anywhere", "torch", "tpu")
