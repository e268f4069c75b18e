"""Helpers and fixtures for all tests: tiny random models, small files, and script runs.

No test reads or writes the working folder. Each runs in its own folder.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# The tests never contact the hub, even if there is a network.
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel
from transformers import CLIPTextModelWithProjection, Qwen3Config, Qwen3Model, T5Config
from transformers import T5EncoderModel

import judges.clip
import judges.imagereward
import judges.mps
from common import generator
from run_folder import readable_errors, to_pil

CPU = torch.device("cpu")
PROMPTS = [
    "a red circle",
    "a blue square above a green circle",
    "a yellow triangle",
    "a purple square",
]
TEXT_WIDTH = 16
TEXT_CONFIG = dict(
    vocab_size=79,
    hidden_size=TEXT_WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
    projection_dim=TEXT_WIDTH,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
NO_QUANT = dict(use_quant_conv=False, use_post_quant_conv=False)  # for tiny_vae


# --------------------------------------------------------------------------------------------------
# Tiny random pipelines of 16 x 16 pixels, whose latents are 4 x 8 x 8


def write_sd(folder, family="sd", prediction_type="epsilon", seed=0):
    """Writes a random "sd" or "sdxl" pipeline in the diffusers format -> its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extra = {}
        if family == "sdxl":
            # Pooled text and six sizes of 8 channels each go into the time embedding.
            extra = dict(
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
            )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * TEXT_WIDTH if family == "sdxl" else TEXT_WIDTH,
            use_linear_projection=family == "sdxl",
            **extra,
        )
        vae = tiny_vae(scaling_factor=0.5)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "sd" / "tokenizer")
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        )
        parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
        parts.update(scheduler=scheduler, feature_extractor=None)
        if family == "sdxl":
            text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_CONFIG))
            parts.update(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer)
            pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
        else:
            pipe = StableDiffusionPipeline(
                **parts, safety_checker=None, requires_safety_checker=False
            )
        randomize(pipe)
    pipe.save_pretrained(folder)
    return str(folder)


def write_flux(folder, dev=False, seed=0):
    """Writes a random FLUX pipeline in the form of schnell or dev -> its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6),
        )
        vae = tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT)
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "sd" / "tokenizer")
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev
        )
        pipe = FluxPipeline(
            scheduler=scheduler,
            vae=vae,
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG)),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5(TEXT_WIDTH),
            tokenizer_2=tokenizer,
            transformer=transformer,
        )
        randomize(pipe)
    pipe.save_pretrained(folder)
    return str(folder)


def write_sd35(folder, with_t5=True, seed=0):
    """Writes a random SD3.5 pipeline -> its folder. T5's states are as wide as both CLIPs'."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "sd" / "tokenizer")
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_CONFIG)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_CONFIG)),
            tokenizer_2=tokenizer,
            text_encoder_3=tiny_t5(2 * TEXT_WIDTH) if with_t5 else None,
            tokenizer_3=tokenizer if with_t5 else None,
        )
        randomize(pipe)
    pipe.save_pretrained(folder)
    return str(folder)


def write_z_image(folder, seed=0):
    """Writes a random Z-Image pipeline -> its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[600, 16, 16],
        )
        qwen_config = Qwen3Config(
            vocab_size=79,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=1,
        )
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "sd" / "tokenizer")
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT),
            text_encoder=Qwen3Model(qwen_config),
            tokenizer=tokenizer,
            transformer=transformer,
        )
        randomize(pipe)
    pipe.save_pretrained(folder)
    return str(folder)


def tiny_t5(width):
    config = T5Config(
        vocab_size=79,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=1,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def tiny_vae(**options):
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )


def randomize(pipe):
    """Perturbs every weight, so that no weight is zero and no norm is the identity."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                p.data += 0.05 * torch.randn_like(p)
    # CLIP's own initialization is so small that all prompts would look the same.
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            for p in part.parameters():
                p.data *= 3


# --------------------------------------------------------------------------------------------------
# Fixtures


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, on one thread. More do not help such small networks."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(root):
    """Writes small files that many tests use -> their paths, as strings:

    sd, sd_v, sdxl, flux, flux_dev, sd35, z_image   tiny random models
    prompts, one                     text files with the four PROMPTS, and with the first of them
    images                           a folder with four random images of 16 x 16 pixels
    items                            D-Fusion's JSON with one prompt, two items and thresholds
    labelled                         six random images with random maps, in DiffDoctor's format
    """
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (root / "one.txt").write_text(PROMPTS[0] + "\n")
    (root / "images").mkdir()
    lines = []
    for i, prompt in enumerate(PROMPTS):
        pixels = torch.rand(3, 16, 16, generator=generator(0, "image", i))
        to_pil(pixels).save(root / "images" / f"{i}.png")
        lines.append(json.dumps(dict(file_name=f"{i}.png", text=prompt)) + "\n")
    (root / "images" / "metadata.jsonl").write_text("".join(lines))
    items = dict(prompt=PROMPTS[1], items=["blue square", "circle"], thresholds=[0.08, 0.08])
    (root / "items.json").write_text(json.dumps({"one": dict(train=[items], test=PROMPTS[:1])}))
    return SimpleNamespace(
        root=root,
        sd=write_sd(root / "sd"),
        sd_v=write_sd(root / "sd_v", prediction_type="v_prediction", seed=1),
        sdxl=write_sd(root / "sdxl", "sdxl", seed=2),
        flux=write_flux(root / "flux", seed=3),
        flux_dev=write_flux(root / "flux_dev", dev=True, seed=4),
        sd35=write_sd35(root / "sd35", seed=5),
        z_image=write_z_image(root / "z_image", seed=6),
        prompts=str(root / "prompts.txt"),
        one=str(root / "one.txt"),
        images=str(root / "images"),
        items=str(root / "items.json"),
        labelled=write_labelled(root / "labelled"),
    )


def write_labelled(folder):
    """Six images of 64 x 64 pixels with maps: four to train on, two to test -> the folder."""
    (folder / "images").mkdir(parents=True)
    (folder / "maps").mkdir()
    lines = []
    for i in range(6):
        draw = generator(0, "labelled", i)
        to_pil(torch.rand(3, 64, 64, generator=draw)).save(folder / "images" / f"{i}.png")
        wrong = (torch.rand(1, 64, 64, generator=draw) < 0.5).float()
        to_pil(wrong.expand(3, -1, -1)).convert("L").save(folder / "maps" / f"{i}.png")
        row = dict(file_name=f"{i}.png", category="", source="human")
        row["split"] = "train" if i < 4 else "test"
        lines.append(json.dumps(row) + "\n")
    (folder / "meta.jsonl").write_text("".join(lines))
    return str(folder)


# --------------------------------------------------------------------------------------------------
# A short command line of every script that trains


def training_commands(world):
    """{name: (module, words)}: four updates of a tiny model, with a checkpoint after every two."""
    import dfusion_dpo
    import diffdoctor
    import focus_n_fix
    import imagerefl
    import refl

    four = ["--train_steps", 4, "--save_every", 2, "--device", "cpu"]
    model = ["--model", world.sd, "--num_inference_steps", 4, "--lora_rank", 4, "--lr", 1e-3]
    prompts = ["--prompts", world.prompts, "--test_prompts", world.one]
    batch = ["--batch_size", 2, "--micro_batch", 2]
    detector = ["--detector", ROOT / "toy" / "detector"]
    late = ["--first_mid", 2, "--last_mid", 3]
    reward = ["--reward", "toy_pref"]
    usual = [*model, *four, *batch, *prompts]
    # The early stopping must not end these runs.
    go_on = ["--max_drift", 99, "--patience", 99]
    return {
        "refl": (refl, [*usual, *late, *reward]),
        "imagerefl": (
            imagerefl,
            [*usual, *late, *reward, "--data", world.images, "--start", 1],
        ),
        "focus_n_fix": (
            focus_n_fix,
            [*usual, *detector, "--pool", 4, "--reward", "artifact"],
        ),
        "treat": (
            diffdoctor,
            ["treat", *usual, *detector, *reward, "--data", world.images, *go_on],
        ),
        "detector": (
            diffdoctor,
            ["detector", "--data", world.labelled, "--real", ROOT / "toy" / "images", *four]
            + ["--batch_size", 4],
        ),
        "dfusion_dpo": (
            dfusion_dpo,
            [*model, *four, "--images_per_prompt", 4, "--batch_size", 4, "--micro_batch", 4]
            + ["--reward", "toy_clip", "--prompts", world.items],
        ),
    }


def commands_for_two(world):
    """{name: (module, words)}: the commands that two processes can share, with work for both.

    That takes two held-out prompts, and for D-Fusion two prompts per round.
    """
    two_prompts = world.root / "two_prompts.txt"
    two_prompts.write_text("\n".join(PROMPTS[:2]) + "\n")
    items = {1: "blue square", 2: "triangle"}  # number of a prompt: the item that fusion moves
    rows = [dict(prompt=PROMPTS[i], items=[item], thresholds=[0.08]) for i, item in items.items()]
    two_items = world.root / "two_items.json"
    two_items.write_text(json.dumps({"two": dict(train=rows, test=PROMPTS[:2])}))

    commands = training_commands(world)
    del commands["detector"]  # batch norm must see the whole batch
    for name, (module, words) in commands.items():
        if name == "dfusion_dpo":
            # Each pair trains on steps of its own, and DDPO needs the rewards of earlier rounds,
            # when a prompt was the other process's turn.
            words = [*words, "--prompts", two_items, "--batch_size", 8]
            words += ["--train_timesteps", 2, "--algo", "ddpo"]
        else:
            words = [*words, "--test_prompts", two_prompts]
        commands[name] = (module, words)
    return commands


SCRIPTS_THAT_TRAIN = ("refl", "imagerefl", "focus_n_fix", "treat", "detector", "dfusion_dpo")


# --------------------------------------------------------------------------------------------------
# Running a script, and reading what it left


def run_script(module, *words):
    """Runs a script's command line in this process -> its exit status or message; 0 is success.

    For example run_script(refl, "--train_steps", 2, "--out", "run").
    """
    try:
        args = module.parse_args([str(word) for word in words])
        with readable_errors(args):
            module.main(args)
    except SystemExit as error:
        return error.code
    return 0


def read_log(run):
    """The rows of a run's log without their times, which differ from run to run."""
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return rows


def read_weights_of_run(run):
    """The tensors of a run's LoRA, or of its full weights."""
    run = Path(run)
    candidates = [
        run / "lora" / "pytorch_lora_weights.safetensors",
        run / "model" / "unet" / "diffusion_pytorch_model.safetensors",
        run / "model" / "detector" / "model.safetensors",
    ]
    (file,) = [path for path in candidates if path.is_file()]
    return load_file(file)


def assert_same_run(first, second):
    """Logs and weights agree, except for the last digits, which depend on the order of sums."""
    rows = read_log(first)
    other_rows = read_log(second)
    assert len(rows) == len(other_rows) == 4
    for row, other in zip(rows, other_rows):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, dict):
                value = list(value.values())
                other[name] = list(other[name].values())
            assert other[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
    weights = read_weights_of_run(first)
    other_weights = read_weights_of_run(second)
    assert weights.keys() == other_weights.keys()
    for key, weight in weights.items():
        # Four updates at a learning rate of 1e-3. Adam amplifies the last digits of gradients.
        torch.testing.assert_close(other_weights[key], weight, rtol=0, atol=1e-4)


def same_tensors(first, second):
    """Whether two dicts of tensors have equal names and equal bits."""
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[key], second[key]) for key in first)


def break_weights(path, harm):
    """Harms a file of weights: "cut", "absent", or its first "key" or that one's "shape"."""
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif harm == "absent":
        path.unlink()
    else:
        state = load_file(path)
        key = sorted(state)[0]
        state[key] = torch.zeros(3, 5)
        if harm == "key":
            del state[key]
        save_file(state, path, metadata={"format": "pt"})


def pipeline_images(pipe, prompts, latents, num_inference_steps, guidance_scale):
    """What a flow's own pipeline makes of x_T (B, C, h, w), with a guidance_scale as ours."""
    options = dict(height=16, width=16, num_inference_steps=num_inference_steps, output_type="pt")
    if isinstance(pipe, FluxPipeline):
        latents = FluxPipeline._pack_latents(latents, *latents.shape)
        options["max_sequence_length"] = 12
    if isinstance(pipe, ZImagePipeline):
        guidance_scale = guidance_scale - 1
    options.update(latents=latents, guidance_scale=guidance_scale)
    return pipe(list(prompts), **options).images


def random_lora(params, size=0.3):
    """Fills LoRA parameters with fixed random numbers, so that the LoRA changes the model."""
    for i, p in enumerate(params):
        p.data = size * torch.randn(p.shape, generator=generator(0, "lora weights", i))


def use_bf16(monkeypatch):
    """Lets the judges load in bf16, as they do on CUDA."""
    for module in (judges.clip, judges.imagereward, judges.mps):
        monkeypatch.setattr(module, "judge_dtype", lambda device: torch.bfloat16)
