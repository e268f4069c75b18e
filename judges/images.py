"""Resizes and normalizes the images that judges see. Differentiable."""

import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def preprocess(images, size, mean, std, pad=False, floor_crop=False):
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalized. Differentiable.

    Resizes the short side (bicubic, antialiased) and crops the center. If the corner of the crop
    is not a whole number, torchvision rounds it to the nearest and transformers rounds it down
    (floor_crop). With pad, as in HPS, we resize the long side instead and the rest is black.
    """
    height, width = images.shape[-2:]
    if pad:
        ratio = size / max(height, width)
        new_size = [round(height * ratio), round(width * ratio)]
    else:
        short = min(height, width)
        new_size = [size * height // short, size * width // short]
    images = TF.resize(images, new_size, InterpolationMode.BICUBIC, antialias=True)
    height, width = images.shape[-2:]
    if pad:
        left, top = (size - width) // 2, (size - height) // 2
        images = TF.pad(images, [left, top, size - width - left, size - height - top])
    elif floor_crop:
        images = TF.crop(images, (height - size) // 2, (width - size) // 2, size, size)
    else:
        images = TF.center_crop(images, [size, size])
    return TF.normalize(images, mean, std)
