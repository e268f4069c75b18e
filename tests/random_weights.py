"""Random weights in the layouts in which the real ones are published (file names, keys, nesting, fp16 where it is), so that the code that loads
the real ones can be run without them.

  $ python tests/random_weights.py sd15 hps --out weights            # small: seconds, a few MB each
  $ python tests/random_weights.py sd15 hps --out weights --full     # the published sizes: gigabytes

Each is written to OUT/NAME, and the command prints what to give to --model or --reward. Where a published file leaves something to another
place of the hub (PickScore's and ImageReward's tokenizers), it is put beside the weights. Full-size pipelines are the fp16 variant only.
"""
import argparse
import json
import math
from pathlib import Path

import open_clip
import torch
import transformers
from diffusers import (AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel)
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from transformers import (BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,
                          CLIPTokenizer)

transformers.logging.disable_progress_bar()
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
FULL = {  # the configurations of the published models
    "sd15": dict(unet=dict(channels=(320, 640, 1280, 1280), down=(CROSS, CROSS, CROSS, PLAIN), attention_head_dim=8, cross_attention_dim=768),
                 text=[(768, 12, 12, "quick_gelu", 768)], vae=(128, 256, 512, 512), scaling=.18215, sample_size=64),
    "sd21": dict(unet=dict(channels=(320, 640, 1280, 1280), down=(CROSS, CROSS, CROSS, PLAIN), attention_head_dim=(5, 10, 20, 20),
                           cross_attention_dim=1024, use_linear_projection=True),
                 text=[(1024, 23, 16, "gelu", 512)], vae=(128, 256, 512, 512), scaling=.18215, sample_size=64),
    "sdxl": dict(unet=dict(channels=(320, 640, 1280), down=(PLAIN, CROSS, CROSS), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
                           use_linear_projection=True, transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time",
                           addition_time_embed_dim=256, projection_class_embeddings_input_dim=1280 + 6 * 256),
                 text=[(768, 12, 12, "quick_gelu", 768), (1280, 32, 20, "gelu", 1280)], vae=(128, 256, 512, 512), scaling=.13025, sample_size=128),
}
SMALL = {  # the same blocks, narrow: 64 x 64 pixels
    "sd15": dict(FULL["sd15"], unet=dict(FULL["sd15"]["unet"], channels=(8, 16, 16, 16), attention_head_dim=2, cross_attention_dim=32),
                 text=[(32, 2, 2, "quick_gelu", 32)], vae=(8, 8, 16, 16), sample_size=8),
    "sd21": dict(FULL["sd21"], unet=dict(FULL["sd21"]["unet"], channels=(8, 16, 16, 16), attention_head_dim=(1, 2, 2, 2), cross_attention_dim=32),
                 text=[(32, 2, 2, "gelu", 16)], vae=(8, 8, 16, 16), sample_size=8),
    "sdxl": dict(FULL["sdxl"], unet=dict(FULL["sdxl"]["unet"], channels=(8, 16, 16), attention_head_dim=(1, 2, 2), cross_attention_dim=64,
                                         transformer_layers_per_block=(1, 1, 2), addition_time_embed_dim=8,
                                         projection_class_embeddings_input_dim=32 + 6 * 8),
                 text=[(32, 2, 2, "quick_gelu", 32), (32, 2, 2, "gelu", 32)], vae=(8, 8, 16, 16), sample_size=8),
}
CLIP_H = dict(  # transformers' names, of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, PickScore and MPS
    projection_dim=1024,
    text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu", vocab_size=49408,
                     projection_dim=1024),
    vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, hidden_act="gelu", image_size=224,
                       patch_size=14, projection_dim=1024))
OPEN_CLIP = {"hps": "ViT-H-14", "clip": "ViT-B-32-quickgelu", "clip_h": "ViT-H-14"}
VISION = dict(image_size=32, layers=2, width=64, head_width=32, patch_size=8)         # of the small open_clip models; their vocabulary is a fixed one
TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
MEAN_STD = dict(image_mean=[.48145466, .4578275, .40821073], image_std=[.26862954, .26130258, .27577711])


def draw(shapes, seed, dtype=torch.float32):
    """{name: shape} -> {name: tensor}: weights N(0, 1/fan in), norms 1 + N(0, .1^2), biases N(0, .1^2); logit_scale log 100, as CLIPs end up with."""
    g, out = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        x = torch.empty(shape, dtype=dtype).normal_(generator=g)
        if name.endswith("logit_scale"):
            x.fill_(math.log(100))
        elif len(shape) < 2:
            x.mul_(.1).add_(1. if name.endswith("weight") else 0.)
        else:
            x.mul_(math.prod(shape[1:]) ** -.5)
        out[name] = x
    return out


def shapes_of(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def filled(build, seed, dtype):
    """build() on the meta device, then with random weights: no model is ever initialised twice, or held in fp32 if it is fp16."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(draw(shapes_of(module), seed, dtype), assign=True)
    return module.eval()


def clip_tokenizer(full):
    """CLIP's byte-pair tokenizer, from the merges that open_clip brings along; small: the bytes and the first 256 merges."""
    simple = SimpleTokenizer()
    merges = [pair for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda x: x[1])][:None if full else 256]
    tokens = list(simple.encoder)[:512 + len(merges)] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def write_clip_tokenizer(folder, full):
    """vocab.json, merges.txt and tokenizer_config.json, as Stable Diffusion has them (no tokenizer.json); returns the number of tokens."""
    tokenizer = clip_tokenizer(full)
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]) + "\n")
    (folder / "tokenizer.json").unlink()
    return len(tokenizer)


def write_bert_tokenizer(folder, full):
    """A WordPiece of letters with BERT's special tokens at their places ([CLS] 101, [SEP] 102), padded to its 30,522 words or to 200."""
    words = ["[PAD]"] + [f"[unused{i}]" for i in range(99)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [p + c for c in "abcdefghijklmnopqrstuvwxyz" for p in ("", "##")] + list(".,'-0123456789")
    words += [f"[unused{i}]" for i in range(99, 99 + (30522 if full else 200) - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return len(words)


def modules(name, full, vocab_size):
    """{part: function that builds it} of a pipeline's networks."""
    c = (FULL if full else SMALL)[name]
    channels, down = c["unet"]["channels"], c["unet"]["down"]
    unet = {k: v for k, v in c["unet"].items() if k not in ("channels", "down")}
    build = dict(
        unet=lambda: UNet2DConditionModel(
            sample_size=c["sample_size"], block_out_channels=channels, down_block_types=down, norm_num_groups=min(32, channels[0] // 2),
            up_block_types=[x.replace("Down", "Up") for x in reversed(down)], **unet),
        vae=lambda: AutoencoderKL(
            block_out_channels=c["vae"], down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
            norm_num_groups=min(32, c["vae"][0] // 2), sample_size=8 * c["sample_size"], scaling_factor=c["scaling"]))
    for i, (width, layers, heads, act, projection) in enumerate(c["text"]):
        config = CLIPTextConfig(vocab_size=vocab_size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, hidden_act=act,
                                num_attention_heads=heads, projection_dim=projection, bos_token_id=0, eos_token_id=2, pad_token_id=1)
        build["text_encoder" + "_2" * i] = lambda i=i, config=config: (CLIPTextModelWithProjection if i else CLIPTextModel)(config)
    return build


def write_pipeline(name, folder, full, seed):
    """A diffusers folder; small: both the fp32 files and their fp16 variant, as the hub has them."""
    tokenizer = clip_tokenizer(full)
    parts = {part: filled(build, seed + i, torch.float16) for i, (part, build) in enumerate(modules(name, full, len(tokenizer)).items())}
    parts["tokenizer"] = tokenizer
    betas = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1)
    if name == "sdxl":
        pipe = StableDiffusionXLPipeline(**parts, scheduler=EulerDiscreteScheduler(**betas, timestep_spacing="leading"),
                                         tokenizer_2=clip_tokenizer(full), force_zeros_for_empty_prompt=True)
    else:
        pipe = StableDiffusionPipeline(**parts, scheduler=PNDMScheduler(**betas, set_alpha_to_one=False, skip_prk_steps=True), safety_checker=None,
                                       feature_extractor=CLIPImageProcessor(**MEAN_STD), requires_safety_checker=False)
    pipe.save_pretrained(folder, variant="fp16")
    if not full:
        for module in (m for m in pipe.components.values() if isinstance(m, torch.nn.Module)):
            module.float()
        pipe.save_pretrained(folder)
    for part in ("tokenizer", "tokenizer_2")[:len(FULL[name]["text"])]:
        write_clip_tokenizer(folder / part, full)
    if name == "sd15":                                                    # the published index names a safety checker, which nobody may need
        index = json.loads((folder / "model_index.json").read_text())
        index |= dict(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_open_clip(name, folder, full, seed):
    config = open_clip.get_model_config(OPEN_CLIP[name])
    if not full:
        config |= dict(embed_dim=32, vision_cfg=dict(VISION), text_cfg=dict(TEXT))
    if name != "hps" or not full:                                         # HPSv2's place has none: its architecture is known by name
        cfg = dict(model_cfg=config, preprocess_cfg=dict(mean=MEAN_STD["image_mean"], std=MEAN_STD["image_std"]))
        (folder / "open_clip_config.json").write_text(json.dumps(cfg, indent=1) + "\n")
    with torch.device("meta"):
        shapes = shapes_of(open_clip.CLIP(**config))
    if name == "hps":
        torch.save({"state_dict": draw(shapes, seed, torch.float16)}, folder / "HPS_v2.1_compressed.pt")
        return folder / "HPS_v2.1_compressed.pt"
    save_file(draw(shapes, seed), folder / "open_clip_model.safetensors")
    return folder


def clip_h_config(full, vocab_size):
    """transformers' CLIP-H; small: heads as wide as the real ones (80 and 64)."""
    text, vision = dict(CLIP_H["text_config"]), dict(CLIP_H["vision_config"])
    if not full:
        text |= dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=vocab_size, projection_dim=128,
                     bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1)
        vision |= dict(hidden_size=160, intermediate_size=320, num_hidden_layers=2, num_attention_heads=2, image_size=42, projection_dim=128)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024 if full else 128)


def write_processor(folder, full, size):
    CLIPImageProcessor(size=dict(shortest_edge=size), crop_size=dict(height=size, width=size), **MEAN_STD).save_pretrained(folder)
    return write_clip_tokenizer(folder, full)


def write_pick(name, folder, full, seed):
    config = clip_h_config(full, write_processor(folder, full, 224 if full else 42))
    filled(lambda: CLIPModel(config), seed, torch.float32).save_pretrained(folder)
    return folder


def mps_shapes(config):
    """{name: shape} of RE-N-Y/mpsv1's model.safetensors: a CLIP-H under mps.model, four pairs of parallel blocks under mps.cross_model."""
    with torch.device("meta"):
        shapes = {f"mps.model.{k}": v for k, v in shapes_of(CLIPModel(config)).items()}
    d = config.projection_dim
    for layer in range(4):
        cross, own = (f"mps.cross_model.layers.{layer}.{i}.fn." for i in (0, 1))
        shapes |= {cross + "norm.weight": (d,), cross + "norm.bias": (d,), cross + "to_q.weight": (d, d), cross + "to_kv.weight": (128, d),
                   cross + "to_out.weight": (d, d), cross + "ff.0.weight": (8 * d, d), cross + "ff.2.weight": (d, 4 * d),
                   own + "norm.weight": (d,), own + "norm.bias": (d,), own + "fused_attn_ff_proj.weight": (d + 128 + 8 * d, d),
                   own + "attn_out.weight": (d, d), own + "ff_out.1.weight": (d, 4 * d)}
    return shapes


def write_mps(name, folder, full, seed):
    state = draw(mps_shapes(clip_h_config(full, write_processor(folder, full, 224 if full else 42))), seed)
    for k in state:
        if "cross_model" in k and k.endswith("norm.bias"):                # a buffer, not a parameter
            state[k].zero_()
    save_file(state, folder / "model.safetensors")
    return folder


def imagereward_shapes(full, vocab_size):
    """{name: shape} of ImageReward.pt, in BLIP's own names; vocab_size: BERT's words, [DEC] and [ENC]."""
    w, inner, blocks, patch, tokens = (1024, 4096, 24, 16, 197) if full else (192, 256, 2, 16, 5)
    h, h_inner, layers = (768, 3072, 12) if full else (128, 192, 3)
    linear = lambda name, *shape: {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {v + "cls_token": (1, 1, w), v + "pos_embed": (1, tokens, w)}
    shapes |= linear(v + "patch_embed.proj", w, 3, patch, patch) | linear(v + "norm", w)
    for b in (f"{v}blocks.{i}." for i in range(blocks)):
        shapes |= linear(b + "norm1", w) | linear(b + "attn.qkv", 3 * w, w) | linear(b + "attn.proj", w, w) | linear(b + "norm2", w)
        shapes |= linear(b + "mlp.fc1", inner, w) | linear(b + "mlp.fc2", w, inner)
    shapes |= {t + "embeddings.position_ids": (1, 512), t + "embeddings.word_embeddings.weight": (vocab_size, h),
               t + "embeddings.position_embeddings.weight": (512, h), **linear(t + "embeddings.LayerNorm", h)}
    for layer in (f"{t}encoder.layer.{i}." for i in range(layers)):
        for a, source in (("attention.", h), ("crossattention.", w)):
            shapes |= linear(layer + a + "self.query", h, h) | linear(layer + a + "self.key", h, source) | linear(layer + a + "self.value", h, source)
            shapes |= linear(layer + a + "output.dense", h, h) | linear(layer + a + "output.LayerNorm", h)
        shapes |= linear(layer + "intermediate.dense", h_inner, h) | linear(layer + "output.dense", h, h_inner) | linear(layer + "output.LayerNorm", h)
    shapes |= linear("blip.vision_proj", 256, w) | linear("blip.text_proj", 256, h)
    for i, out, source in ((0, 1024, h), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        shapes |= linear(f"mlp.layers.{i}", out, source)
    return shapes


def write_imagereward(name, folder, full, seed):
    state = draw(imagereward_shapes(full, write_bert_tokenizer(folder, full) + 2), seed)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, folder / "ImageReward.pt")
    return folder


WRITERS = {**dict.fromkeys(FULL, write_pipeline), **dict.fromkeys(OPEN_CLIP, write_open_clip), "pick": write_pick, "imagereward": write_imagereward,
           "mps": write_mps}


def write(name, out, full=False, seed=0):
    """Writes OUT/NAME and returns what --model takes, or --reward after "NAME:", as a string."""
    folder = Path(out) / name
    folder.mkdir(parents=True, exist_ok=True)
    return str(WRITERS[name](name, folder, full, seed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("names", nargs="+", choices=list(WRITERS), metavar="NAME", help=", ".join(WRITERS))
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--full", action="store_true", help="the published sizes: 1 to 7 GB each")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    args = parser.parse_args()
    for name in args.names:
        path = write(name, args.out, args.full, args.seed)
        print(f"--model {path}" if name in FULL else f"--reward {name}:{path}")
