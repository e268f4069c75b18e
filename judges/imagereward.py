"""ImageReward, built from transformers' BLIP."""

import re
from pathlib import Path

import torch
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig
from transformers import BlipVisionModel

from judges.clip import score_layers
from judges.images import CLIP_MEAN, CLIP_STD, preprocess
from judges.weights import find_beside, judge_dtype, read_weights
from models.hub import check_tokenizer

BLIP_NAMES = (  # names in ImageReward.pt -> names in transformers
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "mlp."),
    (r"\.cls_token$", ".embeddings.class_embedding"),
    (r"\.pos_embed$", ".embeddings.position_embedding"),
    (r"\.patch_embed\.proj\.", ".embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"\.blocks\.", ".encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
BLIP_UNUSED = r"blip\.(text_encoder\.embeddings\.position_ids|vision_proj|text_proj)"


def rename_blip(state):
    """ImageReward.pt's {name: tensor} under transformers' names, without the unused ones."""
    renamed = {}
    for key, tensor in state.items():
        if re.match(BLIP_UNUSED, key):
            continue
        for pattern, replacement in BLIP_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def build_blip_scorer(state):
    """ImageReward.pt's tensors -> ModuleDict(vision, text, mlp). Sizes are read off the tensors."""
    state = rename_blip(state)
    width, _, _, patch_size = state["vision.embeddings.patch_embedding.weight"].shape
    num_positions = state["vision.embeddings.position_embedding"].shape[1]
    grid = round((num_positions - 1) ** 0.5)
    vision_config = BlipVisionConfig(
        hidden_size=width,
        num_attention_heads=width // 64,  # heads are 64 wide, as in BLIP
        image_size=grid * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
        intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(key.endswith(".mlp.fc1.weight") for key in state),
    )
    vocab_size, hidden_size = state["text.embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        encoder_hidden_size=width,
        is_decoder=True,  # this adds the cross-attention to the image
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
        num_hidden_layers=sum(key.endswith(".intermediate.dense.weight") for key in state),
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
    )
    with torch.device("meta"):
        mlp = score_layers(hidden_size)
        vision = BlipVisionModel(vision_config)
        text = BlipTextModel(text_config, add_pooling_layer=False)
        net = torch.nn.ModuleDict(dict(vision=vision, text=text, mlp=mlp))
    net.load_state_dict(state, assign=True)
    text.embeddings.position_ids = torch.arange(text_config.max_position_embeddings)[None]
    return net.eval().requires_grad_(False)


class ImageReward:
    """ImageReward-v1.0 (Xu et al. 2023): BLIP, whose text encoder looks at the image, and an MLP.

    The score is normalized to mean 0 and variance 1 with the authors' constants.
    raw: return the MLP's own output instead.
    path: ImageReward.pt. A tokenizer beside it is used instead of the hub's.
    """

    def __init__(self, path, device, dtype=None, raw=False):
        self.net = build_blip_scorer(read_weights(path)).to(device)
        # Only the large parts may be in bf16. The MLP stays in fp32.
        for name in ("vision", "text"):
            self.net[name].to(dtype or judge_dtype(device))
        repo = "google-bert/bert-base-uncased"
        source = find_beside("tokenizer_config.json", Path(path).parent, repo)
        self.tokenizer = BertTokenizer.from_pretrained(source)
        check_tokenizer(self.tokenizer, self.net["text"].config.vocab_size, source)
        self.raw = raw
        self.texts = {}  # prompt -> (token ids, attention mask)

    def __call__(self, images, prompts):
        tokens = [self.text(prompt) for prompt in prompts]
        ids = torch.cat([token_ids for token_ids, _ in tokens])
        mask = torch.cat([attention_mask for _, attention_mask in tokens])
        vision = self.net["vision"]
        pixels = preprocess(images, vision.config.image_size, CLIP_MEAN, CLIP_STD)
        image_states = vision(pixels.to(vision.dtype)).last_hidden_state
        text_states = self.net["text"](
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image_states
        ).last_hidden_state
        r = self.net["mlp"](text_states[:, 0].float())[:, 0]  # of the [CLS] token
        return r if self.raw else (r - 0.16717362830052426) / 1.0333394966054072

    def text(self, prompt):
        if prompt not in self.texts:
            tokens = self.tokenizer(
                [prompt], padding="max_length", truncation=True, max_length=35, return_tensors="pt"
            ).to(self.net["text"].device)
            self.texts[prompt] = (tokens.input_ids, tokens.attention_mask)
        return self.texts[prompt]
