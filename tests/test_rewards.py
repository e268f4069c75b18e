"""rewards.py: every judge reads its published layout, and equals an independent computation.

The weights are random: tests/random_weights.py writes them in the form of the published files.
"""

import math
import shutil
from pathlib import Path

import open_clip
import pytest
import random_weights
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from conftest import CPU
from random_weights import FILES, imagereward_score, mps_score, read_state, write_state
from torchvision.transforms import InterpolationMode
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer, BertTokenizer
from transformers import CLIPImageProcessor, CLIPModel
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import rewards
from common import TOY, generator
from rewards import CLIP_MEAN, CLIP_STD, MPS, REWARDS, load_detector, load_reward, preprocess
from run_folder import to_pil

NAMES = ["hps", "pick", "imagereward", "clip", "clip_h"]
PROMPTS = ["a red circle above a blue square", "the sea, 12 ships and a lighthouse", "snow"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate([*NAMES, "mps"]):
        random_weights.write(name, root, seed=seed)
    return root


def copy_of(weights, name, tmp_path):
    """Copies the folder of a judge -> (the folder, its file of weights)."""
    folder = shutil.copytree(weights / name, tmp_path / name)
    return folder, folder / FILES[name]


def load(name, path):
    reward, _ = load_reward(f"{name}:{path}", CPU)
    return reward


def pictures(height, width):
    """A smooth 8-bit image per prompt, (3, 3, height, width) in [0, 1]."""
    coarse = torch.rand(len(PROMPTS), 3, 5, 5, generator=generator(0, "pictures"))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def crop(images, size):
    """torchvision's own resize, center crop and normalization."""
    resize = T.Resize(size, InterpolationMode.BICUBIC, antialias=True)
    return T.Compose([resize, T.CenterCrop(size), T.Normalize(CLIP_MEAN, CLIP_STD)])(images)


def pad(images, size):
    """HPS's own preprocessing: the long side is resized, and black bars fill the square."""
    scale = size / max(images.shape[-2:])
    new_size = [round(side * scale) for side in images.shape[-2:]]
    images = T.Resize(new_size, InterpolationMode.BICUBIC, antialias=True)(images)
    top, left = [(size - side) // 2 for side in new_size]
    bars = (left, top, size - new_size[1] - left, size - new_size[0] - top)
    return T.Normalize(CLIP_MEAN, CLIP_STD)(T.Pad(bars)(images))


# --------------------------------------------------------------------------------------------------
# Scores


# Square, smaller than the network, wide and tall, and with odd margins to crop.
@pytest.mark.parametrize("size", [(64, 64), (20, 20), (50, 133), (96, 64), (45, 32), (42, 57)])
def test_preprocessing(size, weights):
    images = pictures(*size)
    ours = preprocess(images, 32, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(ours, crop(images, 32), rtol=0, atol=1e-6)
    padded = preprocess(images, 32, CLIP_MEAN, CLIP_STD, pad=True)
    torch.testing.assert_close(padded, pad(images, 32), rtol=0, atol=1e-6)
    # transformers rounds the corner of an odd crop down.
    processor = CLIPImageProcessor.from_pretrained(weights / "pick")
    theirs = processor(images, do_rescale=False, return_tensors="pt").pixel_values
    floored = preprocess(images, 42, CLIP_MEAN, CLIP_STD, floor_crop=True)
    torch.testing.assert_close(floored, theirs, rtol=0, atol=1e-5)
    # open_clip's own transform resizes 8-bit pixels with PIL.
    transform = open_clip.image_transform(32, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    pil = torch.stack([transform(to_pil(image)) for image in images])
    assert (ours - pil).abs().max() * max(CLIP_STD) < 0.03


@pytest.mark.parametrize("name", ["toy_pref", "toy_clip", "pick"])
@torch.no_grad()
def test_pickscore_is_the_logit_of_clip(name, weights):
    folder = weights / "pick" if name == "pick" else TOY / name.removeprefix("toy_")
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    processor = CLIPImageProcessor.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    images = pictures(64, 51)
    pixels = processor(images, do_rescale=False, return_tensors="pt").pixel_values
    logits = clip(pixel_values=pixels, **tokens).logits_per_image.diag()
    if name == "toy_clip":
        logits = logits / clip.logit_scale.exp()
    torch.testing.assert_close(load(name, folder)(images, PROMPTS), logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 1e-3


@pytest.mark.parametrize("name", ["hps", "clip", "clip_h"])
@torch.no_grad()
def test_clipscore_is_the_cosine_of_open_clip(name, weights):
    clip = open_clip.create_model(f"local-dir:{weights / name}", load_weights=False)
    clip.load_state_dict(read_state(weights / name / FILES[name]))
    text = clip.eval().encode_text(open_clip.tokenize(PROMPTS), normalize=True)
    reward = load(name, weights / name)
    right, wrong = (pad, crop) if name == "hps" else (crop, pad)
    for size in [(32, 32), (45, 32), (42, 57)]:
        images = pictures(*size)
        r = reward(images, PROMPTS)
        cosine = (clip.encode_image(right(images, 32), normalize=True) * text).sum(-1)
        torch.testing.assert_close(r, cosine, rtol=1e-4, atol=2e-5)
        other = (clip.encode_image(wrong(images, 32), normalize=True) * text).sum(-1)
        assert ((r - other).abs().max() > 1e-3) == (size != (32, 32))


@pytest.mark.parametrize("name", ["hps", "clip", "clip_h"])
def test_a_lone_file_has_the_architecture_of_its_name(name, weights, tmp_path, monkeypatch):
    original = open_clip.get_model_config
    asked = []

    def small_config(model):
        asked.append(model)
        parts = dict(vision_cfg=random_weights.VISION, text_cfg=random_weights.TEXT)
        return {**original(model), "embed_dim": 32, **parts}

    monkeypatch.setattr(open_clip, "get_model_config", small_config)
    reward = load(name, shutil.copy(weights / name / FILES[name], tmp_path))
    assert asked == ["ViT-B-32-quickgelu" if name == "clip" else "ViT-H-14"]
    activations = {type(part).__name__ for part in reward.clip.modules()}
    assert ("QuickGELU" in activations) == (name == "clip")


@torch.no_grad()
def test_imagereward_is_blip(weights, tmp_path):
    folder, file = copy_of(weights, "imagereward", tmp_path)
    state = read_state(file)
    # With small activations a wrong eps shows.
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        state["blip.visual_encoder." + key] *= 0.01
    write_state(state, file)
    reward = load("imagereward", folder)
    raw_reward = rewards.ImageReward(file, CPU, raw=True)
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    assert (tokens.input_ids[:, 0] == 101).all()
    for size in [(32, 32), (42, 57)]:
        images = pictures(*size)
        inputs = (state, crop(images, 32), tokens.input_ids)
        raw = imagereward_score(*inputs, tokens.attention_mask)
        torch.testing.assert_close(raw_reward(images, PROMPTS), raw, rtol=1e-4, atol=2e-5)
        r = (raw - 0.16717362830052426) / 1.0333394966054072
        torch.testing.assert_close(reward(images, PROMPTS), r, rtol=1e-4, atol=2e-5)
        # This comparison would notice a missing mask, or another eps.
        assert (imagereward_score(*inputs, torch.ones(3, 35)) - raw).abs().max() > 2e-3
        wrong_eps = imagereward_score(*inputs, tokens.attention_mask, eps=1e-5)
        assert (wrong_eps - raw).abs().max() > 2e-3


@torch.no_grad()
def test_mps_is_its_published_equations(weights, tmp_path):
    folder, file = copy_of(weights, "mps", tmp_path)
    state = read_state(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids = tokenizer([*PROMPTS, MPS.CONDITION], **options).input_ids
    # Words that the condition lacks move far away from it, so that they may not be attended.
    words = state["mps.model.text_model.embeddings.token_embedding.weight"]
    strange = sorted(set(ids[:3].flatten().tolist()) - set(ids[3].tolist()))
    shift = 2 * torch.randn(words.shape[1], generator=generator(0, "shift"))
    words += shift
    words[strange] -= 2 * shift
    write_state(state, file)
    clip = CLIPModel(random_weights.clip_h_config(False, len(tokenizer))).eval()
    clip.load_state_dict(rewards.take_prefix(state, "mps.model."))
    text = clip.text_model(ids).last_hidden_state @ clip.text_projection.weight.T
    end = text[torch.arange(4), ids.argmax(1)]
    processor = CLIPImageProcessor.from_pretrained(folder)
    images = pictures(42, 57)
    pixels = processor(images, do_rescale=False, return_tensors="pt").pixel_values
    expected = []
    for i in range(3):
        closeness = (text[i] @ text[3].T).max(1).values
        is_attended = closeness / closeness.max() > 0.01
        assert 0 < is_attended.sum() < 77
        inputs = (text[i], text[3], end[i], pixels[i : i + 1])
        expected.append(mps_score(state, clip, *inputs))
    expected = torch.stack(expected)
    mps = MPS(file, CPU)
    torch.testing.assert_close(mps(images, PROMPTS), expected, rtol=0, atol=2e-3)
    assert expected.std() > 0.1
    # Every image keeps its own prompt where one comes twice.
    swapped = mps(images.flip(0), [PROMPTS[2], PROMPTS[2], PROMPTS[0]])
    torch.testing.assert_close(swapped[[2, 0]], expected[[0, 2]], rtol=0, atol=2e-3)


# --------------------------------------------------------------------------------------------------
# What all rewards have in common


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_pixels_and_point_uphill(name, weights):
    reward = load(name, weights / name)
    images = pictures(70, 50).requires_grad_()
    r = reward(images, PROMPTS)
    assert r.shape == (3,) and r.dtype == torch.float32
    r[:2].sum().backward()
    # An image does not change the reward of another one, and the judge itself stays frozen.
    assert [grad.abs().max().item() > 0 for grad in images.grad] == [True, True, False]
    network = reward.net if name == "imagereward" else reward.clip
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        step = images + 1e-3 * images.grad / images.grad.abs().mean()
        assert (reward(step, PROMPTS)[:2] > r[:2]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_read_once(name, weights, monkeypatch):
    reward = load(name, weights / name)
    owner = reward if name == "imagereward" else reward.clip
    method = {"imagereward": "tokenizer", "pick": "get_text_features"}.get(name, "encode_text")
    original = getattr(owner, method)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, counted)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    first = reward(pictures(32, 32), prompts)
    assert torch.equal(reward(pictures(32, 32), prompts), first)
    assert len(calls) == 2


def test_every_range_maps_to_about_0_to_1():
    for name in ("toy_pref", "pick"):
        row = REWARDS[name]
        ends = [(r - row.shift) / row.scale for r in (row.low, row.high)]
        assert ends[0] == 0 and 0.3 < ends[1] < 1.1
    # ReFL's hinge needs ImageReward's own scale, and cosines are in [0, 1] already.
    others = [row for name, row in REWARDS.items() if name not in ("toy_pref", "pick")]
    assert all((row.shift, row.scale) == (0, 1) for row in others)
    # The second judge of the toy world is never a training reward.
    assert "toy_pref_b" not in REWARDS


def test_without_a_path_the_published_files_are_used(weights, monkeypatch):
    asked = []

    def hub(repo, filename, **options):
        asked.append((repo, filename))
        return weights / {"xswu/HPSv2": "hps", "THUDM/ImageReward": "imagereward"}[repo] / filename

    def open_clip_hub(config):
        asked.append(config["hf_hub"].strip("/"))
        name = "clip" if "patch32" in config["hf_hub"] else "clip_h"
        return str(weights / name / FILES[name])

    monkeypatch.setattr(rewards, "cached_file", hub)
    monkeypatch.setattr(open_clip, "download_pretrained", open_clip_hub)
    monkeypatch.setattr(rewards, "PickScore", lambda *args: asked.append(args[:2]))
    for name in NAMES:
        load_reward(name, CPU)
    clip_h = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert asked == [
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        ("yuvalkirstain/PickScore_v1", clip_h),
        ("THUDM/ImageReward", "ImageReward.pt"),
        "timm/vit_base_patch32_clip_224.openai",
        clip_h,
    ]


def test_published_sizes():
    """Without weights, on the meta device: what the real files must have for us to load them."""
    with torch.device("meta"):
        shapes = random_weights.imagereward_shapes(True, 30524)
        net = rewards.build_blip_scorer({key: torch.empty(shapes[key]) for key in shapes})
        config = random_weights.clip_h_config(True, 49408)
        clip = CLIPModel(config)
        ours = rewards.build_clip_config(clip.state_dict())
        assert random_weights.shapes_of(CLIPModel(ours)) == random_weights.shapes_of(clip)
        vit_h = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert len(vit_h.state_dict()) == 686
    vision, text = net["vision"].config, net["text"].config
    assert (vision.num_attention_heads, vision.image_size) == (16, 224)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    assert (text.num_attention_heads, text.encoder_hidden_size) == (12, 1024)
    for ours_of, theirs in (
        (ours.text_config, config.text_config),
        (ours.vision_config, config.vision_config),
    ):
        for key in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
            assert getattr(ours_of, key) == getattr(theirs, key)
    mps = random_weights.mps_shapes(config)
    # The files on the hub have 1.79 GB and 4.4 GB.
    assert 4 * sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(1.79e9, rel=0.01)
    assert 4 * sum(math.prod(shape) for shape in mps.values()) == pytest.approx(4.4e9, rel=0.02)


# --------------------------------------------------------------------------------------------------
# Weights that are refused


class Code:
    """Whoever unpickles this creates a file."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def refused(spec, *words):
    """One line, without a traceback, that holds these words."""
    with pytest.raises(SystemExit) as stop:
        load_reward(spec, CPU)
    message = stop.value.code
    assert message.startswith("--reward") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_do_not_fit(name, weights, tmp_path):
    folder, file = copy_of(weights, name, tmp_path)
    state = read_state(file)
    ends = ("resblocks.1.mlp.c_fc.weight", "layer.1.output.dense.weight", "layers.1.mlp.fc1.weight")
    key = next(key for key in state if key.endswith(ends))
    short_key = key.removeprefix("blip.text_encoder.")
    extra = {**state, "another.weight": torch.zeros(2)}
    for changed, words in (
        ({k: v for k, v in state.items() if k != key}, [short_key]),
        (extra, ["another.weight"]),
        ({**state, key: state[key][:-1].clone()}, []),
        ({}, []),
    ):
        write_state(changed, file)
        refused(f"{name}:{folder}", *words)
    write_state(state, file)
    load(name, folder)
    for content in (file.read_bytes()[:1000], b"", b"<html>not found</html>"):
        file.write_bytes(content)
        refused(f"{name}:{folder}", "cannot load its weights")
    file.unlink()
    refused(f"{name}:{folder}")


@pytest.mark.parametrize("name", ["hps", "imagereward", "pick"])
def test_code_in_a_checkpoint_is_never_run(name, weights, tmp_path):
    folder, file = copy_of(weights, name, tmp_path)
    state = {**read_state(file), "extra": Code()}
    file.unlink()
    file = file if name != "pick" else folder / "pytorch_model.bin"
    torch.save(state, file)
    refused(f"{name}:{folder}", "safetensors" if name == "pick" else "we run no code")
    assert not Path("ran").exists()
    torch.load(file, weights_only=False)
    assert Path("ran").exists()


def test_wrong_names_and_files(weights, tmp_path):
    refused("hpsv2", "no such reward", "hps")
    refused("", "is needed")
    refused("hps:absent.pt", "absent.pt does not exist")
    for content in ([torch.zeros(2)], {"a": 1}, torch.zeros(3)):
        torch.save(content, tmp_path / "x.pt")
        refused(f"imagereward:{tmp_path}/x.pt", "no state dict")
    refused(f"hps:{weights}/imagereward/ImageReward.pt", "Missing key")
    refused(f"imagereward:{weights}/hps/{FILES['hps']}", "patch_embed")
    for key in ("mps.cross_model.layers.3.1.fn.attn_out.weight", "mps.model.logit_scale"):
        state = read_state(weights / "mps" / FILES["mps"])
        del state[key]
        write_state(state, tmp_path / "mps.safetensors")
        with pytest.raises((KeyError, ValueError), match=key.split("model.")[-1]):
            MPS(tmp_path / "mps.safetensors", CPU)


def test_old_files_may_hold_position_ids(weights, tmp_path):
    before = load("pick", weights / "pick")(pictures(42, 42), PROMPTS)
    folder, file = copy_of(weights, "pick", tmp_path)
    state = read_state(file)
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write_state(state, file)
    assert torch.equal(load("pick", folder)(pictures(42, 42), PROMPTS), before)


# --------------------------------------------------------------------------------------------------
# The detector


@torch.no_grad()
def test_detector_folder():
    images = pictures(50, 133)
    confidence = load_detector(TOY / "detector", CPU)(images)
    net = AutoModelForSemanticSegmentation.from_pretrained(TOY / "detector", dtype=torch.float32)
    x = T.Resize((64, 64), InterpolationMode.BILINEAR, antialias=True)(images)
    x = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(x)
    logits = F.interpolate(net.eval()(x).logits, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(confidence, logits[:, 0].sigmoid())


@torch.no_grad()
def test_detector_file_and_save(tmp_path):
    options = dict(hidden_sizes=[4, 8, 10, 16], depths=[1, 2, 1, 1], decoder_hidden_size=8)
    torch.manual_seed(0)
    net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=1, **options)).eval()
    torch.save(net.state_dict(), tmp_path / "segformer.pth")
    detector = load_detector(tmp_path / "segformer.pth", CPU)
    images = pictures(512, 512)
    x = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(images)
    logits = F.interpolate(net(x).logits, (512, 512), mode="bilinear", align_corners=False)
    confidence = detector(images)
    torch.testing.assert_close(confidence, logits[:, 0].sigmoid())
    # What we save, we open again.
    detector.save(tmp_path)
    assert torch.equal(load_detector(tmp_path / "detector", CPU)(images), confidence)
    state = net.state_dict()
    del state["decode_head.classifier.bias"]
    torch.save(state, tmp_path / "segformer.pth")
    with pytest.raises(SystemExit, match="--detector .*decode_head.classifier.bias is missing"):
        load_detector(tmp_path / "segformer.pth", CPU)
    two = SegformerForSemanticSegmentation(SegformerConfig(num_labels=2, **options))
    two.save_pretrained(tmp_path / "detector")
    with pytest.raises(SystemExit, match="it has 2 classes; a detector has one"):
        load_detector(tmp_path / "detector", CPU)
