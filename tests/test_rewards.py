"""The real rewards on the published layouts with random weights: against plain torch on the files' own tensors, and against each known trap."""
import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import random_weights
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import functional as vision
from transformers import AutoTokenizer, BertTokenizer, CLIPModel

import common
from common import CLIP_MEAN, CLIP_STD, REWARDS, blip_scorer, denoise, generator, initial_latents, load_model, load_reward, resize_and_normalise

CPU = torch.device("cpu")
NAMES = ["hps", "pick", "imagereward", "clip", "clip_h"]
PROMPTS = ["a red circle above a blue square", "the sea, 12 ships and a lighthouse", "a red circle above a blue square", "snow"]
SIZE = {"hps": 32, "pick": 42, "imagereward": 32, "clip": 32, "clip_h": 32}             # pixels of the small models


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return {name: random_weights.write(name, root, seed=i) for i, name in enumerate([*NAMES, "mps", "sd15", "sd21", "sdxl"])}


def file_of(paths, name):
    """The file of weights of a reward."""
    path = Path(paths[name])
    return path if path.is_file() else path / {"pick": "model.safetensors", "imagereward": "ImageReward.pt"}.get(name, "open_clip_model.safetensors")


def weights(path):
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return {k: v.float() for k, v in state.get("state_dict", state).items()}


def pictures(h, w, n=len(PROMPTS)):
    """Smooth 8-bit images (n, 3, h, w) in [0, 1]."""
    coarse = torch.rand(n, 3, 5, 5, generator=generator(0, "pictures"))
    return (F.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1) * 255).round() / 255


def normalised(x):
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


# ------------------------------------------------------------------------------------------------------------------------------------
# the models once more, in plain torch


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def norm(s, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], eps)


def dense(s, name, x):
    return x @ s[name + ".weight"].T + s[name + ".bias"]


def attend(q, k, v, heads, mask=0.):
    """softmax(q k' / sqrt(head) + mask) v, (B, S, D) each."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** .5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def causal(n):
    return torch.full((n, n), -torch.inf).triu(1)


def clip_tower(s, start, x, heads, act, mask=0.):
    for i in range(2):
        b = f"{start}transformer.resblocks.{i}."
        q, k, v = (norm(s, b + "ln_1", x) @ s[b + "attn.in_proj_weight"].T + s[b + "attn.in_proj_bias"]).chunk(3, -1)
        x = x + dense(s, b + "attn.out_proj", attend(q, k, v, heads, mask))
        x = x + dense(s, b + "mlp.c_proj", act(dense(s, b + "mlp.c_fc", norm(s, b + "ln_2", x))))
    return x


def clip_cosine(s, pixels, tokens, act, heads=2):
    """cos(image, text) of a CLIP in OpenAI's names; pixels normalised, the text ends at its highest token."""
    w = s["visual.conv1.weight"]
    x = F.conv2d(pixels, w, stride=w.shape[-1]).flatten(2).mT
    x = torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + s["visual.positional_embedding"]
    x = clip_tower(s, "visual.", norm(s, "visual.ln_pre", x), heads, act)
    image = norm(s, "visual.ln_post", x[:, 0]) @ s["visual.proj"]
    x = s["token_embedding.weight"][tokens] + s["positional_embedding"]
    x = norm(s, "ln_final", clip_tower(s, "", x, heads, act, causal(x.shape[1])))
    text = x[torch.arange(len(x)), tokens.argmax(-1)] @ s["text_projection"]
    return F.cosine_similarity(image, text)


def openai_names(s):
    """transformers' CLIPModel -> OpenAI's names."""
    out = {"visual.conv1.weight": s["vision_model.embeddings.patch_embedding.weight"],
           "visual.class_embedding": s["vision_model.embeddings.class_embedding"],
           "visual.positional_embedding": s["vision_model.embeddings.position_embedding.weight"], "visual.proj": s["visual_projection.weight"].T,
           "token_embedding.weight": s["text_model.embeddings.token_embedding.weight"], "text_projection": s["text_projection.weight"].T,
           "positional_embedding": s["text_model.embeddings.position_embedding.weight"], "logit_scale": s["logit_scale"]}
    for theirs, ours in (("vision_model.pre_layrnorm", "visual.ln_pre"), ("vision_model.post_layernorm", "visual.ln_post"),
                         ("text_model.final_layer_norm", "ln_final")):
        out |= {f"{ours}.{x}": s[f"{theirs}.{x}"] for x in ("weight", "bias")}
    inside = (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"))
    for side, start in (("vision_model", "visual."), ("text_model", "")):
        for i in range(sum(k.startswith(side) and k.endswith("fc1.bias") for k in s)):
            a, b = f"{side}.encoder.layers.{i}.", f"{start}transformer.resblocks.{i}."
            for x in ("weight", "bias"):
                out[f"{b}attn.in_proj_{x}"] = torch.cat([s[f"{a}self_attn.{y}_proj.{x}"] for y in "qkv"])
                out |= {f"{b}{n}.{x}": s[f"{a}{m}.{x}"] for n, m in inside}
    return out


def imagereward(s, pixels, ids, mask, vision_heads=3, text_heads=2, eps=1e-6, bidirectional=True):
    """ImageReward's normalised score in BLIP's own names, from the equations; the keywords are its traps."""
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels, s[v + "patch_embed.proj.weight"], s[v + "patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([s[v + "cls_token"].expand(len(x), 1, -1), x], 1) + s[v + "pos_embed"]
    for b in (f"{v}blocks.{i}." for i in range(2)):
        x = x + dense(s, b + "attn.proj", attend(*dense(s, b + "attn.qkv", norm(s, b + "norm1", x, eps)).chunk(3, -1), vision_heads))
        x = x + dense(s, b + "mlp.fc2", F.gelu(dense(s, b + "mlp.fc1", norm(s, b + "norm2", x, eps))))
    image = norm(s, v + "norm", x, eps)

    e = t + "embeddings."
    x = norm(s, e + "LayerNorm", s[e + "word_embeddings.weight"][ids] + s[e + "position_embeddings.weight"][:ids.shape[1]], 1e-12)
    bias = (1 - mask.float())[:, None, None] * -1e9 + (0 if bidirectional else causal(ids.shape[1]))
    for layer in (f"{t}encoder.layer.{i}." for i in range(3)):
        for a, source, m in (("attention.", None, bias), ("crossattention.", image, 0.)):
            q, k, w = (dense(s, f"{layer}{a}self.{n}", x if n == "query" or source is None else source) for n in ("query", "key", "value"))
            x = norm(s, layer + a + "output.LayerNorm", x + dense(s, layer + a + "output.dense", attend(q, k, w, text_heads, m)), 1e-12)
        inner = F.gelu(dense(s, layer + "intermediate.dense", x))
        x = norm(s, layer + "output.LayerNorm", x + dense(s, layer + "output.dense", inner), 1e-12)
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = dense(s, f"mlp.layers.{i}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def independent(paths, name, pixels, prompts=PROMPTS, **traps):
    """The reward of normalised pixels, from the published file and the tokenizer alone."""
    s = weights(file_of(paths, name))
    if name == "imagereward":
        tokens = BertTokenizer.from_pretrained(paths[name])(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        assert (tokens.input_ids[:, 0] == 101).all() and tokens.input_ids.shape[1] == 35 and not tokens.attention_mask.all()
        return imagereward(s, pixels, tokens.input_ids, traps.pop("mask", tokens.attention_mask), **traps)
    if name == "pick":
        tokens = AutoTokenizer.from_pretrained(paths[name])(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return s["logit_scale"].exp() * clip_cosine(openai_names(s), pixels, tokens, F.gelu)
    return clip_cosine(s, pixels, open_clip.tokenize(prompts), traps.get("act", quick_gelu if name == "clip" else F.gelu))


# ------------------------------------------------------------------------------------------------------------------------------------
# scores


@pytest.mark.parametrize("name", NAMES)
def test_the_score_equals_an_independent_computation(paths, name):
    reward, row = load_reward(f"{name}:{paths[name]}", CPU)
    images = pictures(SIZE[name], SIZE[name])
    with torch.no_grad():
        r = reward(images, PROMPTS)
        torch.testing.assert_close(r, independent(paths, name, normalised(images)), rtol=1e-4, atol=1e-4 if name == "pick" else 2e-5)
        torch.testing.assert_close(torch.cat([reward(images[i:i + 1], PROMPTS[i:i + 1]) for i in range(4)]), r, rtol=1e-4, atol=1e-4)
        other = reward(images, PROMPTS[1:] + PROMPTS[:1])
    assert r.shape == (4,) and r.dtype == torch.float32 and r.std() > 1e-3 and (other - r).abs().max() > 1e-3       # image and text both count
    assert row.low < row.high and row.scale > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_pixels_and_point_uphill(paths, name):
    reward, _ = load_reward(f"{name}:{paths[name]}", CPU)
    images = pictures(70, 50).requires_grad_()                            # resized and cropped or padded on the way
    r = reward(images, PROMPTS)
    r[:3].sum().backward()
    assert images.grad.isfinite().all() and all(images.grad[i].abs().max() > 0 for i in range(3)) and images.grad[3].abs().max() == 0
    module = reward.net if name == "imagereward" else reward.clip
    assert not module.training and not any(p.requires_grad or p.grad is not None for p in module.parameters())
    with torch.no_grad():
        step = images + 1e-3 * images.grad / images.grad.abs().mean()
        assert (reward(step, PROMPTS)[:3] > r[:3]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_read_once(paths, name, monkeypatch):
    reward, _ = load_reward(f"{name}:{paths[name]}", CPU)
    owner, method = (reward, "tokenizer") if name == "imagereward" else (reward.clip, "get_text_features" if name == "pick" else "encode_text")
    calls, original = [], getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *a, **k: calls.append(1) or original(*a, **k))
    first = reward(pictures(32, 32), PROMPTS)
    assert torch.equal(first, reward(pictures(32, 32), PROMPTS)) and len(calls) == len(set(PROMPTS)) == 3


@pytest.mark.parametrize("name", ["hps", "imagereward"])
def test_bf16_is_close(paths, name):
    """What runs on CUDA, here on a CPU."""
    reward, _ = load_reward(f"{name}:{paths[name]}", CPU)
    images = pictures(32, 32)
    with torch.no_grad():
        r = reward(images, PROMPTS)
        if name == "hps":
            reward.clip.bfloat16()
            reward.dtype, reward.texts = torch.bfloat16, {}
        else:
            reward.net["vision"].bfloat16(), reward.net["text"].bfloat16()
        low = reward(images, PROMPTS)
    assert low.dtype == torch.float32 and 0 < (low - r).abs().max() < .05


# ------------------------------------------------------------------------------------------------------------------------------------
# traps: each wrong setting gives another score than ours, and ours the right one


TRAPS = dict(vision_heads=dict(vision_heads=12), text_heads=dict(text_heads=8), eps=dict(eps=1e-5), decoder=dict(bidirectional=False),
             mask=dict(mask=torch.ones(4, 35)))


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_imagereward_falls_into_no_trap(paths, tmp_path, trap):
    folder = shutil.copytree(paths["imagereward"], tmp_path / "ir")
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    for k in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):     # small activations, where eps counts
        state["blip.visual_encoder." + k] *= .01
    torch.save(state, folder / "ImageReward.pt")
    reward, _ = load_reward(f"imagereward:{folder}", CPU)
    images = pictures(32, 32)
    with torch.no_grad():
        r = reward(images, PROMPTS)
        there = dict(paths, imagereward=str(folder))
        torch.testing.assert_close(r, independent(there, "imagereward", normalised(images)), rtol=1e-4, atol=2e-5)
        assert (r - independent(there, "imagereward", normalised(images), **trap)).abs().max() > 2e-3


def test_raw_imagereward_is_the_mlp(paths):
    reward, _ = load_reward(f"imagereward:{paths['imagereward']}", CPU)
    raw = common.ImageReward(file_of(paths, "imagereward"), CPU, raw=True)
    with torch.no_grad():
        r, mlp = reward(pictures(32, 32), PROMPTS), raw(pictures(32, 32), PROMPTS)
    torch.testing.assert_close(mlp, 1.0333394966054072 * r + 0.16717362830052426)


def test_pickscore_keeps_its_scale(paths):
    reward, row = load_reward(f"pick:{paths['pick']}", CPU)
    with torch.no_grad():
        r = reward(pictures(42, 42), PROMPTS)
    cosine = independent(paths, "pick", normalised(pictures(42, 42))) / 100
    assert weights(file_of(paths, "pick"))["logit_scale"].exp().item() == pytest.approx(100, rel=1e-5)
    assert r.abs().max() > 1 and (r - cosine).abs().max() > 1
    assert (row.shift, row.scale) == (20, 10) and (20 - row.shift) / row.scale == 0


@pytest.mark.parametrize("name", ["hps", "clip", "clip_h"])
def test_quick_gelu_where_it_belongs(paths, name, tmp_path, monkeypatch):
    """Of the architecture that each name stands for when no configuration lies beside the file; its sizes are replaced by small ones here."""
    original, asked = open_clip.get_model_config, []

    def narrow(model):
        asked.append(model)
        return dict(original(model), embed_dim=32, vision_cfg=dict(random_weights.VISION), text_cfg=dict(random_weights.TEXT))

    monkeypatch.setattr(open_clip, "get_model_config", narrow)
    file = shutil.copy(file_of(paths, name), tmp_path)
    reward, _ = load_reward(f"{name}:{file}", CPU)
    assert asked == [{"clip": "ViT-B-32-quickgelu"}.get(name, "ViT-H-14")]
    images = pictures(32, 32)
    right, wrong = (quick_gelu, F.gelu) if name == "clip" else (F.gelu, quick_gelu)
    with torch.no_grad():
        r = reward(images, PROMPTS)
        torch.testing.assert_close(r, independent(paths, name, normalised(images), act=right), rtol=1e-4, atol=2e-5)
        assert (r - independent(paths, name, normalised(images), act=wrong)).abs().max() > 1e-3


@pytest.mark.parametrize("h, w", [(96, 64), (50, 133), (32, 20), (20, 32), (32, 32), (64, 64)])
def test_hps_pads_with_black_and_the_others_crop(paths, h, w):
    images = pictures(h, w)
    scale = 32 / max(h, w)
    small = round(h * scale), round(w * scale)
    padded = vision.resize(images, small, interpolation=vision.InterpolationMode.BICUBIC, antialias=True)
    y, x = 32 - small[0], 32 - small[1]
    padded = vision.normalize(vision.pad(padded, [x // 2, y // 2, x - x // 2, y - y // 2], fill=0), CLIP_MEAN, CLIP_STD)
    ours, cropped = resize_and_normalise(images, 32, CLIP_MEAN, CLIP_STD, pad=True), resize_and_normalise(images, 32, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(ours, padded)
    canvas = [Image.new("RGB", (32, 32)) for _ in images]                 # and as PIL has it, on 8 bits
    for c, image in zip(canvas, images):
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        c.paste(picture.resize(small[::-1], Image.BICUBIC), (x // 2, y // 2))
    pil = torch.tensor(np.stack([np.asarray(c) for c in canvas])).permute(0, 3, 1, 2) / 255
    assert (ours - normalised(pil)).abs().max() * max(CLIP_STD) < .03
    with torch.no_grad():
        for name in ("hps", "clip_h"):
            r = load_reward(f"{name}:{paths[name]}", CPU)[0](images, PROMPTS)
            right, wrong = (ours, cropped) if name == "hps" else (cropped, ours)
            torch.testing.assert_close(r, independent(paths, name, right), rtol=1e-4, atol=2e-5)
            assert ((r - independent(paths, name, wrong)).abs().max() > 1e-3) == (h != w)


# ------------------------------------------------------------------------------------------------------------------------------------
# the published sizes, on the meta device


def openai_shapes(width, layers, patch, grid, text_width, text_layers, embed, vocab=49408):
    """{name: shape} of a CLIP as open_clip publishes it, by rule."""
    shapes = {"visual.class_embedding": (width,), "visual.positional_embedding": (grid ** 2 + 1, width), "visual.proj": (width, embed),
              "visual.conv1.weight": (width, 3, patch, patch), "positional_embedding": (77, text_width), "text_projection": (text_width, embed),
              "token_embedding.weight": (vocab, text_width), "logit_scale": ()}
    norms = [("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text_width)]
    for start, d, n in (("visual.", width, layers), ("", text_width, text_layers)):
        for b in (f"{start}transformer.resblocks.{i}." for i in range(n)):
            norms += [(b + "ln_1", d), (b + "ln_2", d)]
            for name, out, source in (("attn.in_proj_", 3 * d, d), ("attn.out_proj.", d, d), ("mlp.c_fc.", 4 * d, d), ("mlp.c_proj.", d, 4 * d)):
                shapes |= {f"{b}{name}weight": (out, source), f"{b}{name}bias": (out,)}
    return shapes | {f"{name}.{x}": (d,) for name, d in norms for x in ("weight", "bias")}


VIT_H = openai_shapes(1280, 32, 14, 16, 1024, 24, 1024)
VIT_B = openai_shapes(768, 12, 32, 7, 512, 12, 512)


@pytest.mark.parametrize("name, published, heads", [("ViT-H-14", VIT_H, (16, 16)), ("ViT-B-32-quickgelu", VIT_B, (12, 8))])
def test_open_clip_has_the_published_names_and_sizes(name, published, heads):
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config(name))
    assert random_weights.shapes_of(clip) == published
    assert len(published) == {"ViT-H-14": 686, "ViT-B-32-quickgelu": 302}[name]
    assert (clip.visual.transformer.resblocks[0].attn.num_heads, clip.transformer.resblocks[0].attn.num_heads) == heads
    assert clip.visual.image_size == (224, 224)
    for tag in {"ViT-H-14": ["laion2b_s32b_b79k"], "ViT-B-32-quickgelu": ["openai"]}[name]:
        config = open_clip.get_pretrained_cfg(name, tag)
        assert (config.get("mean") or CLIP_MEAN) == CLIP_MEAN and (config.get("std") or CLIP_STD) == CLIP_STD


def test_pickscore_has_the_published_names_and_sizes():
    with torch.device("meta"):
        state = CLIPModel(random_weights.clip_h_config(True, 49408)).state_dict()
        renamed = openai_names(state)
    assert {k: tuple(v.shape) for k, v in renamed.items()} == VIT_H
    assert len(state) == len(VIT_H) + 4 * 56                              # q, k, v apart: four tensors more a block


def test_imagereward_has_the_published_names_and_sizes():
    published = random_weights.imagereward_shapes(True, 30524)
    with torch.device("meta"):
        net = blip_scorer({k: torch.empty(shape) for k, shape in published.items()})
    dropped = {"blip.text_encoder.embeddings.position_ids"} | {f"blip.{x}_proj.{y}" for x in ("vision", "text") for y in ("weight", "bias")}
    assert len(net.state_dict()) == len(published) - len(dropped) and dropped < set(published)
    v, t = net["vision"].config, net["text"].config
    assert (v.hidden_size, v.intermediate_size, v.num_hidden_layers, v.num_attention_heads, v.image_size, v.patch_size) == (1024, 4096, 24, 16, 224, 16)
    assert v.layer_norm_eps == 1e-6 and t.layer_norm_eps == 1e-12 and v.hidden_act == t.hidden_act == "gelu"
    assert (t.vocab_size, t.hidden_size, t.encoder_hidden_size, t.intermediate_size, t.num_hidden_layers, t.num_attention_heads) == (
        30524, 768, 1024, 3072, 12, 12)
    assert sum(math.prod(s) for k, s in published.items() if k not in dropped) * 4 == pytest.approx(1.79e9, rel=5e-3)      # the file's 1.79 GB


@pytest.mark.parametrize("name, sizes", [
    ("sd15", dict(unet=859520964, vae=83653863, text_encoder=123060480)), ("sd21", dict(unet=865910724, vae=83653863, text_encoder=340387840)),
    ("sdxl", dict(unet=2567463684, vae=83653863, text_encoder=123060480, text_encoder_2=694659840))])
def test_the_full_size_pipelines_have_the_published_sizes(name, sizes):
    with torch.device("meta"):
        parts = {part: build() for part, build in random_weights.modules(name, True, 49408).items()}
    assert {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()} == sizes
    assert len(random_weights.clip_tokenizer(True)) == 49408


def test_mps_has_the_published_names_and_sizes(paths):
    full = random_weights.mps_shapes(random_weights.clip_h_config(True, 49408))
    start = "mps.cross_model.layers.3."
    assert full[start + "0.fn.to_kv.weight"] == (128, 1024) and full[start + "0.fn.ff.0.weight"] == (8192, 1024)
    assert full[start + "1.fn.fused_attn_ff_proj.weight"] == (9344, 1024) and full[start + "0.fn.ff.2.weight"] == (1024, 4096)
    assert sum(math.prod(s) for s in full.values()) * 4 == pytest.approx(4.4e9, rel=.02)                # the file's 4.4 GB
    assert set(load_file(Path(paths["mps"]) / "model.safetensors")) < set(full)


def test_without_a_path_the_published_files_are_asked_for(paths, monkeypatch):
    """Where each reward looks on the hub, answered here from the small files."""
    asked = []

    def hub(repo, filename, **_):
        asked.append((repo, filename))
        name = {"xswu/HPSv2": "hps", "THUDM/ImageReward": "imagereward"}[repo]
        return str(file_of(paths, name))

    def pretrained(config):
        asked.append(config["hf_hub"])
        return str(file_of(paths, "clip" if "patch32" in config["hf_hub"] else "clip_h"))

    monkeypatch.setattr(common, "hf_hub_download", hub)
    monkeypatch.setattr(open_clip, "download_pretrained", pretrained)
    monkeypatch.setattr(common, "PickScore", lambda *a: asked.append(a[:2]))
    for name in NAMES:
        load_reward(name, CPU)
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
                     ("THUDM/ImageReward", "ImageReward.pt"), "timm/vit_base_patch32_clip_224.openai/", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K/"]


# ------------------------------------------------------------------------------------------------------------------------------------
# bad weights


class Code:
    """Unpickled, it runs."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def refused(capsys, spec, *words):
    with pytest.raises(SystemExit) as stop:
        load_reward(spec, CPU)
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(err) == 1 and err[0].startswith("error: --reward") or "has no" in err[0]
    assert all(w in err[0] for w in words), err[0]


def copy_of(paths, name, tmp_path):
    """A copy of a reward's folder and its file of weights in it."""
    folder = shutil.copytree(Path(file_of(paths, name)).parent, tmp_path / name)
    return folder, folder / file_of(paths, name).name


@pytest.mark.parametrize("name", ["hps", "imagereward", "clip"])
def test_code_in_a_checkpoint_is_never_run(paths, name, tmp_path, capsys):
    folder, file = copy_of(paths, name, tmp_path)
    file = file.with_suffix(".pt")
    torch.save({"state_dict": dict(weights(file_of(paths, name)), extra=Code(tmp_path / "ran"))}, file)
    refused(capsys, f"{name}:{file}", "code")
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)                                  # the file does carry it
    assert (tmp_path / "ran").exists()


def test_pick_reads_only_safetensors(paths, tmp_path, capsys):
    folder, file = copy_of(paths, "pick", tmp_path)
    torch.save(dict(load_file(file), extra=Code(tmp_path / "ran")), folder / "pytorch_model.bin")
    file.unlink()
    refused(capsys, f"pick:{folder}", "safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_do_not_fit_are_one_line(paths, name, tmp_path, capsys):
    folder, file = copy_of(paths, name, tmp_path)
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)

    def put(tensors):
        tensors = dict(tensors)
        save_file(tensors, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(
            {"state_dict": tensors} if name == "hps" else tensors, file)

    tensors = {k: v.clone() for k, v in state.get("state_dict", state).items()}          # the file they map will be written over
    key = next(k for k in tensors if k.endswith(("resblocks.1.mlp.c_fc.weight", "layer.1.output.dense.weight", "layers.1.mlp.fc1.weight")))
    put(tensors)
    load_reward(f"{name}:{folder}", CPU)
    put({k: v for k, v in tensors.items() if k != key})
    refused(capsys, f"{name}:{folder}", key.split("blip.text_encoder.")[-1])
    put(tensors | {"another.weight": torch.zeros(2)})
    refused(capsys, f"{name}:{folder}", "another.weight")
    put(tensors | {key: tensors[key][:-1].clone()})
    refused(capsys, f"{name}:{folder}")
    put({})
    refused(capsys, f"{name}:{folder}")
    put(tensors)
    file.write_bytes(file.read_bytes()[:1000])
    refused(capsys, f"{name}:{folder}")
    file.write_bytes(b"")
    refused(capsys, f"{name}:{folder}")
    file.write_text("<html>not found</html>")
    refused(capsys, f"{name}:{folder}")
    file.unlink()
    refused(capsys, f"{name}:{folder}")


def test_other_things_in_a_checkpoint_and_wrong_names(paths, tmp_path, capsys):
    for content in ([torch.zeros(2)], {"a": 1}, {"state_dict": [1]}, torch.zeros(3), {}):
        torch.save(content, tmp_path / "x.pt")
        for name in ("hps", "imagereward"):
            refused(capsys, f"{name}:{tmp_path / 'x.pt'}")
    refused(capsys, f"hps:{tmp_path / 'absent.pt'}", "does not exist")
    refused(capsys, "hpsv2", "did you mean hps")
    refused(capsys, f"imagereward:{paths['hps']}", "patch_embed")         # another reward's file
    refused(capsys, f"hps:{file_of(paths, 'imagereward')}", "Missing key")


def test_old_checkpoints_may_carry_position_ids(paths, tmp_path):
    """Files that transformers saved years ago, PickScore's among them."""
    folder, file = copy_of(paths, "pick", tmp_path)
    before = load_reward(f"pick:{folder}", CPU)[0](pictures(42, 42), PROMPTS)
    old = {f"{x}_model.embeddings.position_ids": torch.arange(n)[None] for x, n in (("text", 77), ("vision", 10))}
    save_file({k: v.clone() for k, v in load_file(file).items()} | old, file, {"format": "pt"})
    torch.testing.assert_close(load_reward(f"pick:{folder}", CPU)[0](pictures(42, 42), PROMPTS), before, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------------------------
# the command line on models in the published layout


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_pipelines_in_the_published_layout_load(paths, name):
    """The fp16 variant for a LoRA, the fp32 files (here the same numbers) for full fine-tuning; tokens of vocab.json and merges.txt."""
    folder = Path(paths[name])
    assert (folder / "tokenizer" / "merges.txt").is_file() and not (folder / "tokenizer" / "tokenizer.json").exists()
    outs = []
    for full in (False, True):
        model = load_model(paths[name], CPU, full=full)
        cond = common.condition(model, PROMPTS[:2])
        latents = initial_latents(model, [generator(0, i) for i in range(2)])
        with torch.no_grad():
            outs.append(denoise(model, latents, torch.tensor(501), cond))
    assert model.resolution == 64 and outs[0].isfinite().all()
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    assert model.pipe.tokenizer(PROMPTS[0]).input_ids == random_weights.clip_tokenizer(False)(PROMPTS[0]).input_ids
    assert (cond["encoder_hidden_states"][0] - cond["encoder_hidden_states"][1]).abs().max() > .01


def cli(*argv):
    """The script as it is run, in this process."""
    refl = importlib.import_module("refl")
    refl.main(refl.parse_args([str(a) for a in argv]))


@pytest.mark.parametrize("model, reward", [("sd15", "hps"), ("sdxl", "imagereward")])
def test_refl_on_the_published_layouts(paths, tmp_path, model, reward, capsys):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "t.txt").write_text("a boat\n")
    out = tmp_path / "run"
    argv = ["--model", paths[model], "--reward", f"{reward}:{paths[reward]}", "--prompts", tmp_path / "p.txt", "--test_prompts", tmp_path / "t.txt",
            "--batch_size", 2, "--num_inference_steps", 3, "--first_mid", 1, "--last_mid", 2, "--lr", 1e-2, "--lora_rank", 4, "--out", out,
            "--device", "cpu"]
    cli(*argv, "--train_steps", 1)
    cli(*argv, "--train_steps", 3, "--resume")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3] and all(row["grad_norm"] > 0 and math.isfinite(row["reward"]) for row in log)
    row = REWARDS[reward]
    assert f"known range {row.low:g} to {row.high:g}" in capsys.readouterr().out
    tuned = load_model(paths[model], CPU)
    tuned.pipe.load_lora_weights(out / "lora")
    assert any(p.abs().max() > 0 for n, p in tuned.denoiser.named_parameters() if "lora_B" in n)


def test_a_bad_reward_stops_the_command_before_the_model_is_loaded(paths, tmp_path, capsys):
    """And open_clip, seconds of imports, is loaded by none but its users."""
    argv = ["--model", paths["sd15"], "--prompts", "p.txt", "--test_prompts", "p.txt", "--out", str(tmp_path / "run"), "--reward"]
    code = f"import sys, refl; refl.parse_args([]); assert 'open_clip' not in sys.modules; refl.main(refl.parse_args({argv + ['hsp']}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --reward hsp") and len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(SystemExit) as stop:
        cli(*argv, f"hps:{tmp_path / 'no.pt'}")
    assert stop.value.code == 2 and "does not exist" in capsys.readouterr().err and not (tmp_path / "run").exists()
