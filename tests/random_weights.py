"""Random weights in the layouts in which the real ones are published, and how those are read.

File names, keys, nesting and precision are the published ones, so that the code that loads the
real weights can be tested without them.

  $ python tests/random_weights.py sd15 hps --out weights            # small: a few MB each
  $ python tests/random_weights.py sd15 hps --out weights --full     # the published sizes: GBs

Each is written to OUT/NAME, and the command prints what to pass to --model or --reward. Where the
real code would look for a tokenizer elsewhere on the hub, it is put beside the weights. Full-size
pipelines come only as their fp16 variant.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers import PNDMScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from torchvision.transforms import InterpolationMode
from transformers import AutoTokenizer, BertTokenizer, CLIPConfig, CLIPImageProcessor
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers import CLIPTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, T5Config
from transformers import T5EncoderModel, T5Tokenizer, ViTConfig, ViTModel

transformers.logging.disable_progress_bar()

CROSS = "CrossAttnDownBlock2D"
PLAIN = "DownBlock2D"
# The configurations of the published pipelines. text: width, layers, heads, activation and
# projection of each text encoder.
FULL = {
    "sd15": dict(
        unet=dict(
            channels=(320, 640, 1280, 1280), down=(CROSS, CROSS, CROSS, PLAIN),
            attention_head_dim=8, cross_attention_dim=768,
        ),
        text=[(768, 12, 12, "quick_gelu", 768)],
        vae=(128, 256, 512, 512), scaling=0.18215, sample_size=64,
    ),
    "sd21": dict(
        unet=dict(
            channels=(320, 640, 1280, 1280), down=(CROSS, CROSS, CROSS, PLAIN),
            attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
            use_linear_projection=True,
        ),
        text=[(1024, 23, 16, "gelu", 512)],
        vae=(128, 256, 512, 512), scaling=0.18215, sample_size=64,
    ),
    "sdxl": dict(
        unet=dict(
            channels=(320, 640, 1280), down=(PLAIN, CROSS, CROSS),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
            use_linear_projection=True, transformer_layers_per_block=(1, 2, 10),
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=1280 + 6 * 256,
        ),
        text=[(768, 12, 12, "quick_gelu", 768), (1280, 32, 20, "gelu", 1280)],
        vae=(128, 256, 512, 512), scaling=0.13025, sample_size=128,
    ),
}


def narrow(name, text, **unet):
    """The same blocks as in FULL, narrow, for 64 x 64 pixels."""
    unet = {**FULL[name]["unet"], **unet}
    return {**FULL[name], "unet": unet, "text": text, "vae": (8, 8, 16, 16), "sample_size": 8}


SMALL = {
    "sd15": narrow(
        "sd15", [(32, 2, 2, "quick_gelu", 32)],
        channels=(8, 16, 16, 16), attention_head_dim=2, cross_attention_dim=32,
    ),
    "sd21": narrow(
        "sd21", [(32, 2, 2, "gelu", 16)],
        channels=(8, 16, 16, 16), attention_head_dim=(1, 2, 2, 2), cross_attention_dim=32,
    ),
    "sdxl": narrow(
        "sdxl", [(32, 2, 2, "quick_gelu", 32), (32, 2, 2, "gelu", 32)],
        channels=(8, 16, 16), attention_head_dim=(1, 2, 2), cross_attention_dim=64,
        transformer_layers_per_block=(1, 1, 2), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    ),
}
# The flows. transformer: what differs from the defaults of diffusers' class.
NO_QUANT = dict(use_quant_conv=False, use_post_quant_conv=False)
FLOWS = {
    "sd35": dict(
        transformer=dict(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ),
        text=FULL["sdxl"]["text"],
        t5=dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128),
        vae=(128, 256, 512, 512), scaling=1.5305, sample_size=128,
        vae_options=dict(latent_channels=16, shift_factor=0.0609, **NO_QUANT),
    ),
    "z-image": dict(
        transformer=dict(axes_lens=[1536, 512, 512]),
        qwen=dict(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936,
        ),
        vae=(128, 256, 512, 512), scaling=0.3611, sample_size=128,
        vae_options=dict(latent_channels=16, shift_factor=0.1159, **NO_QUANT),
    ),
}
SMALL_FLOWS = {
    "sd35": dict(
        FLOWS["sd35"],
        transformer=dict(
            sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=64, caption_projection_dim=16, pooled_projection_dim=64,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        text=SMALL["sdxl"]["text"],
        t5=dict(d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=512),
        vae=(8, 8, 16, 16), sample_size=8,
    ),
    "z-image": dict(
        FLOWS["z-image"],
        transformer=dict(
            dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
            axes_dims=[4, 6, 6], axes_lens=[600, 16, 16],
        ),
        qwen=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, vocab_size=512,
        ),
        vae=(8, 8, 16, 16), sample_size=8,
    ),
}
# laion/CLIP-ViT-H-14-laion2B-s32B-b79K in transformers' names: PickScore and MPS.
CLIP_H_TEXT = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    hidden_act="gelu", vocab_size=49408, projection_dim=1024,
)
CLIP_H_VISION = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
    hidden_act="gelu", image_size=224, patch_size=14, projection_dim=1024,
)
# openai/clip-vit-large-patch14: the aesthetic predictor.
CLIP_L_TEXT = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    hidden_act="quick_gelu", vocab_size=49408, projection_dim=768,
)
CLIP_L_VISION = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    hidden_act="quick_gelu", image_size=224, patch_size=14, projection_dim=768,
)
OPEN_CLIP = {"hps": "ViT-H-14", "clip": "ViT-B-32-quickgelu", "clip_h": "ViT-H-14"}
# The small open_clip models. Their vocabulary is a fixed one.
VISION = dict(image_size=32, layers=2, width=64, head_width=32, patch_size=8)
TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
# The published name of each judge's file.
FILES = {
    "hps": "HPS_v2.1_compressed.pt",
    "clip": "open_clip_model.safetensors",
    "clip_h": "open_clip_model.safetensors",
    "pick": "model.safetensors",
    "imagereward": "ImageReward.pt",
    "mps": "model.safetensors",
    "aesthetic": "aesthetic-model.pth",
}


# --------------------------------------------------------------------------------------------------
# Tensors and files


def draw(shapes, seed, dtype=torch.float32):
    """{name: shape} -> {name: tensor}.

    Weights are N(0, 1 / fan in), norms 1 + N(0, 0.01), biases N(0, 0.01), and logit_scale is
    log 100, where the real CLIPs end up.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        x = torch.empty(shape, dtype=dtype).normal_(generator=generator)
        if name.endswith("logit_scale"):
            x.fill_(math.log(100))
        elif len(shape) >= 2:
            x.mul_(math.prod(shape[1:]) ** -0.5)
        else:
            x.mul_(0.1)
            if name.endswith("weight"):
                x.add_(1.0)
        state[name] = x
    return state


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def filled(build, seed, dtype):
    """build() on the meta device, then with random weights, so that nothing is drawn twice."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(draw(shapes_of(module), seed, dtype), assign=True)
    return module.eval()


def read_state(path):
    """A file of weights -> {name: fp32 tensor}, copied so that the file may be written again."""
    if Path(path).suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    state = state.get("state_dict", state)
    return {name: tensor.clone().float() for name, tensor in state.items()}


def write_state(state, path):
    if Path(path).suffix == ".safetensors":
        save_file(state, path, {"format": "pt"})
    else:
        torch.save({"state_dict": state}, path)


def clip_tokenizer(full):
    """CLIP's tokenizer, from the merges that open_clip holds; small: the first 256 merges."""
    simple = SimpleTokenizer()
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.get)
    if not full:
        merges = merges[:256]
    tokens = list(simple.encoder)[: 512 + len(merges)] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def write_clip_tokenizer(folder, full):
    """Writes the files that Stable Diffusion has -> the number of tokens."""
    tokenizer = clip_tokenizer(full)
    tokenizer.save_pretrained(folder)
    # vocab.json and merges.txt, in place of the newer tokenizer.json.
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").unlink()
    return len(tokenizer)


def write_bert_tokenizer(folder, full):
    """A WordPiece of letters, with BERT's special tokens at their places -> number of words."""
    words = ["[PAD]"] + [f"[unused{i}]" for i in range(99)]
    words += ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for letter in "abcdefghijklmnopqrstuvwxyz":
        words += [letter, "##" + letter]
    words += list(".,'-0123456789")
    missing = (30522 if full else 200) - len(words)
    words += [f"[unused{i}]" for i in range(99, 99 + missing)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return len(words)


# --------------------------------------------------------------------------------------------------
# Pipelines


def build_unet(config):
    options = dict(config["unet"])
    channels = options.pop("channels")
    down = options.pop("down")
    return UNet2DConditionModel(
        sample_size=config["sample_size"],
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=[block.replace("Down", "Up") for block in reversed(down)],
        norm_num_groups=min(32, channels[0] // 2),
        **options,
    )


def build_vae(config):
    return AutoencoderKL(
        block_out_channels=config["vae"],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=min(32, config["vae"][0] // 2),
        sample_size=8 * config["sample_size"],
        scaling_factor=config["scaling"],
        **config.get("vae_options", {}),
    )


def build_text_encoder(row, vocab_size, projected):
    width, layers, heads, activation, projection = row
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def modules(name, full, vocab_size):
    """{part: function that builds it} of a pipeline's networks."""
    config = (FULL if full else SMALL)[name]
    build = dict(unet=lambda: build_unet(config), vae=lambda: build_vae(config))
    build["text_encoder"] = lambda: build_text_encoder(config["text"][0], vocab_size, False)
    if len(config["text"]) == 2:
        build["text_encoder_2"] = lambda: build_text_encoder(config["text"][1], vocab_size, True)
    return build


def write_pipeline(name, folder, full, seed):
    """A diffusers folder. A small one has both the fp32 files and their fp16 variant."""
    tokenizer = clip_tokenizer(full)
    parts = dict(tokenizer=tokenizer)
    for i, (part, build) in enumerate(modules(name, full, len(tokenizer)).items()):
        parts[part] = filled(build, seed + i, torch.float16)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    if name == "sdxl":
        parts["scheduler"] = EulerDiscreteScheduler(**betas, timestep_spacing="leading")
        parts["tokenizer_2"] = clip_tokenizer(full)
        pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
    else:
        scheduler = PNDMScheduler(**betas, set_alpha_to_one=False, skip_prk_steps=True)
        processor = CLIPImageProcessor(image_mean=MEAN, image_std=STD)
        parts.update(scheduler=scheduler, feature_extractor=processor, safety_checker=None)
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(folder, variant="fp16")
    if not full:
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.float()
        pipe.save_pretrained(folder)
    write_clip_tokenizer(folder / "tokenizer", full)
    if name == "sdxl":
        write_clip_tokenizer(folder / "tokenizer_2", full)
    if name == "sd15":
        # The published index names a safety checker, which nobody may need.
        index = json.loads((folder / "model_index.json").read_text())
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["requires_safety_checker"] = True
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def flow_modules(name, full, vocab_size):
    """{part: function that builds it} of the networks of "sd35" or "z-image".

    vocab_size: CLIP's.
    """
    config = (FLOWS if full else SMALL_FLOWS)[name]
    build = dict(vae=lambda: build_vae(config))
    if name == "z-image":
        build["transformer"] = lambda: ZImageTransformer2DModel(**config["transformer"])
        # The text encoder is published with its head, which shares the embeddings' weights.
        build["text_encoder"] = lambda: Qwen3ForCausalLM(
            Qwen3Config(**config["qwen"], tie_word_embeddings=True)
        )
        return build
    build["transformer"] = lambda: SD3Transformer2DModel(**config["transformer"])
    build["text_encoder"] = lambda: build_text_encoder(config["text"][0], vocab_size, True)
    build["text_encoder_2"] = lambda: build_text_encoder(config["text"][1], vocab_size, True)
    build["text_encoder_3"] = lambda: T5EncoderModel(
        T5Config(**config["t5"], feed_forward_proj="gated-gelu")
    )
    return build


def letter_tokens(num_tokens):
    """Single characters, as byte-level BPE and SentencePiece write them, and words to fill up."""
    letters = [chr(code) for code in range(33, 127)] + ["\u0120", "\u2581"]
    return letters + [f"<unused{i}>" for i in range(num_tokens - len(letters))]


def write_flow(name, folder, full, seed):
    """A diffusers folder. As published, only SD3.5's text encoders have an fp16 variant."""
    tokenizer = clip_tokenizer(full)
    dtype = torch.bfloat16 if name == "z-image" else torch.float16
    parts = {}
    for i, (part, build) in enumerate(flow_modules(name, full, len(tokenizer)).items()):
        parts[part] = filled(build, seed + i, dtype)
    config = (FLOWS if full else SMALL_FLOWS)[name]
    # Full-size weights come in several files, and so do the small T5's.
    shards = dict(max_shard_size="5GB" if full else "200KB")

    if name == "z-image":
        tokens = letter_tokens(int(0.95 * config["qwen"]["vocab_size"]))
        qwen_tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate(tokens)}, [])
        qwen_tokenizer.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
            "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
        )
        causal = parts["text_encoder"]
        causal.tie_weights()
        parts.update(text_encoder=causal.model, tokenizer=qwen_tokenizer)
        pipe = ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), **parts)
        pipe.save_pretrained(folder, **shards)
        shutil.rmtree(folder / "text_encoder")
        causal.save_pretrained(folder / "text_encoder", **shards)
        return folder

    # The tokenizer itself adds 100 more.
    num_tokens = int(0.95 * config["t5"]["vocab_size"]) - 100
    tokens = ["<pad>", "</s>", "<unk>", *letter_tokens(num_tokens)]
    t5_tokenizer = T5Tokenizer([(token, -2.0) for token in tokens], model_max_length=512)
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(full),
        tokenizer_3=t5_tokenizer,
        **parts,
    )
    pipe.save_pretrained(folder, variant="fp16", **shards)
    for part in ("transformer", "vae"):
        shutil.rmtree(folder / part)
        parts[part].save_pretrained(folder / part)
    write_clip_tokenizer(folder / "tokenizer", full)
    write_clip_tokenizer(folder / "tokenizer_2", full)
    return folder


# --------------------------------------------------------------------------------------------------
# Judges built on CLIP


def write_open_clip(name, folder, full, seed):
    config = open_clip.get_model_config(OPEN_CLIP[name])
    if not full:
        config.update(embed_dim=32, vision_cfg=dict(VISION), text_cfg=dict(TEXT))
    # HPSv2's place on the hub has no configuration: its architecture is known by name.
    if name != "hps" or not full:
        content = dict(model_cfg=config, preprocess_cfg=dict(mean=MEAN, std=STD))
        text = json.dumps(content, indent=1) + "\n"
        (folder / "open_clip_config.json").write_text(text)
    with torch.device("meta"):
        shapes = shapes_of(open_clip.CLIP(**config))
    path = folder / FILES[name]
    if name == "hps":
        write_state(draw(shapes, seed, torch.float16), path)
        return path
    write_state(draw(shapes, seed), path)
    return folder


def clip_h_config(full, vocab_size):
    """transformers' CLIP-H. The heads of the small one are as wide as the real ones: 80 and 64."""
    if full:
        return CLIPConfig(
            text_config=dict(CLIP_H_TEXT), vision_config=dict(CLIP_H_VISION), projection_dim=1024
        )
    small = dict(num_hidden_layers=2, num_attention_heads=2, projection_dim=128)
    text = {**CLIP_H_TEXT, **small, "hidden_size": 128, "intermediate_size": 256}
    text.update(vocab_size=vocab_size, bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1)
    vision = {**CLIP_H_VISION, **small, "hidden_size": 160, "intermediate_size": 320}
    vision["image_size"] = 42
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)


def write_processor(folder, full):
    """A preprocessor and tokenizer of CLIP -> the number of tokens."""
    size = 224 if full else 42
    processor = CLIPImageProcessor(
        size=dict(shortest_edge=size),
        crop_size=dict(height=size, width=size),
        image_mean=MEAN,
        image_std=STD,
    )
    processor.save_pretrained(folder)
    return write_clip_tokenizer(folder, full)


def write_pick(name, folder, full, seed):
    config = clip_h_config(full, write_processor(folder, full))
    filled(lambda: CLIPModel(config), seed, torch.float32).save_pretrained(folder)
    return folder


def clip_l_config(full):
    """OpenAI's ViT-L/14. The features of the small one are as wide as the real ones: 768."""
    text = dict(CLIP_L_TEXT)
    vision = dict(CLIP_L_VISION)
    if not full:
        small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        text.update(small, num_attention_heads=2, vocab_size=99)
        vision.update(small, num_attention_heads=2, image_size=42)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)


def write_aesthetic(name, folder, full, seed):
    """The MLP, and beside it a whole CLIP with the text encoder that it does not need."""
    filled(lambda: CLIPModel(clip_l_config(full)), seed, torch.float32).save_pretrained(folder)
    shapes = {}
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    for i, shape in sizes.items():  # dropout lies between the others
        shapes[f"layers.{i}.weight"] = shape
        shapes[f"layers.{i}.bias"] = shape[:1]
    state = draw(shapes, seed)
    # The features have length 1, so this gives scores that differ by about 1.
    state["layers.0.weight"] *= 768**0.5
    torch.save(state, folder / FILES[name])
    return folder


@torch.no_grad()
def aesthetic_scores(folder, pixels):
    """The aesthetic predictor (B,) of normalized pixels (B, 3, H, W), with a folder's weights."""
    state = read_state(folder / FILES["aesthetic"])
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    x = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    return x[:, 0]


def mps_shapes(config):
    """{name: shape} of RE-N-Y/mpsv1: a CLIP-H, and four pairs of parallel blocks."""
    with torch.device("meta"):
        clip_shapes = shapes_of(CLIPModel(config))
    shapes = {f"mps.model.{name}": shape for name, shape in clip_shapes.items()}
    d = config.projection_dim
    cross = {
        "norm.weight": (d,),
        "norm.bias": (d,),
        "to_q.weight": (d, d),
        "to_kv.weight": (128, d),
        "to_out.weight": (d, d),
        "ff.0.weight": (8 * d, d),
        "ff.2.weight": (d, 4 * d),
    }
    own = {
        "norm.weight": (d,),
        "norm.bias": (d,),
        "fused_attn_ff_proj.weight": (d + 128 + 8 * d, d),
        "attn_out.weight": (d, d),
        "ff_out.1.weight": (d, 4 * d),
    }
    for layer in range(4):
        for i, part in enumerate((cross, own)):
            for name, shape in part.items():
                shapes[f"mps.cross_model.layers.{layer}.{i}.fn.{name}"] = shape
    return shapes


def write_mps(name, folder, full, seed):
    config = clip_h_config(full, write_processor(folder, full))
    state = draw(mps_shapes(config), seed)
    for key, tensor in state.items():
        # This one is a buffer of zeros, not a parameter.
        if "cross_model" in key and key.endswith("norm.bias"):
            tensor.zero_()
    save_file(state, folder / FILES[name])
    return folder


# --------------------------------------------------------------------------------------------------
# ImageReward


def imagereward_shapes(full, vocab_size):
    """{name: shape} of ImageReward.pt. vocab_size: BERT's words, [DEC] and [ENC]."""
    vision_sizes = (192, 256, 2, 5)
    text_sizes = (128, 192, 3)
    if full:
        vision_sizes = (1024, 4096, 24, 197)
        text_sizes = (768, 3072, 12)
    width, inner_width, num_blocks, num_positions = vision_sizes
    hidden, inner_hidden, num_layers = text_sizes
    start = "blip.visual_encoder."
    shapes = {start + "cls_token": (1, 1, width), start + "pos_embed": (1, num_positions, width)}

    def linear(name, *shape):
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    linear(start + "patch_embed.proj", width, 3, 16, 16)
    linear(start + "norm", width)
    for i in range(num_blocks):
        block = f"{start}blocks.{i}."
        linear(block + "norm1", width)
        linear(block + "attn.qkv", 3 * width, width)
        linear(block + "attn.proj", width, width)
        linear(block + "norm2", width)
        linear(block + "mlp.fc1", inner_width, width)
        linear(block + "mlp.fc2", width, inner_width)

    start = "blip.text_encoder."
    shapes[start + "embeddings.position_ids"] = (1, 512)
    shapes[start + "embeddings.word_embeddings.weight"] = (vocab_size, hidden)
    shapes[start + "embeddings.position_embeddings.weight"] = (512, hidden)
    linear(start + "embeddings.LayerNorm", hidden)
    for i in range(num_layers):
        layer = f"{start}encoder.layer.{i}."
        for part, source_width in (("attention.", hidden), ("crossattention.", width)):
            linear(layer + part + "self.query", hidden, hidden)
            linear(layer + part + "self.key", hidden, source_width)
            linear(layer + part + "self.value", hidden, source_width)
            linear(layer + part + "output.dense", hidden, hidden)
            linear(layer + part + "output.LayerNorm", hidden)
        linear(layer + "intermediate.dense", inner_hidden, hidden)
        linear(layer + "output.dense", hidden, inner_hidden)
        linear(layer + "output.LayerNorm", hidden)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, hidden)
    sizes = (hidden, 1024, 128, 64, 16, 1)
    for k, i in enumerate((0, 2, 4, 6, 7)):
        linear(f"mlp.layers.{i}", sizes[k + 1], sizes[k])
    return shapes


def write_imagereward(name, folder, full, seed):
    vocab_size = write_bert_tokenizer(folder, full) + 2
    state = draw(imagereward_shapes(full, vocab_size), seed)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, folder / FILES[name])
    return folder


# --------------------------------------------------------------------------------------------------
# A feature extractor for --dino of evaluate.py


def write_vit(folder):
    """A small random ViT with facebook/dino-vits16's file names, for images of 48 x 48 pixels.

    Its own pooler is saved as well, which the features do not need.
    """
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ViTModel(ViTConfig(**sizes, image_size=48, patch_size=16))
        for p in network.parameters():
            p.data += 0.2 * torch.randn_like(p)
    network.save_pretrained(folder)
    processor = dict(size=48, resample=2, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@torch.no_grad()
def vit_feature(folder, image):
    """The normalized CLS token (D,) of one image (3, H, W) in [0, 1], squashed to 8-bit pixels."""
    pixels = (255 * image[None]).round().to(torch.uint8)
    x = T.Resize((48, 48), InterpolationMode.BILINEAR, antialias=True)(pixels) / 255
    x = T.Normalize([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])(x)
    network = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    return F.normalize(network(x).last_hidden_state[0, 0], dim=0)


# --------------------------------------------------------------------------------------------------
# The published preprocessing and equations in plain torch, for the tests of rewards.py


def crop(images, size):
    """torchvision's own resize, center crop and normalization."""
    resize = T.Resize(size, InterpolationMode.BICUBIC, antialias=True)
    return T.Compose([resize, T.CenterCrop(size), T.Normalize(MEAN, STD)])(images)


def pad(images, size):
    """HPS's own preprocessing: the long side is resized, and black bars fill the square."""
    scale = size / max(images.shape[-2:])
    new_size = [round(side * scale) for side in images.shape[-2:]]
    images = T.Resize(new_size, InterpolationMode.BICUBIC, antialias=True)(images)
    top, left = [(size - side) // 2 for side in new_size]
    bars = (left, top, size - new_size[1] - left, size - new_size[0] - top)
    return T.Normalize(MEAN, STD)(T.Pad(bars)(images))


def norm(state, name, x, eps):
    weight = state[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], eps)


def dense(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attention(q, k, v, heads, bias=0.0):
    """softmax(q k' / sqrt(d) + bias) v for (B, N, heads * d) and (B, M, heads * d)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weight = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return (weight @ v).transpose(1, 2).flatten(2)


def blip_vision(state, pixels, eps=1e-6):
    """Normalized pixels (B, 3, H, W) -> the states (B, tokens, D) of a small ImageReward."""
    start = "blip.visual_encoder."
    patches = state[start + "patch_embed.proj.weight"], state[start + "patch_embed.proj.bias"]
    x = F.conv2d(pixels, *patches, stride=16).flatten(2).mT
    cls_token = state[start + "cls_token"].expand(len(x), 1, -1)
    x = torch.cat([cls_token, x], 1) + state[start + "pos_embed"]
    for i in range(2):
        block = f"{start}blocks.{i}."
        qkv = dense(state, block + "attn.qkv", norm(state, block + "norm1", x, eps))
        x = x + dense(state, block + "attn.proj", attention(*qkv.chunk(3, -1), heads=3))
        inner = dense(state, block + "mlp.fc1", norm(state, block + "norm2", x, eps))
        x = x + dense(state, block + "mlp.fc2", F.gelu(inner))
    return norm(state, start + "norm", x, eps)


def imagereward_scores(folder, pixels, prompts, eps=1e-6, masked=True):
    """The output (B,) of the MLP of a small ImageReward, for normalized pixels (B, 3, H, W).

    eps (of the vision encoder) and masked are settings that are easy to get wrong.
    """
    state = read_state(folder / FILES["imagereward"])
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompts, padding="max_length", max_length=35, return_tensors="pt")
    ids = tokens.input_ids
    mask = tokens.attention_mask if masked else torch.ones_like(ids)
    image = blip_vision(state, pixels, eps)
    start = "blip.text_encoder."
    x = state[start + "embeddings.word_embeddings.weight"][ids]
    x = x + state[start + "embeddings.position_embeddings.weight"][:35]
    x = norm(state, start + "embeddings.LayerNorm", x, 1e-12)
    text_bias = (1 - mask.float())[:, None, None] * -1e9
    for i in range(3):
        layer = f"{start}encoder.layer.{i}."
        for part in ("attention.", "crossattention."):
            source = x if part == "attention." else image
            bias = text_bias if part == "attention." else 0.0
            q = dense(state, layer + part + "self.query", x)
            k = dense(state, layer + part + "self.key", source)
            v = dense(state, layer + part + "self.value", source)
            out = dense(state, layer + part + "output.dense", attention(q, k, v, 2, bias))
            x = norm(state, layer + part + "output.LayerNorm", x + out, 1e-12)
        inner = F.gelu(dense(state, layer + "intermediate.dense", x))
        out = dense(state, layer + "output.dense", inner)
        x = norm(state, layer + "output.LayerNorm", x + out, 1e-12)
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = dense(state, f"mlp.layers.{i}", x)
    return x[:, 0]


def mps_weights(state, layer, i):
    """The weights of one part of a layer: i = 0 attends to the text, i = 1 to the image."""
    start = f"mps.cross_model.layers.{layer}.{i}.fn."
    return {key.removeprefix(start): state[key] for key in state if key.startswith(start)}


def layer_norm(x, weight):
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * weight


def swiglu(x):
    a, gate = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * a


def rotary(x):
    """Rotary positions for one head (N, 64)."""
    frequencies = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
    angle = torch.outer(torch.arange(len(x)).float(), frequencies).repeat(1, 2)
    return x * angle.cos() + torch.cat([-x[:, 32:], x[:, :32]], 1) * angle.sin()


def mps_score(state, clip, text, condition, end, pixels, threshold):
    """MPS of one image (1, 3, H, W), from features of text and condition (77, D), and end (D,)."""
    closeness = (text @ condition.T).max(1).values
    bias = torch.where(closeness / closeness.max() > threshold, 0.0, -torch.inf)
    # A good test has text tokens of both kinds.
    assert 0 < (bias == 0).sum() < 77
    x = clip.vision_model(pixels).last_hidden_state[0] @ clip.visual_projection.weight.T
    width = x.shape[1]
    for layer in range(4):
        w = mps_weights(state, layer, 0)
        h = layer_norm(x, w["norm.weight"])
        q = h @ w["to_q.weight"].T
        k, v = (text @ w["to_kv.weight"].T).chunk(2, 1)
        heads = [(part @ k.T / 8 + bias).softmax(1) @ v for part in q.split(64, 1)]
        x = x + torch.cat(heads, 1) @ w["to_out.weight"].T
        x = x + swiglu(h @ w["ff.0.weight"].T) @ w["ff.2.weight"].T
        w = mps_weights(state, layer, 1)
        fused = layer_norm(x, w["norm.weight"]) @ w["fused_attn_ff_proj.weight"].T
        q, k, v, ff = fused.split([width, 64, 64, 8 * width], 1)
        heads = [(rotary(part) @ rotary(k).T / 8).softmax(1) @ v for part in q.split(64, 1)]
        x = x + torch.cat(heads, 1) @ w["attn_out.weight"].T
        x = x + swiglu(ff) @ w["ff_out.1.weight"].T
    return clip.logit_scale.exp() * F.cosine_similarity(end, x[0], dim=0)


def mps_token_ids(folder, prompts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return tokenizer(prompts, **options).input_ids


def separate_mps_words(folder, prompts, condition):
    """Moves words that the condition lacks away from it, so that they may not be attended.

    Every other word moves less far, to where the threshold decides.
    """
    state = read_state(folder / FILES["mps"])
    words = state["mps.model.text_model.embeddings.token_embedding.weight"]
    known = set(mps_token_ids(folder, [condition]).flatten().tolist())
    ids = set(mps_token_ids(folder, prompts).flatten().tolist())
    shift = 2 * torch.randn(words.shape[1], generator=torch.Generator().manual_seed(0))
    words += shift
    others = sorted(ids - known)
    words[others[::2]] -= 2 * shift
    words[others[1::2]] -= 1.1 * shift
    write_state(state, folder / FILES["mps"])


def mps_scores(folder, pixels, prompts, condition, threshold=0.01):
    """MPS (B,) of normalized pixels (B, 3, H, W), with the small weights of a folder."""
    state = read_state(folder / FILES["mps"])
    clip_state = {}
    for key, tensor in state.items():
        if key.startswith("mps.model."):
            clip_state[key.removeprefix("mps.model.")] = tensor
    ids = mps_token_ids(folder, [*prompts, condition])
    vocab_size = len(clip_state["text_model.embeddings.token_embedding.weight"])
    clip = CLIPModel(clip_h_config(False, vocab_size)).eval()
    clip.load_state_dict(clip_state)
    text = clip.text_model(ids).last_hidden_state @ clip.text_projection.weight.T
    scores = []
    for i in range(len(prompts)):
        end = text[i, ids[i].argmax()]
        features = (text[i], text[-1], end)
        scores.append(mps_score(state, clip, *features, pixels[i : i + 1], threshold))
    return torch.stack(scores)


# --------------------------------------------------------------------------------------------------

WRITERS = {
    "sd15": write_pipeline,
    "sd21": write_pipeline,
    "sdxl": write_pipeline,
    "sd35": write_flow,
    "z-image": write_flow,
    "hps": write_open_clip,
    "clip": write_open_clip,
    "clip_h": write_open_clip,
    "pick": write_pick,
    "imagereward": write_imagereward,
    "mps": write_mps,
    "aesthetic": write_aesthetic,
}


def write(name, out, full=False, seed=0):
    """Writes OUT/NAME -> what --model takes, or --reward after "NAME:", as a string."""
    folder = Path(out) / name
    folder.mkdir(parents=True, exist_ok=True)
    return str(WRITERS[name](name, folder, full, seed))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="+", choices=list(WRITERS), metavar="NAME", help=", ".join(WRITERS))
    add("--out", required=True, help="folder to write to")
    add("--full", action="store_true", help="the published sizes: 1 to 21 GB each")
    add("--seed", type=int, default=0, help="the random seed")
    args = parser.parse_args()
    for name in args.names:
        path = write(name, args.out, args.full, args.seed)
        if name in (*FULL, *FLOWS):
            print(f"--model {path}")
        else:
            print(f"--reward {name}:{path}")


if __name__ == "__main__":
    main()
