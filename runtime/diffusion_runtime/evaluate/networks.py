"""Networks that look at pictures: CLIP, which also reads texts, and those whose features distances are taken of.

All compute in float32 on the processor. A weight that a file lacks is an error: transformers would go on with a
random one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffusion_runtime.errors import InputError, UnsupportedError
from diffusion_runtime.evaluate import inception, sources

Item = TypeVar("Item")

BATCH = 16
CLIP, INCEPTION = "clip", "inception"
_COMPUTED = "position_ids"
"""What checkpoints of old versions hold and those of new ones lack: it follows from the configuration."""


@dataclass(frozen=True, slots=True)
class Clip:
    """CLIP: pictures and texts as vectors of length 1, whose product says how well they fit."""

    network: Any
    processor: Any
    tokenizer: Any

    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(pictures, width)"""
        return normalize(self.embed(pictures))

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(pictures, width), as long as they come: what distances of CLIP's features are usually taken of."""
        pixels = self.processor(list(pictures), return_tensors="pt").pixel_values
        states = self.network.vision_model(pixels).pooler_output
        return cast(Tensor, self.network.visual_projection(states))

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """(texts, width). Texts that are longer than the network takes are cut off."""
        longest = self.network.config.text_config.max_position_embeddings
        found = []
        for some in _portions(texts):
            tokens = self.tokenizer(some, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            states = self.network.text_model(tokens.input_ids, attention_mask=tokens.attention_mask)
            found.append(normalize(self.network.text_projection(states.pooler_output)))
        return torch.cat(found)

    def too_long(self, texts: Sequence[str]) -> int:
        """How many of the texts are cut off."""
        longest = self.network.config.text_config.max_position_embeddings
        return sum(len(self.tokenizer(text).input_ids) > longest for text in texts)


@dataclass(frozen=True, slots=True)
class Features:
    """What distances are taken of: ``see`` makes (pictures, width) of pictures."""

    name: str
    see: Callable[[Sequence[Image.Image]], Tensor]


def load_clip(source: str) -> Clip:
    """Raises InputError or HubError for what is no CLIP in transformers' layout with safetensors."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = sources.folder_of(source, "--clip")
    kind = sources.read_config(folder).get("model_type")
    if kind != "clip":
        raise UnsupportedError(f"--clip {source}: a model of type {kind!r}: expected transformers' 'clip'")
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise InputError(f"--clip {source}: holds no tokenizer (vocab.json and merges.txt, or tokenizer.json)")
    with _loading("--clip", source):
        network = _complete(CLIPModel, folder)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) > network.config.text_config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, more tokens than its network knows")
    return Clip(network, processor, tokenizer)


def load_features(source: str, clip: Clip) -> Features:
    """``source`` is "clip" for the pictures' vectors that ``clip`` makes, "inception", a Hub id or a folder.

    Raises InputError or HubError for what is no network of pictures in transformers' layout with safetensors."""
    if source == CLIP:
        return Features(CLIP, clip.embed)
    if source == INCEPTION:
        folder = sources.folder_of(inception.REPOSITORY, "--features inception:")
        return Features(INCEPTION, inception.load(folder).see)
    folder = sources.folder_of(source, "--features")
    config = sources.read_config(folder)
    if config.get("architecture") == inception.ARCHITECTURE:
        return Features(source, inception.load(folder).see)
    if config.get("model_type") == "clip":
        return Features(source, load_clip(source).embed)
    return Features(source, _Pooled(source, folder).see)


class _Pooled:
    """Any of transformers' networks of pictures that gives a vector for each."""

    def __init__(self, source: str, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.source = source
        with _loading("--features", source):
            self.network = _complete(AutoModel, folder)
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(list(pictures), return_tensors="pt").pixel_values
        pooled: Tensor | None = getattr(self.network(pixels), "pooler_output", None)
        if pooled is None:
            raise UnsupportedError(
                f"--features {self.source}: gives no vector for a picture (pooler_output): name another network"
            )
        return pooled.flatten(1)


def _complete(kind: Any, folder: Path) -> Any:
    network, report = kind.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(name for name in report["missing_keys"] if _COMPUTED not in name)
    if missing:
        raise ValueError(f"its file lacks {len(missing)} weights, as {missing[0]}")
    return network.eval()


@contextmanager
def _loading(what: str, source: str) -> Iterator[None]:
    """One line of whatever transformers says of a folder that it cannot load."""
    from transformers.utils import logging

    before, showed = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # of many kinds: OSError, ValueError, KeyError, safetensors', …
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{what} {source}: cannot be loaded: {reason}; expected a network of pictures in transformers' layout"
        ) from error
    finally:
        logging.set_verbosity(before)
        if showed:
            logging.enable_progress_bar()


def all_of(see: Callable[[Sequence[Image.Image]], Tensor], pictures: Iterable[Image.Image]) -> Tensor:
    """(pictures, width), some at a time."""
    return torch.cat([see(some) for some in _portions(pictures)])


def _portions(items: Iterable[Item]) -> Iterator[list[Item]]:
    left = iter(items)
    while some := list(islice(left, BATCH)):
        yield some
