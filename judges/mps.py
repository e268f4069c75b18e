"""MPS, the Multi-dimensional Preference Score."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from judges.clip import CLIP_VIT_H
from judges.images import CLIP_MEAN, CLIP_STD, preprocess
from judges.weights import find_beside, judge_dtype, load_complete, read_weights
from models.hub import check_tokenizer


class MPS:
    """The Multi-dimensional Preference Score, condition "overall" (Zhang et al., CVPR 2024).

    exp(logit_scale) cos(text, x[:, 0]), where x (B, 257, D) starts as the image tokens. In each of
    4 layers they attend to the text tokens (B, 77, D) that are related to the condition, and
    then to each other, with rotary positions. The 16 heads of width 64 share one key and value, a
    SwiGLU runs in parallel with each attention, and no layer has a bias.

    threshold: a text token is related if its closeness to the condition exceeds this share of the
    closest token's. ImageReFL and the authors' model take 0.01, the authors' evaluation 0.3.

    path: model.safetensors in the layout of RE-N-Y/mpsv1, because the authors' own file is a
    pickle. A tokenizer beside it is used instead of the hub's.
    """

    CONDITION = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
        "structure, instance, texture, quantity, attributes, position, number, location, word, "
        "things."
    )
    CROSS_WEIGHTS = ("norm", "to_q", "to_kv", "to_out", "ff.0", "ff.2")
    SELF_WEIGHTS = ("norm", "fused_attn_ff_proj", "attn_out", "ff_out.1")

    def __init__(self, path, device, threshold=0.01, dtype=None):
        self.threshold = threshold
        state = read_weights(path)
        clip_state = take_prefix(state, "mps.model.")
        layers = take_prefix(state, "mps.cross_model.layers.")
        config = build_clip_config(clip_state)
        clip = load_complete(CLIPModel, None, config=config, state_dict=clip_state)
        # Only the large part may be in bf16. The rest, and what it reads, stays in fp32.
        self.scale = clip.logit_scale.exp().item()
        self.clip = clip.to(device, dtype or judge_dtype(device))
        self.layers = []
        for i in range(len({key.split(".")[0] for key in layers})):
            cross = [layers[f"{i}.0.fn.{name}.weight"].to(device) for name in self.CROSS_WEIGHTS]
            own = [layers[f"{i}.1.fn.{name}.weight"].to(device) for name in self.SELF_WEIGHTS]
            self.layers.append((cross, own))
        source = find_beside("tokenizer_config.json", Path(path).parent, CLIP_VIT_H)
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        check_tokenizer(self.tokenizer, self.clip.config.text_config.vocab_size, source)
        self.size = self.clip.config.vision_config.image_size
        self.condition = self.text([self.CONDITION])[0][0]  # (77, D)

    @torch.no_grad()
    def text(self, prompts):
        """-> tokens (B, 77, D) and end-of-text features (B, D). Padding tokens are included."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        states = self.clip.text_model(ids.to(self.clip.device)).last_hidden_state
        tokens = self.clip.text_projection(states).float()
        # The end-of-text token has the highest id.
        return tokens, tokens[torch.arange(len(ids)), ids.argmax(-1)]

    def __call__(self, images, prompts):
        unique_prompts = list(dict.fromkeys(prompts))
        order = [unique_prompts.index(prompt) for prompt in prompts]
        tokens, end = self.text(unique_prompts)
        tokens = tokens[order]
        end = end[order]
        closeness = (tokens @ self.condition.T).amax(-1)  # (B, 77), to the condition
        is_related = closeness / closeness.amax(1, keepdim=True) > self.threshold
        pixels = preprocess(images, self.size, CLIP_MEAN, CLIP_STD, floor_crop=True)
        # We take the image tokens before the last norm: (B, 257, D).
        states = self.clip.vision_model(pixels.to(self.clip.dtype)).last_hidden_state
        x = self.clip.visual_projection(states).float()
        for cross, own in self.layers:
            x = cross_layer(x, tokens, is_related[:, None, None], *cross)
            # Key and value share one matrix, and have one head each.
            head_width = len(cross[2]) // 2
            x = self_layer(x, head_width, *own)
        return self.scale * F.cosine_similarity(end, x[:, 0], dim=-1)


def cross_layer(x, tokens, mask, norm, to_q, to_kv, to_out, ff_up, ff_down):
    """Image tokens x (B, 257, D) attend to text tokens (B, 77, D), with a parallel feed-forward."""
    h = F.layer_norm(x, norm.shape, norm)
    k, v = (tokens @ to_kv.T).chunk(2, -1)
    attention = attend(h @ to_q.T, k, v, mask)
    return x + attention @ to_out.T + swiglu(h @ ff_up.T) @ ff_down.T


def self_layer(x, head_width, norm, fused, attn_out, ff_out):
    """Image tokens x (B, 257, D) attend to each other, with a parallel feed-forward."""
    h = F.layer_norm(x, norm.shape, norm)
    ff_width = 2 * ff_out.shape[1]
    q_width = len(fused) - 2 * head_width - ff_width
    q, k, v, ff = (h @ fused.T).split([q_width, head_width, head_width, ff_width], -1)
    attention = attend(rotate(q, head_width), rotate(k, head_width), v)
    return x + attention @ attn_out.T + swiglu(ff) @ ff_out.T


def attend(q, k, v, mask=None):
    """q (B, N, heads * d); k and v (B, M, d) are the same for all heads -> (B, N, heads * d)."""
    q = q.unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)
    k = k[:, None].expand(-1, q.shape[1], -1, -1)
    v = v[:, None].expand(-1, q.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def rotate(x, d):
    """Rotary positions (Su et al. 2021) on the heads of x (B, N, heads * d)."""
    positions = torch.arange(x.shape[1], device=x.device)[:, None]
    angle = positions / 10000 ** (torch.arange(0, d, 2, device=x.device) / d)  # (N, d / 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.unflatten(-1, (-1, d)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)


def swiglu(x):
    a, gate = x.chunk(2, -1)
    return F.silu(gate) * a


def take_prefix(state, prefix):
    """The tensors whose names start with the prefix, without it and in fp32."""
    return {
        key.removeprefix(prefix): tensor.float()
        for key, tensor in state.items()
        if key.startswith(prefix)
    }


def build_clip_config(state):
    """A CLIPModel's {name: tensor} -> its CLIPConfig. Heads are 64 and 80 wide, as in ViT-H."""

    def tower(name, head_width):
        mlp = state[f"{name}_model.encoder.layers.0.mlp.fc2.weight"]
        layers = [key for key in state if key.startswith(f"{name}_model.")]
        return dict(
            hidden_size=mlp.shape[0],
            intermediate_size=mlp.shape[1],
            num_hidden_layers=sum(key.endswith("mlp.fc1.weight") for key in layers),
            num_attention_heads=mlp.shape[0] // head_width,
            hidden_act="gelu",
        )

    patch_size = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    num_positions = len(state["vision_model.embeddings.position_embedding.weight"])
    image_size = round((num_positions - 1) ** 0.5) * patch_size
    vocab_size = len(state["text_model.embeddings.token_embedding.weight"])
    text_length = len(state["text_model.embeddings.position_embedding.weight"])
    return CLIPConfig(
        projection_dim=len(state["text_projection.weight"]),
        vision_config=dict(tower("vision", 80), image_size=image_size, patch_size=patch_size),
        text_config=dict(
            tower("text", 64), vocab_size=vocab_size, max_position_embeddings=text_length
        ),
    )
