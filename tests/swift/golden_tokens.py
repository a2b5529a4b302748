"""Golden values of the tokenizer: a vocabulary trained on the spot, and transformers' tokens of prompts.

The vocabulary is small, but made as CLIP's is: every byte, merges within words, some that begin with "#".
"""

from __future__ import annotations

import itertools
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_runtime.prompt import tokenizer as tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 400
SENTENCES = (
    "a photo of an astronaut riding a horse on mars, highly detailed, 8k",
    "A cat, a dog, and a bird.",
    "the dog's bone isn't here; we're sure they've seen it, I'll bet he'd know, I'm sorry",
    "café crème brûlée at the naïve façade, Ångström, Straße, İstanbul, ΑΘΗΝΑ",
    "cafe\u0301 decomposed, A\u030a, e\u0323\u0302",
    "日本の桜の木の下の猫、水彩画",
    "한국어 프롬프트, русский текст, العربية, עברית, हिन्दी",
    "a 🐈 and a 👩‍🚀 on the 🌕!! 🇯🇵",
    "### heading ## two # one #hashtag #1",
    "don't'S 'tis 'RE we'LL rock'n'roll ''s '' ' 's",
    "(masterpiece), [best quality], {detailed}:1.2, <lora:x:0.5>",
    "1234567890 2.5d 4k 8K ½ ² Ⅷ ٣ 一二三",
    "tabs\tnew\nlines\r\nand\u00a0no-break\u2003em\u3000ideographic  double",
    "control\x00\x1f\x7f\x85 zero\u200bwidth \ufeffbom soft\u00adhyphen",
    "a<|endoftext|>b <|startoftext|> <|ENDOFTEXT|>x <|endoftext|!<|endoftext|>! <| endoftext|>",
    "email@example.com http://example.com/a_b?c=d&e=f#g \\path\\to",
    "ǅ ﬁ ẞ ΑΣ ᾳ ǰ̣ K Å \U0001f469\u200d\U0001f4bb \U00020000",
    '!!!??? ... --- ___ *** ~~~ ``` $$$ %%% ^^^ &&& +++ === ||| ;;; ::: """ <<< >>>',
    "in the style of greg rutkowski, art by artgerm, trending on artstation",
    "hello!world ! wow!!",
)
WEIGHTED = (
    "a (red:1.3) circle", "((a:1.2) b:1.1)", "a (red) circle", "(red:0) x", r"a \(red:1.3\) circle", "(a:b:1.5)",
    "(:1.5)", "a (b:1.5", "b:1.5)", "( :1.5 )", "(x: 1.25 )", "(x:+.5)", "(x:3.)", "(x:.)", "(x:1.5.2)",
    "(x:2)(y:3)", r"\\(x:2)", "\\", "\\(", "(((x:1.1):1.1):1.1)", "(日本:1.5)の猫",
    "(a:1.5) <|endoftext|> (b:0.5)", "(x:٢)", "(x:-0)",
)  # fmt: skip


WITH_ADDED = (
    "a photo of <cat-toy>",
    "<cat-toy><cat-toy> and <cat-toy>, <CAT-TOY>",
    "a<cat-toy>b <cat-toy>_1 <cat-toy>_2 sks_1 sks_10",
    "the (<cat-toy>:1.3) and <Style> or <style>",
    "solo Solo solos solo_ a-solo, (solo)",
    "<RAW> <raw> x<RAW>y",
    "nothing added, a cat",
    " ".join(["<cat-toy>"] * 40),
)


def values() -> dict[str, Any]:
    vocabulary, merges = _trained()
    prompts = [*_prompts(), *WEIGHTED]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        cases = []
        for padding, pieces in ((END, 1), ("!", 3)):
            tokenizer = tokenizers.load(folder, pad_token=padding)
            cases += [_case(tokenizer, padding, prompt, pieces) for prompt in prompts]
        config = _config(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = tokenizers.load(folder)
        added = [_case(tokenizer, END, prompt, 1) for prompt in WITH_ADDED]
    return {"vocabulary": vocabulary, "merges": merges, "cases": cases, "config": config, "added": added}


def _config(folder: Path) -> dict[str, Any]:
    """A tokenizer_config.json with tokens added to the vocabulary, as conversion writes it."""
    from tokenizers import AddedToken

    clip = tokenizers.load(folder).clip
    clip.add_tokens(["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<Style>", "<Style>_1", "sks_1"])
    clip.add_tokens([AddedToken("solo", single_word=True), AddedToken("<RAW>", normalized=False)])
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    listed = {
        str(number): {name: getattr(token, name) for name in names}
        for number, token in clip.added_tokens_decoder.items()
    }
    return {"tokenizer_class": "CLIPTokenizer", "pad_token": END, "added_tokens_decoder": listed}


def _case(tokenizer: Any, padding: str, prompt: str, pieces: int) -> dict[str, Any]:
    # Python refuses names of embeddings that it does not know; to Swift, and escaped to Python, they are letters.
    tokens = tokenizer.encode(re.sub(r"<(?=style>|raw>|lora:)", r"\\<", prompt), pieces)
    ids = [] if len(prompt) > 5000 else tokenizer.clip(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    weights = [] if not tokens.is_weighted else [[float(weight) for weight in row] for row in tokens.weights]
    return {
        "padding": padding,
        "prompt": prompt,
        "ids": ids,
        "rows": tokens.ids.tolist(),
        "weights": weights,
        "lost": tokens.lost[:200],
    }


def _prompts() -> Iterator[str]:
    yield from ("", " ", *SENTENCES)
    drawn = random.Random(1)
    words = [word for sentence in SENTENCES for word in sentence.split(" ")]
    for _ in range(170):
        yield " ".join(drawn.choices(words, k=drawn.randint(1, 30)))
    yield "a very long prompt, " * 500
    yield "日本語" * 400
    yield "x" * 10_000


def _trained() -> tuple[dict[str, int], list[str]]:
    """Byte pairs of the sentences by frequency (Sennrich et al., algorithm 1), of equal ones the last by text."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
    ordered = [letters[byte] for byte in visible] + [letters[byte] for byte in range(256) if byte not in visible]
    tokens = [*ordered, *(f"{letter}</w>" for letter in ordered)]
    plain = CLIPTokenizer(vocab={token: number for number, token in enumerate([*tokens, START, END])}, merges=[])
    backend = plain.backend_tokenizer
    counts = Counter(
        word
        for sentence in SENTENCES
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(sentence))
    )
    words = {(*word[:-1], f"{word[-1]}</w>"): count for word, count in counts.items()}
    merges: list[str] = []
    for _ in range(MERGES):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(" ".join(best))
        words = {_merged(word, best): count for word, count in words.items()}
    tokens += dict.fromkeys(merge.replace(" ", "") for merge in merges)
    return {token: number for number, token in enumerate([*tokens, START, END])}, merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts: list[str] = []
    index = 0
    while index < len(word):
        if word[index : index + 2] == pair:
            parts.append(word[index] + word[index + 1])
            index += 2
        else:
            parts.append(word[index])
            index += 1
    return tuple(parts)
