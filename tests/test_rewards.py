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
from conftest import CPU, use_bf16
from random_weights import FILES, aesthetic_scores, crop, imagereward_scores, mps_scores, pad
from random_weights import read_state, write_state
from torchvision.transforms import InterpolationMode
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer, CLIPImageProcessor
from transformers import CLIPModel, SegformerConfig, SegformerForSemanticSegmentation

import evaluate
import judges.imagereward
import judges.mps
import judges.weights
import rewards
from common import TOY, generator
from judges.detector import load_detector
from judges.images import CLIP_MEAN, CLIP_STD, preprocess
from judges.mps import MPS
from rewards import REWARDS, load_reward
from run_folder import to_pil

NAMES = ["hps", "pick", "imagereward", "clip", "clip_h", "mps", "aesthetic"]
PROMPTS = ["a red circle above a blue square", "the sea, 12 ships and a lighthouse", "snow"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(NAMES):
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
    images = pictures(64, 50)  # resized to 53 x 42 for pick: an odd margin to crop
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


@torch.no_grad()
def test_imagereward_is_blip(weights, tmp_path):
    folder, file = copy_of(weights, "imagereward", tmp_path)
    state = read_state(file)
    # With small activations a wrong eps shows.
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        state["blip.visual_encoder." + key] *= 0.01
    write_state(state, file)
    for size in [(32, 32), (42, 57)]:
        images = pictures(*size)
        inputs = (folder, crop(images, 32), PROMPTS)
        raw = imagereward_scores(*inputs)
        raw_reward = evaluate.load_network("imagereward_raw", folder, CPU)
        torch.testing.assert_close(raw_reward(images, PROMPTS), raw, rtol=1e-4, atol=2e-5)
        r = (raw - 0.16717362830052426) / 1.0333394966054072
        reward = load("imagereward", folder)
        torch.testing.assert_close(reward(images, PROMPTS), r, rtol=1e-4, atol=2e-5)
        # This comparison would notice a missing mask, or another eps.
        assert (imagereward_scores(*inputs, masked=False) - raw).abs().max() > 2e-3
        assert (imagereward_scores(*inputs, eps=1e-5) - raw).abs().max() > 2e-3


@torch.no_grad()
def test_aesthetic_is_a_linear_map_of_clips_direction(weights, tmp_path):
    images = pictures(50, 63)
    processor = CLIPImageProcessor(
        size=dict(shortest_edge=42), crop_size=dict(height=42, width=42),
        image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD),
    )
    pixels = processor(images, do_rescale=False, return_tensors="pt").pixel_values
    expected = aesthetic_scores(weights / "aesthetic", pixels)
    assert expected.std() > 0.1
    reward = load("aesthetic", weights / "aesthetic")
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-5)
    # The prompts do not matter, and evaluate.py knows it under the same name.
    metric = evaluate.load_network("aesthetic", weights / "aesthetic", CPU)
    torch.testing.assert_close(metric(images, PROMPTS[::-1]), expected, rtol=0, atol=1e-5)
    # The authors' own name for the file works, too, and so does the file itself.
    folder, file = copy_of(weights, "aesthetic", tmp_path)
    file.rename(folder / "sac+logos+ava1-l14-linearMSE.pth")
    for path in (folder, folder / "sac+logos+ava1-l14-linearMSE.pth"):
        torch.testing.assert_close(load("aesthetic", path)(images, PROMPTS), expected)


def in_bf16(name, weights, monkeypatch):
    """A judge as it is on CUDA."""
    with monkeypatch.context() as patch:
        use_bf16(patch)
        return load(name, weights / name)


@torch.no_grad()
def test_judges_in_bf16_are_rough_but_have_exact_scales(weights, monkeypatch):
    images = pictures(42, 42)
    for name, tolerance in (("mps", 0.5), ("pick", 0.5), ("aesthetic", 0.05), ("imagereward", 0.1)):
        exact = load(name, weights / name)
        rough = in_bf16(name, weights, monkeypatch)
        r = rough(images, PROMPTS)
        r_exact = exact(images, PROMPTS)
        assert r.dtype == torch.float32 and not torch.equal(r, r_exact)
        torch.testing.assert_close(r, r_exact, rtol=0, atol=tolerance)
        if name in ("mps", "pick"):
            # In bf16, 100 would be 99. Real weights have 100, so 1 is 0.01 of a cosine.
            assert rough.clip.dtype == torch.bfloat16
            assert rough.scale == exact.scale == pytest.approx(100, rel=1e-4)
        if name == "imagereward":
            assert rough.net["text"].dtype == torch.bfloat16
            assert torch.equal(rough.net["mlp"][0].weight, exact.net["mlp"][0].weight)


@torch.no_grad()
def test_mps_is_its_published_equations(weights, tmp_path):
    folder, _ = copy_of(weights, "mps", tmp_path)
    random_weights.separate_mps_words(folder, PROMPTS, MPS.CONDITION)
    images = pictures(42, 57)
    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(images, do_rescale=False, return_tensors="pt").pixel_values
    expected = mps_scores(folder, pixels, PROMPTS, MPS.CONDITION)
    mps = evaluate.load_network("mps", folder, CPU)
    torch.testing.assert_close(mps(images, PROMPTS), expected, rtol=0, atol=2e-3)
    assert expected.std() > 0.1
    # The authors' evaluation takes another threshold, with which fewer text tokens are seen.
    strict = mps_scores(folder, pixels, PROMPTS, MPS.CONDITION, threshold=0.3)
    own = evaluate.load_network("mps_0.3", folder, CPU)(images, PROMPTS)
    torch.testing.assert_close(own, strict, rtol=0, atol=2e-3)
    assert (strict - expected).abs().max() > 0.1
    # Every image keeps its own prompt where one comes twice.
    r = mps(images.flip(0), [PROMPTS[2], PROMPTS[2], PROMPTS[0]])
    torch.testing.assert_close(r[[2, 0]], expected[[0, 2]], rtol=0, atol=2e-3)


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
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        step = images + 1e-3 * images.grad / images.grad.abs().mean()
        assert (reward(step, PROMPTS)[:2] > r[:2]).all()


@pytest.mark.parametrize("name", ["hps", "pick", "imagereward", "clip", "clip_h"])
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


def test_ranges_map_to_about_0_to_1():
    for name, row in REWARDS.items():
        low, high = [(r - row.shift) / row.scale for r in (row.low, row.high)]
        if name in ("toy_pref", "pick"):
            assert low == 0 and 0.3 < high < 1.1
        elif name in ("mps", "aesthetic"):
            assert 0.3 < low < high < 2
        else:
            # Cosines lie there already, and ReFL's hinge needs ImageReward's own scale.
            assert (low, high) == (row.low, row.high)


def test_every_name_means_its_published_weights(monkeypatch):
    def path_of(repo, filename, **options):
        return f"{repo}/{filename}"

    monkeypatch.setattr(judges.weights, "cached_file", path_of)
    for judge in ("ClipScore", "PickScore", "ImageReward", "MPS", "Aesthetic"):
        monkeypatch.setattr(rewards, judge, lambda *args, **options: (*args, options))
    hps = Path("xswu/HPSv2/HPS_v2.1_compressed.pt")
    clip_h = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    usual = dict(device=CPU, dtype=None)
    assert {name: load_reward(name, CPU)[0] for name in NAMES} == {
        "hps": ("ViT-H-14", dict(usual, path=hps, pad=True)),
        "pick": ("yuvalkirstain/PickScore_v1", clip_h, usual),
        "imagereward": (Path("THUDM/ImageReward/ImageReward.pt"), usual),
        "clip": ("ViT-B-32-quickgelu", dict(usual, tag="openai", path=None)),
        "clip_h": ("ViT-H-14", dict(usual, tag="laion2b_s32b_b79k", path=None)),
        "mps": (Path("RE-N-Y/mpsv1/model.safetensors"), usual),
        "aesthetic": (Path("trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"), usual),
    }


def test_sizes_are_read_off_the_published_tensors():
    with torch.device("meta"):
        shapes = random_weights.imagereward_shapes(True, 30524)
        empty = {key: torch.empty(shapes[key]) for key in shapes}
        blip = judges.imagereward.build_blip_scorer(empty)
        clip = CLIPModel(random_weights.clip_h_config(True, 49408))
        rebuilt = CLIPModel(judges.mps.build_clip_config(clip.state_dict()))
    assert random_weights.shapes_of(rebuilt) == random_weights.shapes_of(clip)
    configs = [blip["vision"].config, blip["text"].config]
    configs += [rebuilt.config.vision_config, rebuilt.config.text_config]
    assert [config.num_attention_heads for config in configs] == [16, 12, 16, 16]
    assert [config.layer_norm_eps for config in configs] == [1e-6, 1e-12, 1e-5, 1e-5]
    assert {config.hidden_act for config in configs} == {"gelu"}
    assert 4 * sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(1.79e9, rel=0.01)


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
    ends += ("layers.6.weight",)
    key = next(key for key in state if key.endswith(ends))
    missing = {k: v for k, v in state.items() if k != key}
    extra = {**state, "another.weight": torch.zeros(2)}
    short = {**state, key: state[key][:-1].clone()}
    name_in_error = key.removeprefix("blip.text_encoder.")
    cases = [(missing, name_in_error), (extra, "another.weight"), (short, ""), ({}, "")]
    if name == "mps":
        # It has tensors that we do not need, and its error names another weight of this layer.
        cases = [(missing, "encoder.layers.1."), (short, ""), ({}, "")]
    for changed, word in cases:
        write_state(changed, file)
        refused(f"{name}:{folder}", word)
    # All is well with another table of position numbers, which old transformers saved.
    if name == "pick":
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write_state(state, file)
    load(name, folder)
    for content in (file.read_bytes()[:1000], b"", b"<html>not found</html>"):
        file.write_bytes(content)
        refused(f"{name}:{folder}", "cannot load its weights")


@pytest.mark.parametrize("name", ["hps", "imagereward", "pick", "aesthetic"])
def test_code_in_a_checkpoint_is_never_run(name, weights, tmp_path):
    folder, file = copy_of(weights, name, tmp_path)
    state = {**read_state(file), "extra": Code()}
    file.unlink()
    file = file if name != "pick" else folder / "pytorch_model.bin"
    torch.save(state, file)
    refused(f"{name}:{folder}", "we never run code")
    assert not Path("ran").exists()
    torch.load(file, weights_only=False)
    assert Path("ran").exists()


def test_wrong_names_and_files(weights, tmp_path):
    refused("hpsv2", "no such reward", "hps")
    refused("", "is required")
    refused("hps:absent.pt", "absent.pt does not exist")
    for content in ([torch.zeros(2)], {"a": 1}, torch.zeros(3)):
        torch.save(content, tmp_path / "x.pt")
        refused(f"imagereward:{tmp_path}/x.pt", "no state dict")
    refused(f"hps:{weights}/imagereward/ImageReward.pt", "Missing key")
    refused(f"imagereward:{weights}/hps/{FILES['hps']}", "patch_embed")
    for name in ("cross_model.layers.3.1.fn.attn_out.weight", "model.logit_scale"):
        state = read_state(weights / "mps" / FILES["mps"])
        del state[f"mps.{name}"]
        write_state(state, tmp_path / "mps.safetensors")
        with pytest.raises((KeyError, ValueError), match=name.split(".")[-1]):
            MPS(tmp_path / "mps.safetensors", CPU)


OTHER_FILES = {"pick": "pytorch_model.bin", "clip_h": "open_clip_pytorch_model.bin"}


@pytest.mark.parametrize("name", list(OTHER_FILES))
@torch.no_grad()
def test_a_folder_with_a_torch_checkpoint(name, weights, tmp_path):
    """Both were published as torch checkpoints too."""
    folder, file = copy_of(weights, name, tmp_path)
    expected = load(name, folder)(pictures(42, 57), PROMPTS)
    state = read_state(file)
    file.unlink()
    torch.save(state, folder / OTHER_FILES[name])
    r = load(name, folder)(pictures(42, 57), PROMPTS)
    torch.testing.assert_close(r, expected, rtol=1e-5, atol=1e-5)
    state.pop(next(key for key in state if "layer_norm1" in key or "ln_1" in key))
    torch.save(state, folder / OTHER_FILES[name])
    refused(f"{name}:{folder}", "ln_1" if name == "clip_h" else "layer_norm1")
    (folder / OTHER_FILES[name]).unlink()
    refused(f"{name}:{folder}", f"{folder} has no {file.name}", OTHER_FILES[name])


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1972443839\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_git_lfs_pointer_is_named(name, weights, tmp_path):
    """What a clone of a hub repository contains if git-lfs is not installed."""
    folder, file = copy_of(weights, name, tmp_path)
    file.write_text(POINTER)
    with pytest.raises(SystemExit, match="only a git-lfs pointer to the weights: run `git"):
        load(name, folder)


def test_a_torchscript_archive_is_named(tmp_path, monkeypatch):
    """OpenAI published ViT-B-32.pt as such an archive."""
    archive = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), archive)
    # Nothing may load it.
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch.jit, "load", None)
    refused(f"clip:{archive}", "TorchScript archive", "safetensors", "timm/vit_base_patch32_clip")


def test_pick_takes_a_folder(weights):
    refused(f"pick:{weights / 'pick' / FILES['pick']}", "pass the folder")


@torch.no_grad()
def independent_confidence(net, images, size):
    x = T.Resize((size, size), InterpolationMode.BILINEAR, antialias=True)(images)
    x = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(x)
    logits = F.interpolate(net(x).logits, (size, size), mode="bilinear", align_corners=False)
    return logits[:, 0].sigmoid()


def test_detector_folder():
    images = pictures(50, 133)
    net = AutoModelForSemanticSegmentation.from_pretrained(TOY / "detector", dtype=torch.float32)
    confidence = load_detector(TOY / "detector", CPU)(images)
    torch.testing.assert_close(confidence, independent_confidence(net.eval(), images, 64))


def test_detector_file(tmp_path):
    """The state dict of a SegFormer in its published names, which save_pretrained writes."""
    sizes = dict(hidden_sizes=[8, 16, 40, 64], depths=[1, 2, 1, 1], decoder_hidden_size=8)
    net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=1, **sizes)).eval()
    net.save_pretrained(tmp_path)
    state = read_state(tmp_path / "model.safetensors")
    file = tmp_path / "segformer.pth"
    torch.save(state, file)
    detector = load_detector(file, CPU)
    images = pictures(90, 120)
    confidence = detector(images)
    torch.testing.assert_close(confidence, independent_confidence(net, images, 512))
    # What we save, we open again.
    detector.save(tmp_path)
    assert torch.equal(load_detector(tmp_path / "detector", CPU)(images), confidence)
    del state["decode_head.classifier.bias"]
    torch.save(state, file)
    with pytest.raises(SystemExit, match="--detector .*decode_head.classifier.bias is missing"):
        load_detector(file, CPU)
    # Older models on the hub have no safetensors.
    folder = tmp_path / "detector"
    torch.save(read_state(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_detector(folder, CPU)(images), confidence)
    for broken in (file, folder / "pytorch_model.bin"):
        broken.write_text(POINTER)
        with pytest.raises(SystemExit, match="--detector .*only a git-lfs pointer"):
            load_detector(broken if broken == file else folder, CPU)


@pytest.mark.parametrize("source", ["absent.pth", "toy/absent", "/absent/detector/model.pth"])
def test_a_detector_that_is_not_there(source):
    with pytest.raises(SystemExit) as stop:
        load_detector(source, CPU)
    message = stop.value.code
    assert message.startswith(f"--detector {source}: no such file or folder here, nor a hub model")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["imagereward", "pick", "mps"])
def test_a_tokenizer_without_its_vocabulary_is_refused(name, weights, tmp_path):
    """transformers makes one of a few special tokens then, to which all prompts look alike."""
    folder, file = copy_of(weights, name, tmp_path)
    for lost in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"):
        (folder / lost).unlink(missing_ok=True)
    with pytest.raises((SystemExit, ValueError, OSError), match="token|vocab"):
        MPS(file, CPU) if name == "mps" else load(name, folder)
