"""What is put into the networks because apps have it fixed: the arithmetic, and which checkpoint needs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffusion_convert.bundle.model_card import model_card
from diffusion_convert.checkpoint.folding import fold, latents, prediction
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components.vae_decoder import own_latents
from diffusion_convert.components.vae_encoder import known_latents
from diffusion_convert.conversion.assemble import describe
from diffusion_convert.conversion.plan import make_plan
from diffusion_convert.networks.folding import Epsilon, Padding
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.bundle.manifest import Folded, Manifest, OwnLatents
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.folding import Folding

END = 9
Folder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([8, 3, 4, 9, 9, 9], [8, 3, 4, 9, 0, 0]),
        ([8, 3, 4, 9, 0, 0], [8, 3, 4, 9, 0, 0]),
        ([8, 9, 9, 9, 9, 9], [8, 9, 0, 0, 0, 0]),
        ([8, 3, 4, 5, 6, 9], [8, 3, 4, 5, 6, 9]),
        ([8, 3, 4, 5, 6, 7], [8, 3, 4, 5, 6, 7]),
        ([8, 9, 9, 3, 9, 0], [8, 9, 9, 3, 9, 0]),  # ends that were typed
        ([8, 9, 9, 9, 3, 9], [8, 9, 9, 9, 3, 9]),
    ],
)
def test_only_the_padding_is_replaced(given: list[int], expected: list[int]) -> None:
    found = Padding(END, 0, len(given))(torch.tensor([given]).float())
    assert found.tolist() == [expected]


def test_numbers_of_a_whole_vocabulary_stay_exact() -> None:
    given = torch.tensor([[49406, 49405, 321, 49407, 49407, 49407]]).float()
    assert Padding(49407, 0, 6)(given).tolist() == [[49406, 49405, 321, 49407, 0, 0]]


def test_v_becomes_the_noise_that_was_put_in() -> None:
    alphas = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    picture, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.manual_seed(0)).unbind()
    times = torch.tensor([0.0, 500.25, 999.0])
    low = times.floor().long()
    share = times - low
    alpha, sigma = (
        (root[low] * (1 - share) + root[(low + 1).clamp(max=999)] * share)[:, None, None, None]
        for root in (alphas.sqrt(), (1 - alphas).sqrt())
    )
    sample, v = alpha * picture + sigma * noise, alpha * noise - sigma * picture
    extra = torch.cat([sample, torch.full((3, 5, 5, 5), 9.0)], dim=1)  # a mask and a picture's latents
    assert torch.allclose(Epsilon(alphas)(v, extra, times), noise, atol=1e-4)


@pytest.mark.parametrize(
    "own",
    [OwnLatents(scale=0.7295), OwnLatents(scale=0.3, shift=0.1), OwnLatents(scale=0.5, mean=(1, -2), std=(2, 0.5))],
)
def test_latents_are_the_same_on_both_ways(tiny_checkpoint: Folder, own: OwnLatents) -> None:
    """Client: ``z = latents / 0.18215`` and ``latents = (mean + deviation * noise) * 0.18215``."""
    opened = open_checkpoint(str(tiny_checkpoint("sd1")))
    vae = opened.models["vae"]
    vae = replace(vae, config={**vae.config, "latent_channels": 2})
    checkpoint = replace(opened, models={**opened.models, "vae": vae}, folded=Folded(latents=own))
    decode, encode = own_latents(checkpoint), known_latents(checkpoint)
    assert decode is not None
    assert encode is not None
    mean, std = (
        torch.tensor(values or (default,) * 2).reshape(1, 2, 1, 1)
        for values, default in ((own.mean, own.shift), (own.std, 1.0))
    )
    found = torch.randn(1, 2, 3, 3, generator=torch.manual_seed(0))
    assert torch.allclose(decode(found / 0.18215), found * std / own.scale + mean, rtol=1e-5, atol=1e-5)
    moments = torch.randn(1, 4, 3, 3, generator=torch.manual_seed(1))
    theirs = DiagonalGaussianDistribution(moments).sample(torch.manual_seed(2))
    ours = DiagonalGaussianDistribution(encode(moments)).sample(torch.manual_seed(2))
    assert torch.allclose(ours * 0.18215, (theirs - mean) * own.scale / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "padding", "own"),
    [
        ("sd1", None, ()),
        ("sd2-base", {"text_encoder": 0}, (Folding.PADDING,)),
        ("sd2-v", {"text_encoder": 0}, (Folding.PADDING, Folding.PREDICTION)),
        ("x4-upscaler", {"text_encoder": 0}, (Folding.PADDING, Folding.PREDICTION)),
        ("sdxl", {"text_encoder_2": 0}, (Folding.PADDING,)),
        ("sdxl-refiner", {"text_encoder_2": 0}, (Folding.PADDING,)),
        ("sdxl-v-zero-snr", {"text_encoder_2": 0}, (Folding.PADDING,)),
    ],
)
def test_what_a_checkpoint_needs(
    tiny_checkpoint: Folder, family: str, padding: dict[str, int] | None, own: tuple[Folding, ...]
) -> None:
    opened = open_checkpoint(str(tiny_checkpoint(family)))
    folded = fold(opened, list(Folding))
    assert folded.folded.names == own
    assert folded.folded.padding == padding
    assert folded.padding == fold(opened, ()).padding == (padding or {})
    plan = make_plan(opened, ConvertOptions("original", no_fold="padding"))
    assert describe(plan, AttentionKind.ORIGINAL, {}).padding == (padding or {})
    assert latents(folded) == latents(opened)
    assert fold(opened, ()).folded.names == ()


def test_a_schedule_without_a_signal_stays_as_it_is(tiny_checkpoint: Folder) -> None:
    opened = open_checkpoint(str(tiny_checkpoint("sdxl-v-zero-snr")))
    plan = make_plan(opened, ConvertOptions(AttentionKind.ORIGINAL, fold="prediction"))
    assert prediction(plan.checkpoint) == "v_prediction"
    assert any("zero terminal SNR" in note for note in plan.notes)


def test_the_default_and_what_is_asked() -> None:
    assert ConvertOptions().foldings == {Folding.LATENT_SCALE, Folding.PADDING}
    assert ConvertOptions(fold="prediction", no_fold="padding").foldings == {
        Folding.LATENT_SCALE,
        Folding.PREDICTION,
    }
    with pytest.raises(InputError, match=r"unknown fold 'paddings': expected one of latent-scale, padding"):
        ConvertOptions(fold="paddings")
    with pytest.raises(InputError, match="--fold padding and --no-fold padding exclude each other"):
        ConvertOptions(fold="padding", no_fold=["padding"])


def test_what_is_not_folded_is_kept(tmp_path: Path, tiny_checkpoint: Folder) -> None:
    opened = open_checkpoint(str(tiny_checkpoint("sd2-base")))
    vae = replace(opened.models["vae"], config={**opened.models["vae"].config, "scaling_factor": 0.5})
    checkpoint = replace(opened, models={**opened.models, "vae": vae})
    for kept in Folding:
        options = ConvertOptions(AttentionKind.ORIGINAL, no_fold=kept)
        made = make_plan(checkpoint, options).checkpoint
        assert kept not in made.folded.names
        assert latents(made)[0] == (0.5 if kept is Folding.LATENT_SCALE else 0.18215)
    assert json.loads(Folded().model_dump_json(exclude_none=True)) == {}


def test_the_card_tells_what_was_folded(toy_manifest: Manifest) -> None:
    own = Folded(latents=OwnLatents(scale=0.7295), padding={"text_encoder": 0}, prediction_type="v_prediction")
    card = model_card({"original": toy_manifest.model_copy(update={"folded": own})}, {})
    assert "\n- latent-scale: the latents' scale: the checkpoint's own is 0.7295\n" in card
    assert "\n- padding: the padding of prompts: the checkpoint's own is token 0 (text_encoder)\n" in card
    assert "\n- prediction: the prediction: the checkpoint's own is v_prediction\n" in card
    assert "What apps have fixed" not in model_card({"original": toy_manifest}, {})


@pytest.fixture
def toy_manifest() -> Manifest:
    return Manifest.model_validate(
        {
            "name": "org/tiny",
            "family": "sd2-v",
            "source": {"name": "org/tiny"},
            "kind": "packages",
            "attention": "original",
            "height": 96,
            "width": 96,
            "batch_size": 2,
            "target": "macOS13",
            "latents": {"channels": 4, "factor": 8, "scale": 0.18215},
            "prediction_type": "epsilon",
            "components": {},
            "scheduler": {"_class_name": "DDIMScheduler"},
        }
    )
