"""Measures folders of images, whoever made them: metadata.jsonl with {"file_name", "text"} a line, and "prompt_id", "seed" if there are any.

Quality, the mean over prompts of the mean over a prompt's images. A colon gives the weights in the published layout: hps:FILE, mps:DIR.
  hps pick clip clip_h         HPSv2.1, PickScore, CLIPScore of ViT-B/32 and of ViT-H-14 (cosines, which tables hold times 100, but PickScore)
  imagereward[_raw]            ImageReward; _raw without its normalisation (ImageReFL's tables hold it)
  mps                          MPS, "overall", text tokens chosen per sample (the authors' code chooses them per batch)
  toy_pref toy_clip            the rewards of the toy world; toy_pref_b: a second judge of the same taste, never a training reward
  toy_correct                  share of images that toy/oracle.py reads as the caption says; no learned part; where it abstains: not correct, and told
Diversity:
  dino_div                     mean over prompts of the mean over pairs of a prompt's images of 1 - cos of their DINO features (CLS token).
                               --dino toy, or a ViT such as facebook/dino-vits16 (the paper's), normalised as its preprocessor says (ImageNet;
                               ImageReFL's release feeds it CLIP's). Compare figures of one extractor only.
Against --reference, on all images, so without an interval (a resampled covariance has a smaller rank: FID would be biased):
  fid                          Frechet distance of Inception features, with the weights of pytorch-fid; wants more than 2,048 images on either side
  frechet_toy                  the same distance of toy/dino features: no FID
  cov_dist log_cov_dist        our own definition after arXiv 2409.06493: l and m the sorted eigenvalues of the covariances of the DINO features, of
                               length 1, here and in the reference: mean |l_i - m_i|, and mean |log l_i - log m_i|, those below 1e-8 set to it
Artifacts: artifact_mean, artifact_max: confidence of a --detector in [0, 1], mean and maximum over an image's pixels.
drift: the first folder against each other one, image by image of the same prompt and seed, outside --masks: PSNR (dB, at most 100, which identical
  images have) and 1 - cos of DINO features.

Intervals: 95 %, bootstrap over prompts. If a folder has the prompts and seeds of the first one, its differences to it are paired by prompt.
Features are kept in DIR/.evaluate, and made again when images, prompts, weights or these scripts change.

  $ python evaluate.py images/base images/tuned --metrics toy_pref,toy_clip,toy_correct,dino_div --out results.json --plot trade_off.png
  $ python evaluate.py --over_steps runs/refl-toy-toy_pref --metrics toy_pref,toy_pref_b,dino_div --plot over_steps.png
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, ViTModel
from transformers.utils import logging as transformers_logging

from common import (CLIP_MEAN, CLIP_STD, ROOT, TOY, Parser, PickScore, die, encode_prompts, fetch, generate_batches, generator, launch, load_detector,
                    load_lora, load_model, load_reward, merged, nearest, pick_device, published, read_prompts, resize_and_normalise, to_pil,
                    trainable)
from toy.oracle import correct
from toy.scenes import SIZE as TOY_SIZE
from toy.scenes import parse_caption

QUALITY = ("hps", "pick", "imagereward", "imagereward_raw", "mps", "clip", "clip_h", "toy_pref", "toy_pref_b", "toy_clip", "toy_correct")
ARTIFACTS, AGAINST = ("artifact_mean", "artifact_max"), ("fid", "frechet_toy", "cov_dist", "log_cov_dist")
METRICS = (*QUALITY, "dino_div", *ARTIFACTS, *AGAINST, "drift")
NETWORK = {name: "dino" for name in METRICS} | {name: name for name in QUALITY} | {name: "detector" for name in ARTIFACTS} | {"fid": "inception"}
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"                           # MPS is built on it: its tokenizer
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="*", metavar="DIR", help="folders with images and metadata.jsonl; differences are to the first one")
    parser.add_argument("--metrics", required=True, help="comma-separated, of the above; name:PATH takes the weights from there")
    parser.add_argument("--reference", help=f"folder of images for {', '.join(AGAINST)}")
    parser.add_argument("--dino", help=f"toy, or a folder or hub id of a ViT (toy if all images are {TOY_SIZE} px, else facebook/dino-vits16)")
    parser.add_argument("--detector", help=f"folder or hub id of a segmentation network with one class (toy/detector if all images are {TOY_SIZE} px)")
    parser.add_argument("--masks", help="drift: folder of masks named as the first folder's images; white may change, and is left out")
    parser.add_argument("--over_steps", metavar="RUN", help="sample base and snapshots of a run into RUN/over_steps, as its sampler block says; measure them")
    parser.add_argument("--prompts", help="--over_steps: text file, a prompt per line (the run's --test_prompts)")
    parser.add_argument("--num_images", type=int, default=4, help="--over_steps: images per prompt")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once; no result depends on it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", help="write everything to this JSON file, with each prompt's value")
    parser.add_argument("--plot", help="PNG: every quality against the first diversity named; with --over_steps every metric over the steps")
    args = parser.parse_args(argv)
    args.metrics = dict(m.strip().partition(":")[::2] for m in args.metrics.split(","))
    for name, path in args.metrics.items():
        if name not in METRICS:
            parser.error(f"--metrics {name}: no such metric; {nearest(name, METRICS)}")
        if path and (NETWORK[name] in ("dino", "detector") or name == "toy_correct"):
            parser.error(f"--metrics {name}:{path}: {name} takes no path; see --dino and --detector")
        if path and not os.path.exists(path):
            parser.error(f"--metrics {name}:{path}: {path} does not exist")
    if bool(args.folders) == bool(args.over_steps):
        parser.error("folders of images are needed, or --over_steps RUN in their place")
    if len(set(map(os.path.realpath, args.folders))) < len(args.folders):
        parser.error("a folder is named twice")
    if needs := [name for name in args.metrics if name in AGAINST and not args.reference]:
        parser.error(f"--metrics {needs[0]} is measured against --reference DIR, a folder of images")
    if "drift" in args.metrics and not args.over_steps and len(args.folders) < 2:
        parser.error("--metrics drift needs two folders of the same prompts and seeds")
    if args.masks and "drift" not in args.metrics:
        parser.error("--masks are for --metrics drift")
    if min(args.batch_size, args.num_images) < 1:
        parser.error(f"--batch_size {args.batch_size} --num_images {args.num_images}: at least 1")
    if args.plot and not args.over_steps and not ({*QUALITY, *ARTIFACTS} & {*args.metrics} and {"dino_div", *AGAINST} & {*args.metrics}):
        parser.error(f"--plot draws quality against diversity: one of {', '.join(QUALITY)} and one of dino_div, {', '.join(AGAINST)} are needed")
    for name in ("out", "plot"):
        if (path := getattr(args, name)) and (os.path.isdir(path) or not Path(path).absolute().parent.is_dir()):
            parser.error(f"--{name} {path}: the name of a file in a folder that exists is needed")
    return args


# ------------------------------------------------------------------------------------------------------------------------------------
# folders of images


def read_folder(folder):
    """metadata.jsonl -> rows dict(file_name, text, prompt_id, seed), sorted, so that their order in the file never matters.

    Without prompt_id images of the same text are one prompt; without seed there is no pairing (None).
    """
    path, rows = Path(folder) / "metadata.jsonl", []
    if not path.is_file():
        die(f"{folder}: no metadata.jsonl in it; combined_sample.py writes folders as they are expected here")
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                if not isinstance(row["text"], str) or "\0" in row["text"] + row["file_name"]:
                    raise ValueError
                rows.append(dict(file_name=row["file_name"], text=row["text"], prompt_id=str(row.get("prompt_id", row["text"])), seed=row.get("seed")))
            except (ValueError, KeyError, TypeError, AttributeError):
                die(f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}, and "prompt_id", "seed" if there are any')
    texts = {}
    for row in rows:
        if Path(row["file_name"]).is_absolute() or ".." in Path(row["file_name"]).parts:
            die(f"{path}: {row['file_name']} is outside the folder")
        if not (Path(folder) / row["file_name"]).is_file():
            die(f"{folder}: {row['file_name']}, named in its metadata.jsonl, does not exist")
        if texts.setdefault(row["prompt_id"], row["text"]) != row["text"]:
            die(f"{path}: prompt_id {row['prompt_id']} has two texts, {texts[row['prompt_id']]!r} and {row['text']!r}")
    if not rows or len({row["file_name"] for row in rows}) < len(rows):
        die(f"{path}: " + ("a file is named twice" if rows else "no images in it"))
    return sorted(rows, key=lambda row: (row["prompt_id"], str(row["seed"]), row["file_name"]))


def read_image(path):
    """(3, H, W) in [0, 1]; OSError if it cannot be read."""
    try:
        with Image.open(path) as f:
            return torch.from_numpy(np.array(f.convert("RGB"))).permute(2, 0, 1).float() / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise OSError(f"{path}: not a readable image ({type(e).__name__})") from e


def batches(folder, rows, batch=32):
    """Yields images (B, 3, H, W) in [0, 1] and their rows; a batch ends early where the images' size changes."""
    images, part = [], []
    for row in rows:
        image = read_image(Path(folder) / row["file_name"])
        if images and (len(images) == batch or image.shape != images[0].shape):
            yield torch.stack(images), part
            images, part = [], []
        images, part = images + [image], part + [row]
    yield torch.stack(images), part


def unpaired(first, rows):
    """Why the images of two folders cannot be paired; None if they can: the same prompts, and the same seeds of each."""
    tables = []
    for each in (first, rows):
        if any(row["seed"] is None for row in each):
            return "a folder's metadata.jsonl has no seeds"
        tables.append({})
        for row in each:
            tables[-1].setdefault((row["prompt_id"], row["text"]), []).append(str(row["seed"]))
    same = sum(sorted(seeds) == sorted(tables[1].get(key, [])) for key, seeds in tables[0].items())
    return None if same == len(tables[0]) == len(tables[1]) else f"{same} of {len(tables[0])} and {len(tables[1])} prompts have the same text and seeds"


# ------------------------------------------------------------------------------------------------------------------------------------
# networks: callables (images (B, 3, H, W) in [0, 1], B prompts) -> scores (B,) or features (B, D)


def load_complete(cls, source, **kwargs):
    """from_pretrained in fp32, frozen, in eval mode; missing weights are an error, where transformers would go on with random ones."""
    repo, _, revision = (source, "", "") if source is None or os.path.isdir(source) else source.partition("@")
    transformers_logging.set_verbosity_error()                            # its report of keys: we say what matters ourselves
    net, info = cls.from_pretrained(repo, revision=revision or "main", dtype=torch.float32, use_safetensors=True, output_loading_info=True, **kwargs)
    if lost := sorted(info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}):
        raise ValueError(f"not all weights of a {cls.__name__}: {lost[0]} is missing or has another shape")
    return net.eval().requires_grad_(False)


class Dino:
    """L2-normalised CLS token (B, D) of a ViT (Caron et al. 2021), preprocessed as its folder says."""

    def __init__(self, source, device):
        processor = json.loads(fetch(source, "preprocessor_config.json").read_text())
        size = processor["size"]                                          # {"height", "width"}, {"shortest_edge"} or, in old files, a number
        self.size = size.get("shortest_edge") or size["height"] if isinstance(size, dict) else size
        self.mean, self.std = processor["image_mean"], processor["image_std"]
        self.vit = load_complete(ViTModel, source, add_pooling_layer=False).to(device)

    def __call__(self, images, prompts=None):
        return F.normalize(self.vit(resize_and_normalise(images, self.size, self.mean, self.std)).last_hidden_state[:, 0], dim=-1)


def artifacts(source, device):
    """(B, 2): mean and maximum over the pixels of an artifact detector's confidence in [0, 1] (DiffDoctor, section 3)."""
    detector = load_detector(source, device)

    def scores(images, prompts=None):
        confidence = detector(images).flatten(1)
        return torch.stack([confidence.mean(1), confidence.amax(1)], 1)
    return scores


class Inception:
    """Pool3 features (B, 2048) of pytorch-fid's InceptionV3, which published FIDs use. Its weights are known by their sha256, and never unpickled."""

    def __init__(self, path, device):
        from pytorch_fid import inception                                 # only FID needs it
        path = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1])
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(INCEPTION_URL, path, hash_prefix=INCEPTION_SHA256)
            except OSError as e:
                raise OSError(f"{INCEPTION_URL} was not served ({e}); a copy of it can be named, fid:FILE") from e
        if hashlib.sha256(path.read_bytes()).hexdigest() != INCEPTION_SHA256:
            raise ValueError(f"{path} is not pytorch-fid's file: its sha256 is another one")
        state = torch.load(path, map_location="cpu", weights_only=True)
        inception.load_state_dict_from_url = lambda url, progress: state  # theirs unpickles what it downloads
        self.net = inception.InceptionV3().to(device).eval()

    def __call__(self, images, prompts=None):
        return self.net(images)[0].flatten(1)


class MPS:
    """exp(logit_scale) cos(text, x_4[0]): the Multi-dimensional Preference Score (Zhang et al., CVPR 2024), condition "overall", ImageReward's split.

    x_0 (B, 257, D): image tokens; in each of 4 layers they attend to the text tokens (B, 77, D) that have to do with the condition, then to each
    other with rotary positions; 16 heads of 64 share one key and value (multi-query), a SwiGLU runs beside each attention, nothing has a bias.
    path: model.safetensors as RE-N-Y/mpsv1 has it (the authors' own file is a pickle); a tokenizer beside it is used instead of the hub's.
    """
    CONDITION = ("light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity, "
                 "attributes, position, number, location, word, things.")
    CROSS, SELF = ("norm", "to_q", "to_kv", "to_out", "ff.0", "ff.2"), ("norm", "fused_attn_ff_proj", "attn_out", "ff_out.1")

    def __init__(self, path, device):
        state, folder = load_file(path), Path(path).parent
        own, layers = ({k.removeprefix(start): v.float() for k, v in state.items() if k.startswith(start)}
                       for start in ("mps.model.", "mps.cross_model.layers."))
        self.clip = load_complete(CLIPModel, None, config=clip_config(own), state_dict=own).to(device)
        self.layers = [[[layers[f"{i}.{j}.fn.{name}.weight"].to(device) for name in names] for j, names in enumerate((self.CROSS, self.SELF))]
                       for i in range(len({k.split(".")[0] for k in layers}))]
        self.tokenizer = AutoTokenizer.from_pretrained(folder if (folder / "tokenizer_config.json").is_file() else VIT_H, trust_remote_code=False)
        self.size = self.clip.config.vision_config.image_size
        self.condition = self.text([self.CONDITION])[0][0]                # (77, D)

    @torch.no_grad()
    def text(self, prompts):
        """-> tokens (B, 77, D), end-of-text features (B, D)."""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        tokens = self.clip.text_projection(self.clip.text_model(ids.to(self.clip.device)).last_hidden_state)      # padding is read as well
        return tokens, tokens[torch.arange(len(ids)), ids.argmax(-1)]     # the end of the text has the highest id of all tokens

    def __call__(self, images, prompts):
        unique = list(dict.fromkeys(prompts))
        text, end = (x[[unique.index(p) for p in prompts]] for x in self.text(unique))
        related = (text @ self.condition.T).amax(-1)                      # (B, 77): each token's closeness to the condition
        mask = (related / related.amax(1, keepdim=True) > .01)[:, None, None]
        x = self.clip.vision_model(resize_and_normalise(images, self.size, CLIP_MEAN, CLIP_STD)).last_hidden_state
        x = self.clip.visual_projection(x)                                # (B, 257, D), before the post-layernorm
        for (norm, to_q, to_kv, to_out, up, down), (self_norm, fused, attn_out, ff_out) in self.layers:
            h, head = F.layer_norm(x, norm.shape, norm), len(to_kv) // 2
            x = x + attend(h @ to_q.T, *(text @ to_kv.T).chunk(2, -1), mask) @ to_out.T + swiglu(h @ up.T) @ down.T
            q, k, v, ff = (F.layer_norm(x, self_norm.shape, self_norm) @ fused.T).split([len(to_q), head, head, 2 * ff_out.shape[1]], -1)
            x = x + attend(rotate(q, head), rotate(k, head), v) @ attn_out.T + swiglu(ff) @ ff_out.T
        return self.clip.logit_scale.exp() * F.cosine_similarity(end, x[:, 0], dim=-1)


def clip_config(state):
    """A transformers CLIPModel's {name: tensor} -> its CLIPConfig by the tensors' sizes. Heads are 64 (text) and 80 (vision) wide, as in ViT-H."""
    def tower(name, head):
        width, inner = state[f"{name}_model.encoder.layers.0.mlp.fc2.weight"].shape
        layers = sum(k.startswith(f"{name}_model.") and k.endswith("mlp.fc1.weight") for k in state)
        return dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // head, hidden_act="gelu")
    projection, patch = len(state["text_projection.weight"]), state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    grid = round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** .5)
    words, length = (len(state[f"text_model.embeddings.{k}_embedding.weight"]) for k in ("token", "position"))
    return CLIPConfig(projection_dim=projection, vision_config=dict(tower("vision", 80), image_size=grid * patch, patch_size=patch),
                      text_config=dict(tower("text", 64), vocab_size=words, max_position_embeddings=length))


def attend(q, k, v, mask=None):
    """q (B, N, heads * d), k and v (B, M, d), the same for all heads, mask broadcast to (B, heads, N, M) -> (B, N, heads * d)."""
    q = q.unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def rotate(x, d):
    """Rotary positions (Su et al. 2021) for the heads of d numbers in x (B, N, heads * d), the two halves of a head being the pairs."""
    angle = torch.arange(x.shape[1], device=x.device)[:, None] / 10000 ** (torch.arange(0, d, 2, device=x.device) / d)       # (N, d / 2)
    a, b = x.unflatten(-1, (-1, d)).chunk(2, -1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)


def swiglu(x):
    a, gate = x.chunk(2, -1)
    return F.silu(gate) * a


def verdicts(images, prompts):
    """toy/oracle.py's verdicts: 1 correct, 0 not, nan where it abstains."""
    table = {True: 1., False: 0., None: float("nan")}
    return torch.tensor([table[correct(image, prompt)] for image, prompt in zip(images.cpu(), prompts)])


def load_network(name, source, device):
    """A value of NETWORK and where its weights are (None: as published) -> the callable."""
    flag = {"dino": "--dino", "detector": "--detector", "inception": "--metrics fid"}.get(name, f"--metrics {name}")
    if name.startswith("toy_") and name != "toy_correct" and not (Path(source) / "model.safetensors").is_file():
        die(f"--metrics {name}: its weights are missing, no {Path(source) / 'model.safetensors'}; `python toy/make.py` makes them")
    try:
        if name == "mps":
            return MPS(published(source, "model.safetensors", "RE-N-Y/mpsv1"), device)
        if name == "imagereward_raw":
            reward = load_reward("imagereward" + (f":{source}" if source else ""), device)[0]
            reward.raw = True
            return reward
        build = {"dino": Dino, "detector": artifacts, "inception": Inception, "toy_correct": lambda *_: verdicts,
                 "toy_pref_b": lambda path, device: PickScore(path, path, device)}.get(name)
        return build(source, device) if build else load_reward(name + (f":{source}" if source else ""), device)[0]
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as e:
        die(f"{flag}: cannot load the weights{f' of {source}' if source else ''}: {(str(e).splitlines() or [type(e).__name__])[0]}")


def fingerprint(name, source, device, folder, rows):
    """What cached features depend on: the images and texts, the weights, the device's precision, and the code."""
    def stat(path):
        return os.fspath(path), path.stat().st_size, path.stat().st_mtime_ns
    weights = Path(source or "")
    weights = [weights] if weights.is_file() else [p for p in sorted(weights.glob("*")) if p.is_file()] if source else []
    code = [(ROOT / f).read_bytes() for f in ("evaluate.py", "common.py", "toy/oracle.py", "toy/scenes.py")]
    images = [(row["text"], *stat(Path(folder) / row["file_name"])[1:], row["file_name"]) for row in rows]
    return hashlib.sha256(repr((name, source, device.type, list(map(stat, weights)), code, images)).encode()).hexdigest()


@torch.no_grad()
def features_of(folders, names, sources, device, batch=32):
    """{folder: rows}, values of NETWORK, {name: source} -> {(folder, name): (N, ...) on the CPU}. One network is in memory at a time."""
    table = {}
    for name in names:
        keys = {folder: fingerprint(name, sources[name], device, folder, rows) for folder, rows in folders.items()}
        cache = {folder: Path(folder) / ".evaluate" / f"{name}.safetensors" for folder in folders}
        for folder in folders:
            if cache[folder].is_file():
                try:
                    with safe_open(cache[folder], "pt") as f:
                        if (f.metadata() or {}).get("key") == keys[folder]:
                            table[folder, name] = f.get_tensor("features")
                except (SafetensorError, OSError) as e:
                    print(f"{cache[folder]}: not readable ({type(e).__name__}), made again")
        todo = {folder: rows for folder, rows in folders.items() if (folder, name) not in table}
        network = load_network(name, sources[name], device) if todo else None
        with tqdm(total=sum(map(len, todo.values())), desc=name, unit="image", disable=not todo) as bar:
            for folder, rows in todo.items():
                parts = []
                for images, part in batches(folder, rows, batch):
                    parts.append(network(images.to(device), [row["text"] for row in part]).float().cpu())
                    bar.update(len(part))
                table[folder, name] = torch.cat(parts)
                if name != "toy_correct" and not table[folder, name].isfinite().all():
                    raise FloatingPointError(f"{name}: its scores of {folder} are not finite; its weights are broken")
                write_cache(cache[folder], table[folder, name], keys[folder])
        del network
    return table


def write_cache(path, features, key):
    tmp = path.with_suffix(f".{os.getpid()}.tmp")                         # several evaluations may share a reference
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({"features": features.contiguous()}, tmp, {"key": key})
        tmp.replace(path)
    except (OSError, SafetensorError) as e:
        print(f"{path}: features are not kept, cannot write there ({e})")


# ------------------------------------------------------------------------------------------------------------------------------------
# metrics


def prompt_means(values, prompt_ids):
    """values (N,), N prompt ids -> {id: mean over its images}."""
    groups = {}
    for value, p in zip(values.double().tolist(), prompt_ids, strict=True):
        groups.setdefault(p, []).append(value)
    return {p: sum(group) / len(group) for p, group in groups.items()}


def dino_diversity(features, prompt_ids):
    """features (N, D), N prompt ids -> {id: mean of 1 - cos over the pairs of its images}; prompts with one image have none and are absent."""
    groups, features = {}, F.normalize(features.double(), dim=-1)
    for i, p in enumerate(prompt_ids):
        groups.setdefault(p, []).append(i)
    pairs = {p: torch.triu_indices(len(group), len(group), 1) for p, group in groups.items() if len(group) > 1}
    return {p: 1 - (features[groups[p]] @ features[groups[p]].T)[tuple(ij)].mean().item() for p, ij in pairs.items()}


def frechet(a, b):
    """features (N, D), (M, D) -> |mean_a - mean_b|^2 + tr S_a + tr S_b - 2 tr (S_a^.5 S_b S_a^.5)^.5 in float64 (Heusel et al. 2017, Eq. 6)."""
    a, b = a.double(), b.double()
    s_a, s_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return max(0., ((a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross).item())


def covariance_distances(a, b, floor=1e-8):
    """features (N, D), (M, D) -> (cov_dist, log_cov_dist) as the docstring above defines them; eigenvalues below the floor are rounding errors."""
    spectra = [torch.linalg.eigvalsh(F.normalize(x.double(), dim=-1).T.cov()) for x in (a, b)]
    logs = [s.clamp(min=floor).log() for s in spectra]
    return (spectra[0] - spectra[1]).abs().mean().item(), (logs[0] - logs[1]).abs().mean().item()


def interval(values, resamples=2000):
    """Per-prompt values -> (mean, low, high), the 95 % bootstrap interval over prompts; always the same draws for the same count."""
    values = torch.tensor(list(values), dtype=torch.float64)
    means = values[torch.randint(len(values), (resamples, len(values)), generator=generator(0, "bootstrap"))].mean(1)
    return values.mean().item(), *means.quantile(torch.tensor([.025, .975], dtype=torch.float64)).tolist()


def summary(per_prompt):
    """{id: value} -> dict(mean, low, high, prompts, per_prompt); the mean is None if there is no prompt, the interval if there is but one."""
    mean, low, high = interval(per_prompt.values()) if per_prompt else (None, None, None)
    low, high = (low, high) if len(per_prompt) > 1 else (None, None)
    return dict(mean=mean, low=low, high=high, prompts=len(per_prompt), per_prompt=per_prompt)


def summarise(name, values, prompt_ids, reference=None):
    """A metric of a folder from its network's values (N, ...) -> its summary; with it toy_correct's abstentions, dino_div's one-image prompts."""
    if name in AGAINST:
        value = frechet(values, reference) if name in ("fid", "frechet_toy") else covariance_distances(values, reference)[name == "log_cov_dist"]
        full_rank = min(len(values), len(reference)) > values.shape[1]
        return dict(mean=value, low=None, high=None, prompts=len(set(prompt_ids)), per_prompt={}, full_rank=full_rank)
    if name == "dino_div":
        per_prompt = dino_diversity(values, prompt_ids)
        return dict(summary(per_prompt), left_out=len(set(prompt_ids)) - len(per_prompt))
    values = values[:, ARTIFACTS.index(name)] if name in ARTIFACTS else values
    result = summary(prompt_means(values.nan_to_num(0.) if name == "toy_correct" else values, prompt_ids))
    if name == "toy_correct":
        abstained = prompt_means(values.isnan(), prompt_ids).values()
        result["abstained"] = sum(abstained) / len(abstained)
    return result


def difference(own, its):
    """Two summaries of the same prompts -> the summary of own - its."""
    if not own["per_prompt"] and own["mean"] is not None:
        return dict(own, mean=own["mean"] - its["mean"])
    return summary({p: v - its["per_prompt"][p] for p, v in own["per_prompt"].items()})


@torch.no_grad()
def drift(first, other, dino, device, masks=None, batch=32):
    """(folder, rows) twice, in pairs -> dict(psnr, dino) of summaries. Under a mask both get the first folder's pixels: only the rest counts."""
    psnr, dino_distance = [], []
    for (a, part), (b, _) in zip(batches(*first, batch), batches(*other, batch)):
        if a.shape != b.shape:
            raise OSError(f"--metrics drift: the images of {first[0]} and {other[0]} differ in size, in the batch from {part[0]['file_name']} on")
        keep = torch.ones_like(a[:, :1])
        for i, row in enumerate(part if masks else ()):
            mask = read_image(Path(masks) / row["file_name"])[:1]
            if mask.shape != keep[i].shape or mask.min() > .5:
                raise OSError(f"--masks {masks}: {row['file_name']} has another size than its image, or leaves nothing of it")
            keep[i] = mask <= .5
        b = torch.where(keep > 0, b, a)
        mse = (a - b).double().square().mean(1, keepdim=True).sum((1, 2, 3)) / keep.double().sum((1, 2, 3))
        psnr.append(-10 * mse.clamp(min=1e-10).log10())
        dino_distance.append(1 - (dino(a.to(device)) * dino(b.to(device))).sum(-1).cpu())
    ids = [row["prompt_id"] for row in first[1]]
    return {"psnr": summary(prompt_means(torch.cat(psnr), ids)), "dino": summary(prompt_means(torch.cat(dino_distance), ids))}


def measure(folders, metrics, sources, device, reference=None, masks=None, batch=32):
    """folders: {name: rows of read_folder} -> dict(folders={folder: {metric: summary}}, differences={folder: {metric: summary}} to the first folder,
    not_paired={folder: why not}, drift={folder: {psnr, dino: summary}}); reference: the same as folders, with one."""
    first, results = next(iter(folders)), dict(folders={}, differences={}, not_paired={}, drift={})
    for folder, rows in folders.items():
        results["folders"][folder] = {}
        if reason := unpaired(folders[first], rows):
            results["not_paired"][folder] = reason
            if "drift" in metrics:
                die(f"--metrics drift: {folder} does not pair with {first}: {reason}")
    plain = [name for name in metrics if name != "drift"]
    table = features_of(folders, dict.fromkeys(NETWORK[name] for name in plain), sources, device, batch)
    needed = dict.fromkeys(NETWORK[name] for name in plain if name in AGAINST)
    others = features_of(reference, needed, sources, device, batch) if needed else {}
    for folder, rows in folders.items():
        own = results["folders"][folder]
        for name in plain:
            ids, other = [row["prompt_id"] for row in rows], others[next(iter(reference)), NETWORK[name]] if name in AGAINST else None
            own[name] = summarise(name, table[folder, NETWORK[name]], ids, other)
        if folder != first and folder not in results["not_paired"]:
            results["differences"][folder] = {name: difference(own[name], results["folders"][first][name]) for name in plain}
    if "drift" in metrics:
        dino = load_network("dino", sources["dino"], device)
        for folder in tqdm(list(folders)[1:], desc="drift", unit="folder"):
            results["drift"][folder] = drift((first, folders[first]), (folder, folders[folder]), dino, device, masks, batch)
    return results


# ------------------------------------------------------------------------------------------------------------------------------------
# a run's snapshots, tables, plots


@torch.no_grad()
def sample_snapshots(run, prompts, num_images, device):
    """Samples the base model (step 0) and every snapshot of a run with the same noise, as its sampler block says -> {folder: step}.

    RUN/over_steps/step_000200 and so on; what was sampled from the same weights, prompts and settings is not sampled again.
    """
    run = Path(run)
    try:
        config = json.loads((run / "config.json").read_text())
        sampler, name, rank, resolution = (config[k] for k in ("sampler", "model", "lora_rank", "resolution"))
    except (OSError, ValueError, KeyError, TypeError):
        die(f"--over_steps {run}: no run folder, or its config.json is not a run's")
    snapshots = {int(p.name[5:]): p for p in (run / ("lora" if rank else "model")).glob("step_*") if p.name[5:].isdigit()}
    if not snapshots:
        die(f"--over_steps {run}: no snapshots in it; the training scripts make them every --save_every updates")
    prompts = read_prompts(prompts or config.get("test_prompts") or die(f"--over_steps {run}: its config names no test prompts; give --prompts FILE"))
    model, adapted, folders = None, False, {}
    for step, weights in sorted({0: None, **snapshots}.items()):
        out = run / "over_steps" / f"step_{step:06d}"
        folders[str(out)] = step
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(weights.rglob("*.safetensors"))] if weights else []
        settings = json.dumps(dict(sampler=sampler, model=name, resolution=resolution, prompts=prompts, num_images=num_images, weights=files))
        if (out / "settings.json").is_file() and (out / "settings.json").read_text() == settings:
            continue
        if model is None:
            model = load_model(name, device, resolution)
            encode_prompts(model, prompts)
        if weights and adapted:
            load_lora(model, weights)
        elif weights and rank:
            adapted = bool(trainable(model, rank, init_lora=weights))
        elif weights:
            unet = type(model.denoiser).from_pretrained(weights / "unet", torch_dtype=model.dtype, use_safetensors=True)
            model.denoiser.load_state_dict(unet.state_dict())
        tmp, rows = out.with_name(out.name + ".tmp"), []
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        with merged(model), tqdm(total=len(prompts) * num_images, desc=f"sampling {out.name}", unit="image") as bar:
            for images in generate_batches(model, prompts, 0, sampler, num_images):
                for image in images:
                    i, k = divmod(len(rows), num_images)
                    rows.append(dict(file_name=f"{i:05d}_{k:02d}.png", text=prompts[i], prompt_id=i, seed=0))
                    to_pil(image).save(tmp / rows[-1]["file_name"])
                bar.update(len(images))
        (tmp / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        (tmp / "settings.json").write_text(settings)
        shutil.rmtree(out, ignore_errors=True)
        tmp.replace(out)
    return folders


def report(results, folders, said):
    """The aligned table: mean [95 % interval over prompts], then the paired differences to the first folder, then what must be said."""
    first = next(iter(folders))
    metrics = list(results["folders"][first])

    def cell(s):
        return "-" if s["mean"] is None else f"{s['mean']:.4f}" + ("" if s["low"] is None else f" [{s['low']:.4f}, {s['high']:.4f}]")

    def table(title, part):
        rows = [[title, "images", "prompts", *next(iter(part.values()))]]
        for folder, own in part.items():
            rows.append([folder, str(len(folders[folder])), str(len({row["prompt_id"] for row in folders[folder]})), *map(cell, own.values())])
        widths = [max(map(len, column)) for column in zip(*rows)]
        print(*("  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows), "", sep="\n")

    for title, part in (("folder", "folders"), (f"minus {first}", "differences"), (f"drift from {first}", "drift")):
        if results[part] and (metrics or part == "drift"):
            table(title, results[part])
    for folder, own in results["folders"].items():
        if folder in results["not_paired"] and len(folders) > 1:
            print(f"{folder}: no paired differences to {first}: {results['not_paired'][folder]}")
        if left_out := own.get("dino_div", {}).get("left_out"):
            print(f"{folder}: {left_out} of {left_out + own['dino_div']['prompts']} prompts have one image, and are left out of dino_div")
        if "toy_correct" in own:
            print(f"{folder}: the oracle abstained on {own['toy_correct']['abstained']:.1%} of the images: counted as not correct")
        if short := [name for name, s in own.items() if not s.get("full_rank", True)]:
            print(f"{folder}: {', '.join(short)} of as many images as the features have dimensions, or fewer, here or in the reference: of little meaning")
    for name, source in said.items():
        if source:
            print(f"{name}: {source}")


def plot(results, path, steps=None):
    """Quality (a panel each) against the first diversity metric, a point a folder, intervals as bars; with {folder: step} every metric over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    own = results["folders"]
    metrics = list(next(iter(own.values())))
    x_name = next((m for m in metrics if m in ("dino_div", *AGAINST)), None)
    panels = metrics if steps else [m for m in metrics if m in (*QUALITY, *ARTIFACTS)]
    names = {folder: Path(folder).name for folder in own}
    names = names if len(set(names.values())) == len(own) else {folder: folder for folder in own}
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), constrained_layout=True, squeeze=False)

    def points(metric):                                                   # folders without a value (one-image prompts) are left out
        return {f: (s["mean"], s["mean"] - (s["mean"] if s["low"] is None else s["low"]), (s["mean"] if s["high"] is None else s["high"]) - s["mean"])
                for f, s in ((f, values[metric]) for f, values in own.items()) if s["mean"] is not None}
    for axis, metric in zip(axes[0], panels):
        y, x = points(metric), {f: (s, 0, 0) for f, s in steps.items()} if steps else points(x_name)
        both = [f for f in y if f in x]
        axis.errorbar([x[f][0] for f in both], [y[f][0] for f in both], xerr=list(zip(*(x[f][1:] for f in both))) or None,
                      yerr=list(zip(*(y[f][1:] for f in both))) or None, fmt="o-" if steps else "o", capsize=3)
        for f in both if not steps else ():
            axis.annotate(names[f], (x[f][0], y[f][0]), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axis.set(xlabel="updates" if steps else x_name, ylabel=metric)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    device = pick_device(args.device)
    steps = sample_snapshots(args.over_steps, args.prompts, args.num_images, device) if args.over_steps else None
    folders = {folder: read_folder(folder) for folder in steps or args.folders}
    reference = {args.reference: read_folder(args.reference)} if args.reference else {}
    try:
        for text in {row["text"] for rows in folders.values() for row in rows} if "toy_correct" in args.metrics else ():
            parse_caption(text)
    except ValueError as e:
        die(f"--metrics toy_correct: {e}")
    networks, everything = {NETWORK[name] for name in args.metrics}, {**folders, **reference}
    for folder, rows in everything.items():
        if len(rows) < 2 and {*args.metrics} & {*AGAINST}:
            die(f"{folder}: one image has no covariance, which {', '.join(name for name in args.metrics if name in AGAINST)} compare")
    try:
        firsts = [read_image(Path(folder) / rows[0]["file_name"]) for folder, rows in everything.items()]
        toy = all(image.shape[1:] == (TOY_SIZE, TOY_SIZE) for image in firsts)
        dino, detector = args.dino or ("toy" if toy else "facebook/dino-vits16"), args.detector or ("toy" if toy else None)
        if "detector" in networks and not detector:
            die("--detector DIR is needed: toy/detector knows the toy world's images only")
        if "frechet_toy" in args.metrics and dino != "toy":
            die(f"--metrics frechet_toy is of toy/dino's features, not of {dino}; it is for the toy world's images, or say --dino toy")
        sources = {NETWORK[name]: path for name, path in args.metrics.items()} | dict(dino=dino, detector=detector)
        for name, folder in (("toy_pref", "pref"), ("toy_pref_b", "pref_b"), ("toy_clip", "clip"), ("dino", "dino"), ("detector", "detector")):
            sources[name] = str(TOY / folder) if sources.get(name) in (None, "", "toy") else sources[name]
        results = measure(folders, args.metrics, sources, device, reference, args.masks, args.batch_size)
    except (OSError, FloatingPointError) as e:                            # an image, a metric: the message names it
        die(e)
    said = {name: shown if name in networks else None for name, shown in (("dino", dino), ("detector", detector))}
    report(results, folders, said)
    if args.plot:
        plot(results, args.plot, steps)
    if args.out:
        tmp = Path(args.out + ".tmp")
        tmp.write_text(json.dumps(dict(said, first=next(iter(folders)), reference=args.reference, steps=steps, **results), indent=1) + "\n")
        tmp.replace(args.out)


if __name__ == "__main__":
    launch(parse_args, main)
