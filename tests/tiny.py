"""Tiny random pipelines in the diffusers folder format: the families that the scripts support, small enough for a test of every fact."""
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
                       StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

TOKENIZER = Path(__file__).resolve().parents[1] / "toy" / "sd" / "tokenizer"
WIDTH = 16                                                                # of each text encoder
TEXT = dict(vocab_size=79, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
            projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1)


def write(folder, family="sd", prediction_type="epsilon", seed=0):
    """Writes a random "sd" or "sdxl" pipeline of 16 x 16 pixels (latents of 4 x 8 x 8) and returns its folder as a string."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extra = {}
        if family == "sdxl":                                              # pooled text and six sizes of 8 channels each go into the time embedding
            extra = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=WIDTH + 6 * 8)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * WIDTH if family == "sdxl" else WIDTH, use_linear_projection=family == "sdxl", **extra)
        vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=.5,
                            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
        text = CLIPTextModel(CLIPTextConfig(**TEXT))
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                                  steps_offset=1, prediction_type=prediction_type)
        parts = dict(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, feature_extractor=None)
        if family == "sdxl":
            parts |= dict(text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)), tokenizer_2=tokenizer)
            pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
        else:
            pipe = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
        for module in (m for m in pipe.components.values() if isinstance(m, torch.nn.Module)):
            for p in module.parameters():                                 # no weight is zero, no norm the identity
                p.data += .05 * torch.randn_like(p)
        for encoder in (m for name, m in pipe.components.items() if name.startswith("text_encoder")):
            for p in encoder.parameters():                                # CLIP's own start is so small that every prompt reads the same
                p.data *= 3
    pipe.save_pretrained(folder)
    return str(folder)


def write_flux(folder, dev=False, seed=0):
    """Writes a random FLUX pipeline of 16 x 16 pixels (latents of 4 x 8 x 8, 16 tokens) in schnell's form or dev's; returns its folder as a string."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                             joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=dev, axes_dims_rope=(4, 6, 6))
        vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=.3611, shift_factor=.1159,
                            use_quant_conv=False, use_post_quant_conv=False,
                            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
        t5 = T5EncoderModel(T5Config(vocab_size=79, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=1, eos_token_id=1,
                                     feed_forward_proj="gated-gelu"))
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3. if dev else 1., use_dynamic_shifting=dev)
        text = CLIPTextModel(CLIPTextConfig(**TEXT))
        pipe = FluxPipeline(scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=tokenizer,
                            transformer=transformer)
        for module in (m for m in pipe.components.values() if isinstance(m, torch.nn.Module)):
            for p in module.parameters():
                p.data += .05 * torch.randn_like(p)
        for p in [*text.parameters(), *t5.parameters()]:
            p.data *= 3
    pipe.save_pretrained(folder)
    return str(folder)
