"""The autoencoder of the shapes checkpoint: 64 x 64 pictures to (4, 8, 8) latents and back."""

from __future__ import annotations

import math
from random import Random

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from draw_shapes import draw, draw_polygon
from fit_shapes import Fit, Plan
from judge_shapes import captions

LATENT_NOISE = 0.05  # standard deviation; in training, and as the saved autoencoder's constant one
DECODER_NOISE = 0.2  # the largest, when the decoder is trained on its own
LATENT_PENALTY = 1e-3
COLOR_WEIGHT = 0.2  # the first three latent channels are held near the average colour of each 8 x 8 pixels, because
COLOR_SCALE = 2.0  # left alone, a thousand steps pass before the latents carry three independent colours
PICTURES_PER_CAPTION = 32
FREE_PICTURES = 5000  # in any two colours, so that the latents between the palette's colours mean something
SHAPE_WEIGHT = 1.5
BATCH = 16  # per process


def build_autoencoder() -> AutoencoderKL:
    """An untrained one of about a million weights, with SD 1.x's factor of 8 between pixels and latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def draw_pool(seed: int) -> Tensor:
    """PICTURES_PER_CAPTION pictures of every caption, bytes (captions, pictures, 3, 64, 64)."""
    random = Random(seed)
    rows = [
        torch.stack([torch.tensor(draw(caption, random)) for _ in range(PICTURES_PER_CAPTION)])
        for caption in captions()
    ]
    return torch.stack(rows).permute(0, 1, 4, 2, 3).contiguous()


def draw_free(seed: int) -> Tensor:
    """Shapes in any two colours, bytes (FREE_PICTURES, 3, 64, 64)."""
    random = Random(seed + 1)
    everything = captions()
    pictures = []
    for _ in range(FREE_PICTURES):
        front, behind = ((random.randrange(256), random.randrange(256), random.randrange(256)) for _ in "fb")
        pictures.append(torch.tensor(draw_polygon(random.choice(everything), front, behind, random)))
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()


def as_input(pictures: Tensor) -> Tensor:
    """Bytes to the autoencoder's -1..1."""
    return pictures.float() / 127.5 - 1.0


def near_shape(x: Tensor) -> Tensor:
    """Weight of each place's error (batch, 1, h, w): high on and around the shape, which is little of a picture."""
    shape = (x - x[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1
    return 1.0 + SHAPE_WEIGHT * max_pool2d(shape.float(), kernel_size=7, stride=1, padding=3)


def picture_error(y: Tensor, x: Tensor) -> Tensor:
    """How far pictures (batch, 3, h, w) are from what they should be, the shapes counting most."""
    error = (y - x) * near_shape(x)
    value: Tensor = error.square().mean() + 0.2 * error.abs().mean()
    return value


def train_autoencoder(plan: Plan, pool: Tensor, device: torch.device) -> AutoencoderKL:
    """Train on the pool (captions, pictures, 3, 64, 64): mean + constant noise, and a light penalty on the mean."""
    torch.manual_seed(plan.seed)
    model = build_autoencoder().to(device)
    pictures = torch.cat([pool.flatten(0, 1), draw_free(plan.seed)])

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        x = as_input(pictures[chosen]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            mean = model.encode(x).latent_dist.mean
            noise = torch.randn(mean.shape, generator=generator).to(device)
            y = model.decode(mean + LATENT_NOISE * noise).sample
        off_color = mean[:, :3].float() - COLOR_SCALE * avg_pool2d(x, 8)
        value = picture_error(y.float(), x)
        value += COLOR_WEIGHT * off_color.square().mean()
        value += LATENT_PENALTY * mean[:, 3:].float().square().mean()
        return value

    fit = Fit(plan, [model])
    fit.run(loss)
    fit.use_average()
    settle_variance(model)
    return model


def train_decoder(plan: Plan, model: AutoencoderKL, pool: Tensor, latents: Tensor, device: torch.device) -> None:
    """Train the decoder alone, on the pool's latents with more and less noise, as a UNet leaves some too."""
    model.requires_grad_(False)
    learning = [model.decoder, model.post_quant_conv]
    for network in learning:
        network.requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool), (BATCH,), generator=generator)
        chosen = torch.randint(pool.shape[1], (BATCH,), generator=generator)
        level = DECODER_NOISE * torch.rand((BATCH, 1, 1, 1), generator=generator)
        z = latents[rows, chosen] + level * torch.randn((BATCH, *latents.shape[2:]), generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            y = model.decode(z.to(device)).sample
        return picture_error(y.float(), as_input(pool[rows, chosen]).to(device))

    fit = Fit(plan, learning)
    fit.run(loss)
    fit.use_average()


def settle_variance(model: AutoencoderKL) -> None:
    """Make the encoder's log-variance the constant that it was trained with."""
    with torch.no_grad():
        model.quant_conv.weight[4:] = 0.0
        model.quant_conv.bias[4:] = 2.0 * math.log(LATENT_NOISE)


@torch.no_grad()
def encode_pool(model: AutoencoderKL, pool: Tensor, device: torch.device) -> Tensor:
    """The pool's latents (captions, pictures, 4, 8, 8), unscaled means."""
    rows = [model.encode(as_input(row).to(device)).latent_dist.mean.cpu() for row in pool]
    return torch.stack(rows)


@torch.no_grad()
def decode_pool(model: AutoencoderKL, latents: Tensor, device: torch.device) -> Tensor:
    """The pictures of half the latents (captions, pictures, 4, 8, 8), bytes (captions, pictures / 2, 3, 64, 64)."""
    rows = [model.decode(row[::2].to(device)).sample.cpu() for row in latents]
    return ((torch.stack(rows).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
