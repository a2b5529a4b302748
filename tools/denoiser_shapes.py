"""Text encoder and UNet of the shapes checkpoint, trained together on the autoencoder's latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from draw_shapes import phrase
from fit_shapes import Fit, Plan
from judge_shapes import captions
from tokenizer_shapes import MAX_TOKENS

TEXT_WIDTH = 128
CAPTIONS_PER_BATCH = 12  # per process
PICTURES_PER_CAPTION = 2  # of each of them, each with its own noise: the text is encoded once for all
OFFSET_NOISE = 0.1  # standard deviation of the noise that is constant over a latent's 8 x 8 places
HIGH_NOISE_SHARE = 0.25  # of the timesteps, drawn from the noisiest HIGH_NOISE_FROM..999
HIGH_NOISE_FROM = 600
MAX_WEIGHT = 10.0
BLIND_WEIGHT = 20.0  # of the difference that a caption makes where it should make none: guidance takes it 7.5 times

# See draw_excess; in units of the latents' standard deviation, the second in units of the noise's.
EXCESS_SHARE, MAX_EXCESS_NOISE, MAX_EXTRA_STRENGTH, MAX_WRONG_COLOR = 0.4, 1.0, 6.5, 0.7


def build_scheduler() -> PNDMScheduler:
    """SD 1.x's."""
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained one: CLIP's, two layers of 128 channels."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained one: SD 1.x's block types in three levels, 8 x 8 to 2 x 2."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=32,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (texts, 77), padded and cut as diffusers does."""
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids = tokens.input_ids
    assert isinstance(ids, Tensor)
    return ids


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,), the noisiest ones more often: there the colours are decided."""
    low = torch.randint(0, 1000, (count,), generator=generator)
    high = torch.randint(HIGH_NOISE_FROM, 1000, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < HIGH_NOISE_SHARE, high, low)


def draw_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Gaussian noise (batch, 4, 8, 8) with some that is constant over the places."""
    offset = torch.randn((*shape[:2], 1, 1), generator=generator)
    return torch.randn(shape, generator=generator) + OFFSET_NOISE * offset


def draw_excess(picture: Tensor, alpha: Tensor, generator: torch.Generator) -> Tensor:
    """What guidance leaves in a latent beside picture (batch, 4, 8, 8) and noise: too much of it, wrong colours.

    Guidance of 7.5 adds what the prompt says 7.5 times, and in the first steps that is all of the picture; later,
    if the two predictions disagree about a colour ever so little, the sampler swings around it more and more. All
    this counts as noise, so that the networks learn to take it away, with and without a prompt.
    """
    bound = MAX_EXCESS_NOISE * ((1 - alpha) / alpha).sqrt()
    chosen = torch.rand(alpha.shape, generator=generator) < EXCESS_SHARE
    strength = chosen * torch.rand(alpha.shape, generator=generator) * bound.clamp(max=MAX_EXTRA_STRENGTH)
    level = torch.rand(alpha.shape, generator=generator) * bound.clamp(max=MAX_WRONG_COLOR)
    coarse = torch.zeros_like(picture)
    for places in (1, 2, 4):
        colors = torch.randn((*picture.shape[:2], places, places), generator=generator)
        coarse += interpolate(colors, size=picture.shape[2:]) / math.sqrt(3)
    return strength * picture + level * coarse


@dataclass(frozen=True)
class Batch:
    """``noisy``, ``noise`` (rows, 4, 8, 8), ``times`` (rows), ``weight`` (rows, 1, 1, 1); captions are fewer."""

    texts: list[str]
    noisy: Tensor
    times: Tensor
    noise: Tensor
    weight: Tensor


class Denoiser:
    """What the training of text encoder and UNet needs besides a plan."""

    def __init__(self, tokenizer: CLIPTokenizer, plan: Plan, latents: Tensor, device: torch.device) -> None:
        """`latents`: (captions, pictures, 4, 8, 8), scaled to a standard deviation of one."""
        torch.manual_seed(plan.seed)
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(tokenizer).to(device)
        self.unet = build_unet().to(device)
        self.latents = latents
        self.middle = latents.mean(dim=(0, 1, 3, 4)).view(1, -1, 1, 1)
        self.captions = captions()
        self.alphas = build_scheduler().alphas_cumprod
        self.device = device
        self.fit = Fit(plan, [self.text_encoder, self.unet])

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch: each caption several times, each with a picture, a timestep and noise of its own."""
        chosen = torch.randint(len(self.captions), (CAPTIONS_PER_BATCH,), generator=generator)
        random = Random(int(torch.randint(2**31, (1,), generator=generator)))
        texts = [phrase(self.captions[i], random) for i in chosen.tolist()]
        rows = chosen.repeat_interleave(PICTURES_PER_CAPTION)
        pictures = torch.randint(self.latents.shape[1], rows.shape, generator=generator)
        clean = self.latents[rows, pictures]
        times = draw_timesteps(len(rows), generator)
        noise = draw_noise(clean.shape, generator)
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        noise = noise + (alpha / (1 - alpha)).sqrt() * draw_excess(clean - self.middle, alpha, generator)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        return Batch(texts, noisy, times, noise, (1 / alpha).clamp(max=MAX_WEIGHT))

    def loss(self, generator: torch.Generator) -> Tensor:
        """Weighted error of the predicted noise on one batch."""
        batch = self.draw(generator)
        found, blind = predict(self.tokenizer, self.text_encoder, self.unet, batch, PICTURES_PER_CAPTION)
        weight, noise = batch.weight.to(self.device), batch.noise.to(self.device)
        value: Tensor = (weight * (found - noise).square()).mean()
        value += BLIND_WEIGHT * (blind - found[::PICTURES_PER_CAPTION].detach()).square().mean()
        return value


def predict(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    batch: Batch,
    blind_every: int,
) -> tuple[Tensor, Tensor]:
    """The noise in ``batch`` as predicted with its captions (rows, 4, 8, 8), and of every ``blind_every``-th row
    without a caption."""
    device = next(unet.parameters()).device
    states = text_encoder(tokenize(tokenizer, [*batch.texts, ""]).to(device)).last_hidden_state
    told = states[:-1].repeat_interleave(len(batch.times) // len(batch.texts), dim=0)
    again = slice(None, None, blind_every)
    untold = states[-1:].expand(len(batch.times[again]), -1, -1)
    x = torch.cat([batch.noisy, batch.noisy[again]]).to(device)
    times = torch.cat([batch.times, batch.times[again]]).to(device)
    found: Tensor = unet(x, times, torch.cat([told, untold])).sample
    return found[: len(batch.times)], found[len(batch.times) :]
