"""What Apple's Swift pipeline and the apps that are built on it check, read or take for granted in a folder of
compiled models and in a zip: read in their public sources, each as a function that fails where they do.

A check is given a `Folder` and says nothing where it holds.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = (
    "TextEncoder",
    "TextEncoder2",
    "Unet",
    "UnetChunk1",
    "UnetChunk2",
    "ControlledUnet",
    "ControlledUnetChunk1",
    "ControlledUnetChunk2",
    "UnetRefiner",
    "UnetRefinerChunk1",
    "UnetRefinerChunk2",
    "VAEDecoder",
    "VAEEncoder",
    "SafetyChecker",
)
SAFETY_SIZE = (1, 512, 512, 3)
"""Apple's SafetyChecker.swift feeds this, whatever the picture's size."""


@dataclass(frozen=True)
class Folder:
    """A folder of compiled models. ``attention``: what it was made with. ``refiners``: how many of its UNets are
    refiners, of those that Apple's pipeline takes for base and refiner."""

    path: Path
    attention: str
    xl: bool = False
    refiners: int = 0

    def metadata(self, name: str) -> dict[str, Any]:
        """What is in a compiled model's metadata.json. Mochi lists no model where it is not a list of one."""
        (found,) = json.loads((self.path / f"{name}.mlmodelc" / "metadata.json").read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        return found

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.mlmodelc").is_dir()

    def unets(self) -> tuple[str, ...]:
        """Chunks win over the whole UNet where both of them are there (Apple); the UNet for ControlNets where it is
        the only one."""
        chunks = ("UnetChunk1", "UnetChunk2")
        plain = chunks if all(map(self.has, chunks)) else ("Unet",)
        return self.controlled() if self.controlled() and not self.has(plain[0]) else plain

    def controlled(self) -> tuple[str, ...]:
        """As `unets`, of the UNet that is taken where ControlNets are named; none where there is none."""
        chunks = ("ControlledUnetChunk1", "ControlledUnetChunk2")
        return chunks if all(map(self.has, chunks)) else tuple(filter(self.has, ("ControlledUnet",)))

    def controlnets(self) -> list[str]:
        """All in the folder of ControlNets, as Mochi lists them."""
        return sorted(f"controlnet/{path.stem}" for path in (self.path / "controlnet").glob("*"))

    def refiner(self) -> tuple[str, ...]:
        """As `unets`; none where there is but one UNet."""
        chunks = ("UnetRefinerChunk1", "UnetRefinerChunk2")
        return chunks if all(map(self.has, chunks)) else tuple(filter(self.has, ("UnetRefiner",)))

    @property
    def is_refiner(self) -> bool:
        """Whether the refiner stands in the base's place: the first text encoder is not there then."""
        return bool(self.refiners) and not self.refiner()

    def inputs(self, name: str) -> dict[str, tuple[int, ...]]:
        return {one["name"]: shape(one) for one in self.metadata(name)["inputSchema"]}

    def outputs(self, name: str) -> list[str]:
        return [one["name"] for one in self.metadata(name)["outputSchema"]]

    def there(self) -> list[str]:
        return [*(name for name in NAMES if self.has(name)), *self.controlnets()]


def shape(schema: Mapping[str, str]) -> tuple[int, ...]:
    found = ast.literal_eval(schema["shape"])
    assert all(isinstance(size, int) and size > 0 for size in found)
    return tuple(found)


# --- Apple: StableDiffusionPipeline+Resources.swift, StableDiffusionXL+Resources.swift


def files_have_the_names_of_resource_urls(folder: Folder) -> None:
    encoders = [] if folder.is_refiner else ["TextEncoder"]
    encoders += ["TextEncoder2"] if folder.xl else []
    assert {"VAEDecoder", *encoders, *folder.unets()} <= set(folder.there())
    assert bool(folder.refiner()) == (folder.refiners > 0 and not folder.is_refiner)
    for name in ("vocab.json", "merges.txt"):
        assert (folder.path / name).is_file(), name


def compiled_models_have_what_core_ml_loads(folder: Folder) -> None:
    for name in folder.there():
        model = folder.path / f"{name}.mlmodelc"
        for file in (
            "model.mil",
            "coremldata.bin",
            "metadata.json",
            "weights/weight.bin",
            "analytics/coremldata.bin",
        ):
            assert (model / file).is_file(), f"{name}/{file}"


def vocabulary_is_numbers_by_token(folder: Folder) -> None:
    """BPETokenizer+Reading.swift: a dictionary; the tokens that it looks for are in it."""
    found = json.loads((folder.path / "vocab.json").read_text(encoding="utf-8"))
    assert all(isinstance(number, int) for number in found.values())
    assert {"<|startoftext|>", "<|endoftext|>"} <= found.keys()


def merges_are_pairs(folder: Folder) -> None:
    """BPETokenizer+Reading.swift: a line that is no comment and not two words is an error."""
    lines = (folder.path / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#")]
    assert pairs
    assert all(len(pair) == 2 and all(pair) for pair in pairs)


# --- Apple: TextEncoder.swift, TextEncoderXL.swift


def text_encoders_take_one_row_of_tokens(folder: Folder) -> None:
    """The first of the inputs is taken, and its last dimension for the number of tokens."""
    for name in (one for one in ("TextEncoder", "TextEncoder2") if folder.has(one)):
        ((_, sizes),) = folder.inputs(name).items()
        assert sizes == (1, 77), name
        (declared,) = folder.metadata(name)["inputSchema"]
        assert declared["dataType"] == "Float32", name


def text_encoders_give_what_is_looked_for(folder: Folder) -> None:
    for name in (one for one in ("TextEncoder", "TextEncoder2") if folder.has(one)):
        states = "hidden_embeds" if folder.xl else "last_hidden_state"
        assert {states, "pooled_outputs"} <= set(folder.outputs(name)), name


# --- Apple: Unet.swift


def unet_takes_what_is_fed(folder: Folder) -> None:
    fed = {"sample", "timestep", "encoder_hidden_states"}
    fed |= {"time_ids", "text_embeds"} if folder.xl else set()
    if folder.unets() != folder.controlled():
        assert set(folder.inputs(folder.unets()[0])) == fed


def unet_has_these_ranks(folder: Folder) -> None:
    """Batches of two are fed at once, of one in two calls; states are (batch, width, 1, tokens)."""
    inputs = folder.inputs(folder.unets()[0])
    batch, channels, height, width = inputs["sample"]
    assert batch in (1, 2)
    assert channels == 4
    assert height * width
    assert inputs["timestep"] == (batch,)
    rows, width_of_one, between, tokens = inputs["encoder_hidden_states"]
    assert (rows, between, tokens) == (batch, 1, 77)
    assert width_of_one == width_of_states(folder)
    if folder.xl:
        assert inputs["time_ids"] == (batch, 5 if folder.is_refiner else 6)
        assert len(inputs["text_embeds"]) == 2


def a_refiner_takes_what_is_fed(folder: Folder) -> None:
    """The base's latents and sizes with a score, and the second encoder's states alone."""
    if not folder.refiner():
        return
    base, refiner = (folder.inputs(names[0]) for names in (folder.unets(), folder.refiner()))
    assert set(refiner) == set(base)
    assert refiner["sample"] == base["sample"]
    batch = refiner["sample"][0]
    assert refiner["time_ids"] == (batch, 5)
    assert refiner["text_embeds"] == base["text_embeds"]
    assert refiner["encoder_hidden_states"] == (batch, width_of_state(folder, "TextEncoder2"), 1, 77)


def width_of_states(folder: Folder) -> int:
    """How wide the states of all text encoders are together."""
    return sum(width_of_state(folder, name) for name in ("TextEncoder", "TextEncoder2") if folder.has(name))


def width_of_state(folder: Folder, name: str) -> int:
    states = next(one for one in folder.metadata(name)["outputSchema"] if one["name"] != "pooled_outputs")
    return shape(states)[-1]


def chunks_hand_on_what_the_next_one_takes(folder: Folder) -> None:
    """The second stage is fed the first one's outputs and what the first was fed."""
    residuals = {output for name in folder.controlnets() for output in folder.outputs(name)}
    for first, *others in filter(None, (folder.unets(), folder.controlled(), folder.refiner())):
        known = set(folder.inputs(first)) | (residuals if first.startswith("Controlled") else set())
        for before, name in zip((first, *others), others, strict=False):
            known |= set(folder.outputs(before))
            assert set(folder.inputs(name)) <= known


def the_first_output_is_the_one_that_is_meant(folder: Folder) -> None:
    """`featureNames.first` is taken, of a set: there must be one."""
    wanted = {"VAEDecoder": "image", "VAEEncoder": "latent"}
    unets = (folder.unets(), folder.controlled(), folder.refiner())
    wanted |= {names[-1]: "noise_pred" for names in unets if names}
    for name, output in wanted.items():
        if folder.has(name):
            assert folder.outputs(name) == [output], name


# --- Apple: ControlNet.swift


def a_controlnet_takes_what_is_fed(folder: Folder) -> None:
    """What the UNet takes, with timesteps of two rows in any case, and a picture of three channels."""
    for name in folder.controlnets():
        inputs, unet = folder.inputs(name), folder.inputs(folder.controlled()[0])
        assert set(inputs) == {"sample", "timestep", "encoder_hidden_states", "controlnet_cond"}
        assert inputs["timestep"] == (2,)
        assert inputs["encoder_hidden_states"] == unet["encoder_hidden_states"]
        assert inputs["sample"] == unet["sample"]
        batch, _, height, width = inputs["sample"]
        assert inputs["controlnet_cond"] == (batch, 3, 8 * height, 8 * width)


def the_unet_takes_what_controlnets_give(folder: Folder) -> None:
    """All outputs go on to the UNet by their names; those of several are added through pointers to Float32."""
    trio = {"sample", "timestep", "encoder_hidden_states"}
    taken = {key: sizes for name in folder.controlled() for key, sizes in folder.inputs(name).items()}
    carried = {output for name in folder.controlled() for output in folder.outputs(name)}
    wanted = {key: sizes for key, sizes in taken.items() if key not in trio | carried}
    for name in folder.controlnets():
        given = folder.metadata(name)["outputSchema"]
        assert all(one["dataType"] == "Float32" for one in given), name
        assert {one["name"]: shape(one) for one in given} == wanted, name


# --- Apple: Decoder.swift, Encoder.swift


def vae_takes_one_input(folder: Folder) -> None:
    """The only one is taken; pictures are eight times larger than latents, and have three channels."""
    latents = folder.inputs(folder.unets()[0])["sample"]
    ((_, sizes),) = folder.inputs("VAEDecoder").items()
    assert sizes == (1, *latents[1:])
    (picture,) = (shape(one) for one in folder.metadata("VAEDecoder")["outputSchema"])
    assert picture[:2] == (1, 3)
    if folder.has("VAEEncoder"):
        ((_, taken),) = folder.inputs("VAEEncoder").items()
        assert taken == picture
        (moments,) = (shape(one) for one in folder.metadata("VAEEncoder")["outputSchema"])
        assert moments == (1, 8, *latents[2:])


# --- Apple: SafetyChecker.swift


def safety_checker_takes_what_is_fed(folder: Folder) -> None:
    if not folder.has("SafetyChecker"):
        return
    inputs = folder.inputs("SafetyChecker")
    assert set(inputs) == {"clip_input", "adjustment", "images"}
    assert inputs["clip_input"] == (1, 3, 224, 224)
    assert inputs["adjustment"] == (1,)
    assert "has_nsfw_concepts" in folder.outputs("SafetyChecker")


def safety_checker_takes_512x512(folder: Folder) -> None:
    if not folder.has("SafetyChecker"):
        return
    images = next(one for one in folder.metadata("SafetyChecker")["inputSchema"] if one["name"] == "images")
    assert SAFETY_SIZE in sizes_of(images)


def sizes_of(schema: Mapping[str, str]) -> list[tuple[int, ...]]:
    """All shapes that an input takes."""
    enumerated = ast.literal_eval(schema.get("enumeratedShapes", "[]"))
    return [tuple(one) for one in enumerated] or [shape(schema)]


# --- Mochi Diffusion: SDModel.swift


def schemas_hold_texts_alone(folder: Folder) -> None:
    """`[[String: String]]` is decoded: one other value, and Stable Diffusion XL is not recognised."""
    for name in folder.there():
        found = folder.metadata(name)
        for schema in (*found["inputSchema"], *found["outputSchema"]):
            assert all(isinstance(value, str) for value in schema.values()), (name, schema)


def histograms_are_counts(folder: Folder) -> None:
    for name in folder.there():
        found = folder.metadata(name)["mlProgramOperationTypeHistogram"]
        assert found
        assert all(type(count) is int for count in found.values())


def split_attention_shows_in_the_histogram(folder: Folder) -> None:
    """Mochi and GuernikaKit: the key of einsum operations, of the first chunk where there are chunks."""
    for name in (*folder.unets(), *folder.controlled(), *folder.refiner()):
        found = folder.metadata(name)["mlProgramOperationTypeHistogram"]
        assert ("Ios16.einsum" in found) == folder.attention.startswith("split"), name


def xl_shows_in_the_unets_inputs(folder: Folder) -> None:
    names = {one["name"] for one in folder.metadata(folder.unets()[0])["inputSchema"]}
    assert ({"time_ids", "text_embeds"} <= names) == folder.xl
    assert "latent_image_embeddings" not in names  # Stable Diffusion 3


def the_size_shows_in_the_encoders_first_input(folder: Folder) -> None:
    """Four numbers in brackets, apart by commas; the model is not listed where one of them does not parse."""
    text = folder.metadata("VAEEncoder")["inputSchema"][0]["shape"]
    assert re.fullmatch(r"\[[1-9]\d*(, [1-9]\d*){3}\]", text), text


# --- Mochi Diffusion: SDControlNet.swift, ImageGenerator.swift


def mochi_lists_controlnets(folder: Folder) -> None:
    """Whatever is in the folder has to be one, of the pictures' size and the model's attention. (They are looked
    for where the UNet for them is whole.)"""
    for name in folder.controlnets():
        (picture,) = (one for one in folder.metadata(name)["inputSchema"] if one["name"] == "controlnet_cond")
        assert re.fullmatch(r"\[[1-9]\d*(, [1-9]\d*){3}\]", picture["shape"]), picture["shape"]
        encoder = folder.metadata("VAEEncoder")["inputSchema"][0]
        assert shape(picture)[2:] == shape(encoder)[2:]
        einsum = "Ios16.einsum" in folder.metadata(name)["mlProgramOperationTypeHistogram"]
        assert einsum == folder.attention.startswith("split")


# --- GuernikaKit: CoreMLMetadata.swift, Unet.swift


def metadata_decodes_as_guernikas(folder: Folder) -> None:
    for name in folder.there():
        found = folder.metadata(name)
        assert all(isinstance(value, str) for value in found["userDefinedMetadata"].values()), name
        for schema in found["inputSchema"]:
            assert schema["shape"].startswith("[")
            assert schema["hasShapeFlexibility"] in ("0", "1")
            if name != "SafetyChecker" and schema["hasShapeFlexibility"] == "1":
                assert schema["shapeRange"].startswith("[[")


def states_tell_the_hidden_size(folder: Folder) -> None:
    """Only states of four dimensions do; the app stops where they do not."""
    assert len(folder.inputs(folder.unets()[0])["encoder_hidden_states"]) == 4


def prediction_type_is_told(folder: Folder) -> None:
    for name in (*folder.unets(), *folder.refiner()):
        assert folder.metadata(name)["userDefinedMetadata"]["prediction_type"] in ("epsilon", "v_prediction")


# --- Apple's Python client: coreml_model.py


def shapes_and_types_are_those_that_python_reads(folder: Folder) -> None:
    for name in folder.there():
        for one in folder.metadata(name)["inputSchema"]:
            assert one["dataType"] in ("Float16", "Float32"), name
            assert one["type"] == "MultiArray"
            assert shape(one)


CHECKS: tuple[Callable[[Folder], None], ...] = (
    files_have_the_names_of_resource_urls,
    compiled_models_have_what_core_ml_loads,
    vocabulary_is_numbers_by_token,
    merges_are_pairs,
    text_encoders_take_one_row_of_tokens,
    text_encoders_give_what_is_looked_for,
    unet_takes_what_is_fed,
    unet_has_these_ranks,
    a_refiner_takes_what_is_fed,
    a_controlnet_takes_what_is_fed,
    the_unet_takes_what_controlnets_give,
    chunks_hand_on_what_the_next_one_takes,
    the_first_output_is_the_one_that_is_meant,
    vae_takes_one_input,
    safety_checker_takes_what_is_fed,
    safety_checker_takes_512x512,
    schemas_hold_texts_alone,
    histograms_are_counts,
    split_attention_shows_in_the_histogram,
    xl_shows_in_the_unets_inputs,
    the_size_shows_in_the_encoders_first_input,
    mochi_lists_controlnets,
    metadata_decodes_as_guernikas,
    states_tell_the_hidden_size,
    prediction_type_is_told,
    shapes_and_types_are_those_that_python_reads,
)


def unpacked(path: Path, to: Path) -> Path:
    """The folder in a zip. Hugging Face's app wants it named exactly as the zip's stem, and nothing beside it."""
    with zipfile.ZipFile(path) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {path.stem}
        assert all(not _is_link(info) for info in archive.infolist())
        archive.extractall(to)
    return to / path.stem


def _is_link(info: zipfile.ZipInfo) -> bool:
    return (info.external_attr >> 28) == 0o12


def zip_urls(repository: str) -> Iterator[str]:
    """The names that Hugging Face's app asks for (ModelInfo.swift): of the repository's, by attention."""
    stem = repository.split("/")[-1]
    for suffix in ("original_compiled", "split_einsum_compiled", "split_einsum_v2_compiled"):
        yield f"{stem}_{suffix}.zip"
