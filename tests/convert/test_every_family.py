"""Every component of every family with every attention: parity with the checkpoint's own network, interfaces."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import attention_weights
import tiny_checkpoints
from diffusion_convert import convert
from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.components import table
from diffusion_convert.conversion.convert import Conversion
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.bundle.manifest import Component
from diffusion_runtime.families import FAMILIES, AttentionKind
from diffusion_runtime.mil.ops import extras
from diffusion_runtime.mil.ops.registry import OPS
from diffusion_runtime.mil.package import Package, open_package
from diffusion_runtime.mil.program import operations
from diffusion_runtime.schedulers import imposed_on, settled
from read_back import check_read_back

pytestmark = pytest.mark.slow

Interface = Mapping[str, tuple[str, tuple[int, ...]]]
HALF, FULL = "Float16", "Float32"


KINDS = (*tiny_checkpoints.FAMILIES, "sd1-lcm", "sdxl-lcm", "sd1-small", "sd1-tiny", "sdxl-small")
"""Every family, UNets that take the guidance scale, and those of fewer layers."""
ORIGINAL, SPLIT, SPLIT_2 = AttentionKind.ORIGINAL, AttentionKind.SPLIT_EINSUM, AttentionKind.SPLIT_EINSUM_V2
SAME_BLOCKS = {
    "sd1-inpainting": SPLIT,
    "sd1-pix2pix": SPLIT_2,
    "sd1-lcm": SPLIT_2,
    "sd2-inpainting": SPLIT,
    "sd2-depth": SPLIT_2,
    "sdxl-inpainting": SPLIT_2,
    "sdxl-pix2pix": SPLIT,
    "sdxl-lcm": SPLIT,
    "sd1-tiny": SPLIT,
    "sdxl-small": SPLIT_2,
}
"""Their UNets differ from another's before and after the blocks with attentions, or in how many there are: one of
the split kinds is enough, and one, two and three rows have both."""


def attentions(family: str) -> tuple[AttentionKind, ...]:
    return (ORIGINAL, SAME_BLOCKS[family]) if family in SAME_BLOCKS else tuple(AttentionKind)


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(
    family: str,
    converted: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Conversion:
    """The other attentions are added to the original one's models, which tests of pictures use too."""
    output = shutil.copytree(converted(family), tmp_path_factory.mktemp(family) / "models")
    made = convert(tiny_checkpoint(family), output, ConvertOptions(attentions(family), compiled=False))
    assert not any(note.startswith("replaces") for note in made.notes)
    return made


def interface(package: Package) -> tuple[Interface, Interface]:
    declared = package.model.interface
    inputs, outputs = (
        {item.name: (item.dtype, item.shape) for item in items} for items in (declared.inputs, declared.outputs)
    )
    return inputs, outputs


def expected_interfaces(family: str) -> Mapping[str, tuple[Interface, Interface]]:
    """model-contracts.md for a tiny checkpoint, batch 2; 3 where a picture guides, 1 where a scale is an input."""
    recipe = tiny_checkpoints.RECIPES[family]
    unet, vae, text = recipe.unet, recipe.vae, recipe.text
    size = unet["sample_size"]
    picture, channels = size * latent_factor(vae), unet["in_channels"]
    batch = 1 if unet.get("time_cond_proj_dim") else 3 if family.endswith("pix2pix") else 2
    states, of_vae = ("hidden_embeds", FULL) if recipe.text_2 else ("last_hidden_state", HALF)
    sample: dict[str, tuple[str, tuple[int, ...]]] = {
        "sample": (HALF, (batch, channels, size, size)),
        "timestep": (HALF, (batch,)),
        "encoder_hidden_states": (HALF, (batch, unet["cross_attention_dim"], 1, 77)),
    }
    if family == "x4-upscaler":
        sample["class_labels"] = (HALF, (batch,))
    if batch == 1:
        sample["timestep_cond"] = (HALF, (batch, unet["time_cond_proj_dim"]))
    if recipe.text_2:
        sample["time_ids"] = (HALF, (batch, 5 if family == "sdxl-refiner" else 6))
        sample["text_embeds"] = (HALF, (batch, recipe.text_2["projection_dim"]))
    encoders = {
        name: (
            {"input_ids": (FULL, (1, 77))},
            {states: (FULL, (1, 77, config["hidden_size"])), "pooled_outputs": (FULL, (1, config[pooled]))},
        )
        for name, config, pooled in (
            ("text_encoder", text, "hidden_size"),
            ("text_encoder_2", recipe.text_2, "projection_dim"),
        )
        if config
    }
    found: dict[str, tuple[Interface, Interface]] = {
        **encoders,
        "unet": (sample, {"noise_pred": (FULL, (batch, 4, size, size))}),
        "vae_decoder": (
            {"z": (of_vae, (1, 4, size, size))},
            {"image": (FULL, (1, 3, picture, picture))},
        ),
        "vae_encoder": ({"x": (of_vae, (1, 3, picture, picture))}, {"latent": (FULL, (1, 8, size, size))}),
    }
    if recipe.safety_checker:
        images = (1, picture, picture, 3)
        found["safety_checker"] = (
            {"clip_input": (HALF, (1, 3, 224, 224)), "images": (HALF, images), "adjustment": (HALF, (1,))},
            {
                "filtered_images": (FULL, ()),  # as large as the input: of the picture's size or 512x512
                "has_nsfw_concepts": (FULL, (1, 1, 1, 1)),
                "concept_scores": (FULL, (1, 17)),
            },
        )
    if recipe.depth_estimator:
        side = tiny_checkpoints.DEPTH["image_size"]
        found["depth_estimator"] = (
            {"pixel_values": (HALF, (1, 3, side, side))},
            {"predicted_depth": (FULL, (1, side, side))},
        )
    return found


def components(made: Conversion) -> dict[tuple[str, str], Component]:
    return {
        (variant, name): component
        for variant, manifest in made.variants.items()
        for name, component in manifest.components.items()
    }


def test_every_component_is_at_parity(made: Conversion, family: str) -> None:
    assert made.family == (family if family in FAMILIES else family.partition("-")[0])
    assert made.variants.keys() == {kind.value for kind in attentions(family)}
    owners = table()
    for (variant, name), component in components(made).items():
        assert component.psnr_db, (variant, name)
        assert min(component.psnr_db.values()) >= owners[name].min_psnr_db, (variant, name, component.psnr_db)
        assert component.float32_ops == ()


def test_interfaces_are_those_that_apps_know(made: Conversion, family: str) -> None:
    expected = expected_interfaces(family)
    for variant, manifest in made.variants.items():
        folder = made.output / variant / "packages"
        assert manifest.components.keys() == expected.keys()
        for name, component in manifest.components.items():
            package = open_package(folder / component.files[0])
            assert interface(package) == expected[name], (variant, name)
            assert component.files == (f"Stable_Diffusion_version_{family}_{name}.mlpackage",)
            assert package.model.metadata.license
            assert package.model.metadata.user_defined["coreml_sd.family"] == made.family
            assert package.model.metadata.user_defined["prediction_type"] == manifest.prediction_type
            assert all(
                item.description for item in (*package.model.interface.inputs, *package.model.interface.outputs)
            )


def test_packages_hold_the_operations_that_extras_do_not(made: Conversion) -> None:
    """`mil.ops.extras` is for packages that other tools made."""
    paths = [path for name in made.variants for path in (made.output / name / "packages").glob("*.mlpackage")]
    held = {
        op.type for path in paths for op in operations(open_package(path).model.program.functions["main"].block)
    }
    assert {"conv", "softmax"} <= held
    assert [name for name in held - {"const"} if OPS[name].function.__module__ == extras.__name__] == []


def test_compiled_models_read_back_equal(made: Conversion, tmp_path: Path) -> None:
    """Those that the variants share are one file: once."""
    packages = {
        (path / "Manifest.json").stat().st_ino: path
        for variant in made.variants
        for path in (made.output / variant / "packages").glob("*.mlpackage")
    }
    for number, path in packages.items():
        check_read_back(path, tmp_path, str(number))


def test_split_attention_shows_einsum(made: Conversion) -> None:
    for variant, manifest in made.variants.items():
        package = open_package(made.output / variant / "packages" / manifest.components["unet"].files[0])
        kinds = {operation.type for operation in operations(package.model.program.functions["main"].block)}
        assert ("einsum" in kinds) == variant.startswith("split"), variant


def test_original_attention_never_multiplies_by_transposed_weights(made: Conversion) -> None:
    """It is reported to abort on the GPU of macOS 26. Components without a choice of attention have it, too."""
    for name, component in made.variants["original"].components.items():
        package = open_package(made.output / "original" / "packages" / component.files[0])
        products = attention_weights.products(package.model)
        assert products, name
        assert not any(products.values()), (name, products)


def test_components_without_a_choice_are_stored_once(made: Conversion) -> None:
    for name, component in table().items():
        if name in made.variants["original"].components and not component.uses_attention:
            files = [next((made.output / v / "packages").glob(f"*_{name}.mlpackage")) for v in made.variants]
            assert len({(file / "Manifest.json").stat().st_ino for file in files}) == 1, name


def test_equal_files_of_variants_are_stored_once(made: Conversion) -> None:
    """Without compiled models, too: the UNets' weights are the same bytes."""
    places: dict[str, set[int]] = {}
    for variant, described in made.variants.items():
        for component in described.components.values():
            for name, digest in component.sha256.items():
                file = made.output / variant / "packages" / name
                places.setdefault(digest, set()).add(file.stat().st_ino)
    assert max(map(len, places.values())) == 1


def test_manifest_tells_what_no_interface_tells(made: Conversion, family: str) -> None:
    recipe = tiny_checkpoints.RECIPES[family]
    manifest = made.variants["original"]
    takes_guidance = recipe.unet.get("time_cond_proj_dim") is not None
    assert manifest.scheduler == settled(recipe.scheduler, imposed_on(made.family, takes_guidance))
    assert manifest.prediction_type == recipe.scheduler["prediction_type"]
    assert manifest.noise_scheduler == recipe.low_res_scheduler
    assert manifest.latents.factor == latent_factor(recipe.vae)
    assert manifest.latents.scale == recipe.vae.get("scaling_factor", 0.18215)
