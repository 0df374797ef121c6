"""The VAE's encoder in closed form: principal components of 8×8 patches, written into Qwen-Image's encoder class.

A linear encoder needs no training, its latents are smooth, and the DiT can be trained at once, while the decoder is
still learning to turn them back into sharp images. Every layer of the class is used as a linear map: residual
branches are zero, each downsampling convolution projects a 2×2 block onto its main components, a large constant
channel makes the last RMS norm constant, and the last SiLU acts on ±x pairs, for silu(x) − silu(−x) = x.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from ray_diffsynth.demo.draw import Pixels

Array = npt.NDArray[np.float64]
CHANNELS = 16
CONSTANT = 200.0  # of the constant channel; features are of order 1
LOG_VARIANCE = -12.0
FLATTEN = 0.5  # the deviation of component k becomes deviation_k ** (1 − FLATTEN)


def blocks(features: Array) -> Array:
    """(N, H, W, C) → (N, H/2, W/2, C·4), channel-major as in a convolution's weight (C, 2, 2)."""
    n, h, w, c = features.shape
    return features.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(n, h // 2, w // 2, 4 * c)


def components(features: Array, count: int) -> tuple[Array, Array]:
    """The first `count` principal directions of (…, D) as rows (count, D), and their deviations (count,)."""
    flat = features.reshape(-1, features.shape[-1])
    values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    order = np.argsort(values)[::-1][:count]
    rows = vectors[:, order].T
    rows *= np.sign(rows[np.arange(count), np.abs(rows).argmax(1)])[:, None]
    return rows, np.sqrt(values[order])


def projections(pixels: Pixels, widths: tuple[int, ...], seed: int) -> list[Array]:
    """One matrix (width, 4·channels before) per level. The last is rotated, so that all channels vary alike."""
    features = pixels.astype(np.float64) / 127.5 - 1
    out: list[Array] = []
    for width in widths:
        grouped = blocks(features)
        rows, deviation = components(grouped, width)
        if len(out) == len(widths) - 1:
            turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
            rows = turn @ (deviation[:, None] ** -FLATTEN * rows)
        out.append(rows)
        features = grouped @ rows.T
    return out


@torch.no_grad()
def write_encoder(vae: AutoencoderKLQwenImage, pixels: Pixels, seed: int = 0) -> None:
    """Write the linear encoder into `vae`, which has 8, 16, 32 and 48 or more channels, one block a level, 8× down."""
    encoder, dims = vae.encoder, [vae.config.base_dim * m for m in vae.config.dim_mult]
    for name, parameter in [*encoder.named_parameters(), *vae.quant_conv.named_parameters()]:
        parameter.fill_(1.0 if name.endswith("gamma") else 0.0)

    def tap(weight: Tensor) -> Tensor:  # the centre of the last temporal tap: (out, in)
        return weight[:, :, -1, weight.shape[3] // 2, weight.shape[4] // 2]

    tap(encoder.conv_in.weight)[:3, :3] = torch.eye(3)
    _, down1, grow1, down2, grow2, down3, last = encoder.down_blocks
    matrices = projections(pixels, (dims[0], dims[1], CHANNELS), seed)
    for layer, matrix in zip((down1, down2, down3), matrices, strict=True):
        width, depth = matrix.shape
        layer.resample[1].weight[:width, : depth // 4, :2, :2] = (
            torch.from_numpy(matrix).float().view(width, depth // 4, 2, 2)
        )
    for block in (grow1, grow2):
        kept = block.conv_shortcut.weight.shape[1]
        tap(block.conv_shortcut.weight)[:kept] = torch.eye(kept)
    pairs = torch.cat([torch.eye(CHANNELS), -torch.eye(CHANNELS)])
    tap(last.conv_shortcut.weight)[: 2 * CHANNELS, :CHANNELS] = pairs
    last.conv_shortcut.bias[2 * CHANNELS] = CONSTANT
    encoder.norm_out.gamma.fill_(CONSTANT / dims[-1] ** 0.5)
    tap(encoder.conv_out.weight)[:CHANNELS, : 2 * CHANNELS] = pairs.T
    encoder.conv_out.bias[CHANNELS:] = LOG_VARIANCE
    tap(vae.quant_conv.weight)[:] = torch.eye(2 * CHANNELS)
