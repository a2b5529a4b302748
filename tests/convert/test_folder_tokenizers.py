"""Text encoders and tokenizers of folders in diffusers' layout: lengths and added tokens, as diffusers has them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_runtime.bundle import manifest
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.prompt import tokenizer
from folders import WEIGHTS, configure


def long_encoder(folder: Path, positions: int, length: int) -> None:
    """A text encoder of another number of positions, and a tokenizer that pads to ``length``."""
    text = folder / "text_encoder" / WEIGHTS["text_encoder"]
    weights = load_file(text)
    torch.manual_seed(1)
    name = "text_model.embeddings.position_embedding.weight"
    save_file({**weights, name: torch.randn(positions, weights[name].shape[1]).half()}, text)
    configure(folder, "text_encoder", max_position_embeddings=positions)
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": length}))


@pytest.mark.parametrize(("positions", "length"), [(248, 248), (248, 77), (248, 10**30), (64, 77), (64, 64)])
@pytest.mark.parametrize("verify", [True, False])
def test_the_unet_takes_as_many_tokens_as_diffusers_gives(
    positions: int, length: int, verify: bool, folder: Path, tmp_path: Path
) -> None:
    long_encoder(folder, positions, length)
    tokens = min(positions, length)
    options = ConvertOptions(
        attention=(AttentionKind.ORIGINAL,),
        components=("text_encoder", "unet"),
        height=64,
        width=64,
        verify=verify,
        compiled=False,
        zip=False,
    )
    made = convert(str(folder), tmp_path / "models", options).variants["original"].components
    assert made["text_encoder"].inputs[0].shape == (1, tokens)
    assert made["text_encoder"].outputs[0].shape == (1, tokens, 32)
    assert made["unet"].inputs[2].shape == (2, 32, 1, tokens)
    if verify:
        assert min(made["text_encoder"].psnr_db.values()) > 60


def add_tokens(folder: Path, *tokens: Any) -> Any:
    """Save tokens into a checkpoint as diffusers' textual inversion does; the tokenizer as users load it."""
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    loaded.add_tokens(list(tokens))
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    loaded.save_pretrained(folder / "tokenizer")
    assert not (folder / "tokenizer" / "vocab.json").exists()  # transformers 5 writes tokenizer.json alone
    text = folder / "text_encoder" / WEIGHTS["text_encoder"]
    weights, name = load_file(text), "text_model.embeddings.token_embedding.weight"
    more = torch.randn(len(loaded) + 1 - len(weights[name]), weights[name].shape[1]).half()
    save_file({**weights, name: torch.cat([weights[name], more])}, text)
    configure(folder, "text_encoder", vocab_size=len(loaded) + 1)
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def with_unknown_names_as_text(prompt: str, clip: Any) -> str:
    """As users have to type it: `<name>` of no added token is refused, where diffusers draws its letters."""

    def typed(name: re.Match[str]) -> str:
        is_known = clip.added_tokens_encoder.keys() & set(clip.tokenize(name[0]))
        return name[0] if is_known else f"\\{name[0]}"

    return re.sub(r"<[A-Za-z][^<>\s]*>", typed, prompt)


def special(content: str, **how: bool) -> Any:
    from transformers import AddedToken

    return AddedToken(content, **how)


ADDED: dict[str, tuple[Any, ...]] = {
    "a placeholder": ("<cat-toy>",),
    "several vectors": ("<cat-toy>", "<cat-toy>_1", "<cat-toy>_2"),
    "a plain word": ("gta5", "midjourney style"),
    "upper case": ("<Cat-TOY>",),
    "single words": (special("cat", single_word=True), special("on", single_word=True, lstrip=True)),
    "special": (special("<sks>", special=True), special("[V]", normalized=False)),
    "not normalized": (special("<CAT>", normalized=False),),
    "other letters": ("猫", "<é>"),
}
PROMPTS = (
    "a <cat-toy> on white",
    "a<cat-toy>on <cat-toy>_1 <CAT-TOY>_2",
    "A GTA5 photo in midjourney style",
    "<Cat-TOY> of <CAT> cats cat",
    "horse on on<sks> [V]s [v]",
    "猫 on <é> <É>",
)


@pytest.mark.parametrize("tokens", ADDED.values(), ids=ADDED)
def test_added_tokens_are_those_of_the_checkpoint_everywhere(
    tokens: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    """In packages, compiled folders and zips: for transformers, and for the runtime."""
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import AutoTokenizer, CLIPTokenizer

    from diffusion_convert.checkpoint.vocabulary import write_vocabulary

    original = add_tokens(folder, *tokens)
    target = tmp_path / "written"
    target.mkdir()
    write_vocabulary(open_checkpoint(str(folder)).tokenizers["text_encoder"], target)
    assert not (target / "tokenizer.json").exists()
    for written in (CLIPTokenizer.from_pretrained(target), AutoTokenizer.from_pretrained(target)):
        assert written.get_vocab() == original.get_vocab()
        assert written.pad_token_id == original.pad_token_id
        for prompt in PROMPTS:
            assert written(prompt).input_ids == original(prompt).input_ids, prompt
    ours = tokenizer.load(target)
    for prompt in PROMPTS:
        all_vectors = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, original)
        expected = original(all_vectors, padding="max_length", max_length=77).input_ids
        if (typed := with_unknown_names_as_text(prompt, original)) != prompt:
            with pytest.raises(InputError, match="an embedding that these models do not know"):
                ours.encode(prompt)
        assert ours.encode(typed).ids.tolist() == [expected], prompt


def test_added_tokens_reach_every_folder_and_zip(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from diffusion_runtime import zips

    original = add_tokens(folder, "<cat-toy>")
    made = convert(
        str(folder),
        tmp_path / "models",
        ConvertOptions(attention=(AttentionKind.ORIGINAL,), components=("text_encoder",), verify=False),
    )
    variant = made.output / "original"
    (archive,) = made.output.glob("*.zip")
    unpacked = zips.unpack(archive, tmp_path / "unpacked")
    for place in (variant / "packages", variant / "compiled", unpacked):
        loaded = CLIPTokenizer.from_pretrained(place)
        assert loaded("a <cat-toy> on").input_ids == original("a <cat-toy> on").input_ids
        assert manifest.FILE_NAME in {path.name for path in place.iterdir()}


def test_tokenizer_json_wins_over_older_files_beside_it(folder: Path, tmp_path: Path) -> None:
    """As transformers loads them: saved anew into a folder, whose vocab.json stays."""
    from transformers import CLIPTokenizer

    from diffusion_convert.checkpoint.vocabulary import write_vocabulary

    kept = {name: (folder / "tokenizer" / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    add_tokens(folder, "<cat-toy>", "horsey")
    for name, data in kept.items():
        (folder / "tokenizer" / name).write_bytes(data)
    original = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    target = tmp_path / "written"
    target.mkdir()
    write_vocabulary(open_checkpoint(str(folder)).tokenizers["text_encoder"], target)
    for prompt in (*PROMPTS, "a horsey on"):
        assert CLIPTokenizer.from_pretrained(target)(prompt).input_ids == original(prompt).input_ids


@pytest.mark.parametrize("suffix", ["tokenizer", "."])
def test_a_tokenizer_json_beside_a_single_file(suffix: str, folder: Path, tmp_path: Path) -> None:
    import compvis_layout

    original = add_tokens(folder, "<cat-toy>")
    place = tmp_path / "single"
    path = compvis_layout.write(folder, place / "model.safetensors")
    if suffix == ".":
        for file in (place / "tokenizer").iterdir():
            shutil.move(file, place / file.name)
        (place / "tokenizer").rmdir()
    from diffusion_convert.checkpoint.vocabulary import write_vocabulary

    target = tmp_path / "written"
    target.mkdir()
    write_vocabulary(open_checkpoint(str(path)).tokenizers["text_encoder"], target)
    ids = np.array(original("a <cat-toy> on white", padding="max_length", max_length=77).input_ids)
    assert np.array_equal(tokenizer.load(target).encode("a <cat-toy> on white").ids[0], ids)
