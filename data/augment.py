"""The augmentation of DiffDoctor's detector training. Labels move with their images.

  true labels      weak: flip and crop
  pseudo labels    weak, then shrink_and_pad for half of the images in which nothing is wrong,
                   strong, and cutmix

The strong augmentation and CutMix have UniMatch's settings (Yang et al. 2023). Our changes: a blur
grows with the image, and CutMix draws a box's ratio uniformly in log scale, where UniMatch's code
prefers tall boxes, and cuts a box that does not fit, where that code draws another one. Shrinking
is the dynamic augmentation of DiffDoctor, section 3.2, with our own numbers.

Images are (3, S, S) and labels (1, S, S), both in [0, 1]. Every draw comes from `draw`, a
generator on the CPU. The order of the draws is fixed, so a seed always gives the same images.
"""

import math

import torch
import torch.nn.functional as F

HARMLESS = 0.1  # an image whose confidence is below this everywhere has nothing wrong in it
SHRINK = 0.5  # the share of harmless images that we shrink; we show the others at full size
LUMA = (0.299, 0.587, 0.114)
YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # RGB -> brightness and two hues


def augment(images, labels, is_pseudo, draw):
    """Augments a batch: images (B, 3, S, S), labels (B, 1, S, S), is_pseudo: B booleans."""
    images = list(images)
    labels = list(labels)
    for i in range(len(images)):
        images[i], labels[i] = weak(images[i], labels[i], draw)
    pseudo = [i for i in range(len(images)) if is_pseudo[i]]
    for i in pseudo:
        images[i], labels[i] = shrink_and_pad(images[i], labels[i], draw)
    for i in pseudo:
        images[i] = strong(images[i], draw)
    images = torch.stack(images)
    labels = torch.stack(labels)
    images[pseudo], labels[pseudo] = cutmix(images[pseudo], labels[pseudo], draw)
    return images, labels


# --------------------------------------------------------------------------------------------------
# Draws


def uniform(draw, low, high):
    """A number from U(low, high)."""
    return low + (high - low) * torch.rand((), generator=draw).item()


def random_corner(draw, size, height, width):
    """The top and left of a box that lies somewhere in a square of this size."""
    top = int(uniform(draw, 0, size - height + 1))
    left = int(uniform(draw, 0, size - width + 1))
    return top, left


# --------------------------------------------------------------------------------------------------
# Augmentations that move pixels: image and label alike


def resize(images, size):
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def weak(image, label, draw):
    """A flip half of the time, then a crop of 80% to 100% of the side, resized back to S."""
    size = image.shape[-1]
    both = torch.cat([image, label])
    if uniform(draw, 0, 1) < 0.5:
        both = both.flip(-1)
    side = round(size * uniform(draw, 0.8, 1))
    top, left = random_corner(draw, size, side, side)
    both = resize(both[None, :, top : top + side, left : left + side], size)[0]
    return both[:3], both[3:]


def shrink_and_pad(image, label, draw):
    """Shrinks half of the harmless images to 25% to 75% of the side, and puts them on black.

    A weak detector is suspicious of anything small and intricate, such as the faces in full-body
    pictures. Here it learns that small things can be fine. Other images are returned as they are.
    """
    if label.max() >= HARMLESS or uniform(draw, 0, 1) >= SHRINK:
        return image, label
    size = image.shape[-1]
    side = max(1, round(size * uniform(draw, 0.25, 0.75)))
    top, left = random_corner(draw, size, side, side)
    small = resize(torch.cat([image, label])[None], side)[0]
    both = F.pad(small, (left, size - side - left, top, size - side - top))
    return both[:3], both[3:]


def cutmix(images, labels, draw):
    """Half of the images (B, 3, S, S), and their labels, get a box from the image before them.

    The box covers 2% to 40% of the area, and its height is 0.3 to 3.3 times its width.
    """
    size = images.shape[-1]
    new_images = images.clone()
    new_labels = labels.clone()
    for i in range(len(images)):
        if uniform(draw, 0, 1) >= 0.5:
            continue
        area = uniform(draw, 0.02, 0.4)
        ratio = math.exp(uniform(draw, math.log(0.3), math.log(1 / 0.3)))
        height = min(size, max(1, round(size * math.sqrt(area * ratio))))
        width = min(size, max(1, round(size * math.sqrt(area * (1 / ratio)))))
        top, left = random_corner(draw, size, height, width)
        rows = slice(top, top + height)
        columns = slice(left, left + width)
        new_images[i, :, rows, columns] = images[i - 1, :, rows, columns]
        new_labels[i, :, rows, columns] = labels[i - 1, :, rows, columns]
    return new_images, new_labels


# --------------------------------------------------------------------------------------------------
# Augmentations that change colors: the image alone


def strong(image, draw):
    """Color jitter for 80% of the images, gray for 20%, and a blur for 50%."""
    if uniform(draw, 0, 1) < 0.8:
        image = jitter_color(image, draw)
    if uniform(draw, 0, 1) < 0.2:
        image = to_gray(image)
    if uniform(draw, 0, 1) < 0.5:
        # sigma is 0.1 to 2 at 512 pixels.
        image = blur(image, uniform(draw, 0.1, 2) * image.shape[-1] / 512)
    return image


def to_gray(image):
    luma = image.new_tensor(LUMA).view(3, 1, 1)
    return (image * luma).sum(0).expand_as(image)


def jitter_color(image, draw):
    """Brightness, contrast and saturation times U(0.5, 1.5); hue turned by up to a quarter."""
    image = (image * uniform(draw, 0.5, 1.5)).clamp(0, 1)
    mean_gray = to_gray(image)[0].mean().expand_as(image)
    image = torch.lerp(mean_gray, image, uniform(draw, 0.5, 1.5)).clamp(0, 1)
    image = torch.lerp(to_gray(image), image, uniform(draw, 0.5, 1.5)).clamp(0, 1)
    # In YIQ a change of hue is a rotation of the last two axes.
    angle = 2 * math.pi * uniform(draw, -0.25, 0.25)
    cos = math.cos(angle)
    sin = math.sin(angle)
    yiq = image.new_tensor(YIQ)
    rotation = image.new_tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    turn = torch.linalg.inv(yiq) @ rotation @ yiq
    return torch.einsum("ij,jhw->ihw", turn, image).clamp(0, 1)


def blur(image, sigma):
    """A Gaussian blur, first along one axis and then along the other."""
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(image[None], (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel, groups=3)
    return F.conv2d(across, kernel.transpose(2, 3), groups=3)[0]
