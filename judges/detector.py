"""DiffDoctor's artifact detector."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode
from transformers import AutoModelForSemanticSegmentation, SegformerConfig
from transformers import SegformerForSemanticSegmentation

from judges.images import IMAGENET_MEAN, IMAGENET_STD
from judges.weights import UNREADABLE, explain, load_complete, read_weights
from models.hub import read_json


class Detector(torch.nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> confidence (B, size, size) that something is wrong there.

    The confidence is in [0, 1] and differentiable. Images are squashed into a square, not cropped,
    and antialiased if they shrink, as the detector's training data is here. The authors' demo does
    not antialias.
    """

    def __init__(self, net, size, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.net = net
        self.size = size
        self.mean = mean
        self.std = std

    def forward(self, images):
        size = [self.size, self.size]
        images = TF.resize(images, size, InterpolationMode.BILINEAR, antialias=True)
        pixels = TF.normalize(images, self.mean, self.std)
        logits = self.net(pixels).logits.float()
        return F.interpolate(logits, size, mode="bilinear")[:, 0].sigmoid()

    def save(self, folder):
        """Writes folder/detector, which --detector and evaluate.py can load."""
        folder = Path(folder) / "detector"
        self.net.save_pretrained(folder)
        processor = dict(
            image_processor_type="SegformerImageProcessor",
            do_resize=True,
            size=dict(height=self.size, width=self.size),
            resample=2,
            do_rescale=True,
            rescale_factor=1 / 255,
            do_normalize=True,
            image_mean=list(self.mean),
            image_std=list(self.std),
        )
        text = json.dumps(processor, indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(text)


def build_segformer(state):
    """A SegFormer's {name: tensor} under its published names -> the network, sized to fit."""
    encoder = "segformer.encoder"
    widths = [len(state[f"{encoder}.patch_embeddings.{i}.proj.weight"]) for i in range(4)]
    depths = []
    for i in range(4):
        blocks = [key for key in state if key.startswith(f"{encoder}.block.{i}.")]
        depths.append(len({key.split(".")[4] for key in blocks}))
    config = SegformerConfig(
        hidden_sizes=widths,
        depths=depths,
        decoder_hidden_size=len(state["decode_head.linear_fuse.weight"]),
        num_labels=1,
    )
    return load_complete(SegformerForSemanticSegmentation, None, config=config, state_dict=state)


def load_detector(source, device):
    """Loads a frozen artifact detector.

    source: a folder or hub id in the transformers format, or a file with the state dict of a
    SegFormer for 512 pixels, as DiffDoctor's authors released it.
    """
    try:
        if os.path.isfile(source):
            detector = Detector(build_segformer(read_weights(source)), size=512)
        else:
            processor, _ = read_json(source, "preprocessor_config.json")
            net = load_complete(AutoModelForSemanticSegmentation, source, trust_remote_code=False)
            size = processor["size"]["height"]
            detector = Detector(net, size, processor["image_mean"], processor["image_std"])
    except UNREADABLE as error:
        what = "cannot load its weights"
        if not os.path.exists(source):
            what = "no such file or folder here, nor a hub model that we can reach"
        sys.exit(f"--detector {source}: {what}. {explain(error)}")
    if detector.net.config.num_labels != 1:
        num_classes = detector.net.config.num_labels
        sys.exit(f"--detector {source}: it has {num_classes} classes; a detector has one")
    return detector.to(device).eval().requires_grad_(False)
