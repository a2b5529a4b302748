"""Text encoder and UNet of the shapes checkpoint, trained together on the autoencoder's latents."""

from __future__ import annotations

from random import Random

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from draw_shapes import phrase
from fit_shapes import Fit, Plan
from judge_shapes import captions
from tokenizer_shapes import MAX_TOKENS
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 128
CAPTIONS_PER_BATCH = 16
PICTURES_PER_CAPTION = 2  # of each of them, each with its own noise: the text is encoded once for all
OFFSET_NOISE = 0.1  # standard deviation of the noise that is constant over a latent's 8 x 8 places
HIGH_NOISE_SHARE = 0.5  # of the timesteps, drawn from the noisiest HIGH_NOISE_FROM..999
HIGH_NOISE_FROM = 600
MAX_WEIGHT = 20.0


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


class Denoiser:
    """What the training of text encoder and UNet needs besides a plan."""

    def __init__(self, tokenizer: CLIPTokenizer, plan: Plan, latents: Tensor, device: torch.device) -> None:
        """`latents`: (captions, pictures, 4, 8, 8), scaled to a standard deviation of one."""
        torch.manual_seed(plan.seed)
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(tokenizer).to(device)
        self.unet = build_unet().to(device)
        self.latents = latents
        self.captions = captions()
        self.alphas = build_scheduler().alphas_cumprod
        self.device = device
        self.fit = Fit(plan, [self.text_encoder, self.unet])

    def loss(self, generator: torch.Generator) -> Tensor:
        """Weighted error of the predicted noise on one batch."""
        chosen = torch.randint(len(self.captions), (CAPTIONS_PER_BATCH,), generator=generator)
        random = Random(int(torch.randint(2**31, (1,), generator=generator)))
        ids = tokenize(self.tokenizer, [phrase(self.captions[i], random) for i in chosen.tolist()])
        rows = chosen.repeat_interleave(PICTURES_PER_CAPTION)
        pictures = torch.randint(self.latents.shape[1], rows.shape, generator=generator)
        clean = self.latents[rows, pictures]
        times = draw_timesteps(len(rows), generator)
        noise = draw_noise(clean.shape, generator)
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        states = self.text_encoder(ids.to(self.device)).last_hidden_state.repeat_interleave(PICTURES_PER_CAPTION, 0)
        found = self.unet(noisy.to(self.device), times.to(self.device), states).sample
        error = (found - noise.to(self.device)).square().mean(dim=(1, 2, 3))
        weight = (1 / self.alphas[times]).clamp(max=MAX_WEIGHT).to(self.device)
        value: Tensor = (weight * error).mean()
        return value
