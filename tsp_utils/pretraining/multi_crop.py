"""DINO's multi-crop, made in batches on the device with parameters drawn per sample (Sec. 3.1)."""

import functools
import math

import torch
import torch.nn.functional as F


@functools.lru_cache
def constant(values: tuple, device: torch.device, dtype=torch.float32) -> torch.Tensor:
    """Numbers on a device, copied there once: the host waits at each copy."""
    return torch.tensor(values, device=device, dtype=dtype)


def multi_crop(images: torch.Tensor, recipe, generator) -> list[torch.Tensor]:
    """Two global and n_local local views of uint8 [B, 3, H, W]: [2B, 3, S, S], [nB, 3, s, s]."""
    x = images.float() / 255
    mean, std = (constant(tuple(v), x.device).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))
    views = [random_colors(random_crops(x, recipe.global_size, recipe.global_scale, generator),
                           generator, blur, solarize)
             for blur, solarize in ((0.5, 0.0), (0.1, 0.2))]
    groups = [torch.cat(views)]
    if recipe.n_local:
        repeated = x.repeat(recipe.n_local, 1, 1, 1)  # view by view, as dino_loss wants them
        groups.append(random_colors(
            random_crops(repeated, recipe.local_size, recipe.local_scale, generator),
            generator, 0.25, 0.0))
    return [(group - mean) / std for group in groups]


def random_crops(images: torch.Tensor, size: int, scale: tuple, generator) -> torch.Tensor:
    """Random resized crops with flips, one a sample: float [B, 3, H, W] -> [B, 3, size, size].

    Area uniform in `scale`, aspect ratio log-uniform in 3/4 to 4/3 as torchvision's
    RandomResizedCrop; bilinear by grid_sample.
    """
    n = len(images)

    def uniform(low, high):
        return torch.rand(n, generator=generator, device=images.device) * (high - low) + low

    area, ratio = uniform(*scale), torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([width * flip, zero, x], 1),
                         torch.stack([zero, height, y], 1)], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta.to(images.dtype), (n, 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def random_colors(x: torch.Tensor, generator, blur: float, solarize: float) -> torch.Tensor:
    """Jitter (p 0.8), grey (0.2), light blur and solarisation with their p: [B, 3, S, S] in [0, 1].

    Brightness and contrast 0.4, saturation 0.2, hue 0.1 as DINO's; hue turns YIQ's chroma plane.
    """
    n = len(x)

    def uniform(low=0.0, high=1.0):
        return (torch.rand(n, 1, 1, 1, generator=generator, device=x.device) * (high - low)
                + low).to(x.dtype)

    def sometimes(p, changed, otherwise):
        return torch.where(uniform() < p, changed, otherwise)

    weights = constant((0.299, 0.587, 0.114), x.device, x.dtype).view(1, 3, 1, 1)
    y = x * uniform(0.6, 1.4)
    mean = (y * weights).sum((1, 2, 3), keepdim=True) / (y.shape[2] * y.shape[3])
    y = mean + (y - mean) * uniform(0.6, 1.4)
    luma = (y * weights).sum(1, keepdim=True)
    y = luma + _turn_hue(y - luma, uniform(-0.1, 0.1) * 2 * math.pi) * uniform(0.8, 1.2)
    x = sometimes(0.8, y, x).clamp(0, 1)
    x = sometimes(0.2, (x * weights).sum(1, keepdim=True).expand_as(x), x)
    if blur:
        kernel = constant((1.0, 2.0, 1.0), x.device, x.dtype)
        kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
        soft = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
        x = sometimes(blur, torch.lerp(x, soft, uniform()), x)
    if solarize:
        x = sometimes(solarize, torch.where(x >= 0.5, 1 - x, x), x)
    return x


def _turn_hue(chroma: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn the chroma [B, 3, S, S] (RGB less luma) by angle [B, 1, 1, 1] in the plane of YIQ."""
    to_iq = constant(((0.596, -0.274, -0.322), (0.211, -0.523, 0.312)), chroma.device, chroma.dtype)
    i, q = torch.einsum("kc,bchw->kbhw", to_iq, chroma).unsqueeze(2)  # [B, 1, S, S] each
    i, q = i * angle.cos() - q * angle.sin(), i * angle.sin() + q * angle.cos()
    to_rgb = constant(((0.956, 0.621), (-0.272, -0.647), (-1.106, 1.703)), chroma.device,
                      chroma.dtype)
    return torch.einsum("ck,kbhw->bchw", to_rgb, torch.cat([i, q], 1).transpose(0, 1))
