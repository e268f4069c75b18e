"""Judges that read CLIP's features: HPSv2.1, PickScore, CLIPScore, and the aesthetic predictor.

PickScore is a CLIP in the format of transformers, and ClipScore one in the format of open_clip.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
from transformers import CLIPVisionModelWithProjection

from judges.images import CLIP_MEAN, CLIP_STD, preprocess
from judges.weights import find_beside, judge_dtype, load_complete, read_weights
from models.hub import check_tokenizer

CLIP_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore and MPS are built on it
CLIP_VIT_L = "openai/clip-vit-large-patch14"  # the aesthetic predictor is built on it


class PickScore:
    """exp(logit_scale) cos(image, text) of a transformers CLIPModel (Kirstain et al. 2023).

    cosine: leave out the scale. Text features are computed once per prompt.
    """

    def __init__(self, model, processor, device, cosine=False, dtype=None):
        clip = load_complete(CLIPModel, model)
        # In bf16 the scale of 100 would read 99, so we take it first.
        self.scale = 1.0 if cosine else clip.logit_scale.exp().item()
        self.clip = clip.to(device, dtype or judge_dtype(device))
        self.tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
        check_tokenizer(self.tokenizer, self.clip.config.text_config.vocab_size, processor)
        image_processor = CLIPImageProcessor.from_pretrained(processor)
        size = image_processor.size
        self.size = size.get("shortest_edge", size.get("height"))
        self.mean = image_processor.image_mean
        self.std = image_processor.image_std
        self.texts = {}  # prompt -> its normalized features (D,)

    def __call__(self, images, prompts):
        text = torch.stack([self.text(prompt) for prompt in prompts])
        pixels = preprocess(images, self.size, self.mean, self.std, floor_crop=True)
        features = self.clip.get_image_features(pixels.to(self.clip.dtype)).pooler_output
        image = F.normalize(features.float(), dim=-1)
        return self.scale * (image * text).sum(-1)

    @torch.no_grad()
    def text(self, prompt):
        if prompt not in self.texts:
            positions = self.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                [prompt],
                padding="max_length",
                truncation=True,
                max_length=min(self.tokenizer.model_max_length, positions),
                return_tensors="pt",
            )
            features = self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output
            self.texts[prompt] = F.normalize(features.float(), dim=-1)[0]
        return self.texts[prompt]


class ClipScore:
    """cos(image, text) of an open_clip model: CLIPScore (Hessel et al. 2021) as our papers use it.

    The original puts "A photo depicts" before the text, and returns 2.5 * max(cos, 0).
    With HPSv2's weights and pad=True, this is HPSv2 (Wu et al. 2023).

    name, tag: open_clip's names for the architecture and the weights.
    path: a weights file to use instead of the tag's. An open_clip_config.json beside it, if there
    is one, defines the architecture.
    """

    def __init__(self, name, device, tag=None, path=None, pad=False, dtype=None):
        import open_clip  # takes a second to import, so only its users pay for it

        if path is None:
            config = open_clip.get_pretrained_cfg(name, tag)
            path = open_clip.download_pretrained(config)
        if Path(path).with_name("open_clip_config.json").is_file():
            name = f"local-dir:{Path(path).parent}"
        # On the meta device we spend nothing on weights that the file will replace.
        with torch.device("meta"):
            self.clip = open_clip.CLIP(**open_clip.get_model_config(name))
        self.clip.load_state_dict(read_weights(path), assign=True)
        # The causal mask is the one buffer that no file contains.
        self.clip.attn_mask = torch.full(self.clip.attn_mask.shape, -torch.inf).triu(1)
        self.dtype = dtype or judge_dtype(device)
        self.clip.to(device, self.dtype).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.device = device
        self.pad = pad
        self.texts = {}  # prompt -> its normalized features (D,)

    def __call__(self, images, prompts):
        text = torch.stack([self.text(prompt) for prompt in prompts])
        size = self.clip.visual.image_size[0]
        pixels = preprocess(images, size, CLIP_MEAN, CLIP_STD, pad=self.pad)
        features = self.clip.encode_image(pixels.to(self.dtype))
        return (F.normalize(features.float(), dim=-1) * text).sum(-1)

    @torch.no_grad()
    def text(self, prompt):
        if prompt not in self.texts:
            tokens = self.tokenizer([prompt]).to(self.device)
            features = self.clip.encode_text(tokens).float()
            self.texts[prompt] = F.normalize(features, dim=-1)[0]
        return self.texts[prompt]


class Aesthetic:
    """LAION's aesthetic predictor: an MLP on the normalized image features of OpenAI's ViT-L/14.

    This is improved-aesthetic-predictor, which DDPO and AlignProp train on. It ignores the prompts.

    path: the MLP's file. A CLIP beside it, with its config.json, is used instead of the hub's.
    """

    def __init__(self, path, device, dtype=None):
        source = find_beside("config.json", Path(path).parent, CLIP_VIT_L)
        # The checkpoint is a whole CLIP, and we leave out its text encoder.
        unused = ("text_model.", "text_projection.", "logit_scale")
        clip = load_complete(CLIPVisionModelWithProjection, source, unused=unused)
        self.clip = clip.to(device, dtype or judge_dtype(device))
        self.mlp = torch.nn.ModuleDict(dict(layers=score_layers(768)))
        self.mlp.load_state_dict(read_weights(path))
        self.mlp.to(device).eval().requires_grad_(False)

    def __call__(self, images, prompts=None):
        pixels = preprocess(
            images, self.clip.config.image_size, CLIP_MEAN, CLIP_STD, floor_crop=True
        )
        features = self.clip(pixels.to(self.clip.dtype)).image_embeds
        return self.mlp["layers"](F.normalize(features.float(), dim=-1))[:, 0]


def score_layers(width):
    """Features (B, width) -> a score (B, 1): the MLP of the aesthetic predictor and ImageReward.

    It has no non-linearity. Identity replaces its dropout, which is off in evaluation.
    """
    return torch.nn.Sequential(
        torch.nn.Linear(width, 1024),
        torch.nn.Identity(),
        torch.nn.Linear(1024, 128),
        torch.nn.Identity(),
        torch.nn.Linear(128, 64),
        torch.nn.Identity(),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )
