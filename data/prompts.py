"""Reads prompts from a file or COCO, and turns them into the embeddings that the denoiser takes.

  prompts = read_prompts("prompts.txt")      one prompt per line, or the captions of COCO
  encode_once(model, prompts)                encodes all prompts of a run, frees the text encoders
  cond = condition(model, prompts)           the `cond` of common.denoise for a batch of prompts
"""

import sys
from pathlib import Path

import torch

from data.coco import captions
from rewards import check_tokenizer


def read_prompts(path, split="train"):
    """Return a list of prompts: one per line of a UTF-8 text file, blank lines skipped.

    If path is None, return the captions of a split of COCO, one per image.
    """
    if path is None:
        return captions(split)
    try:
        # utf-8-sig drops the byte order mark that some editors put first.
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        sys.exit(f"prompts file {path}: {error.strerror}")
    except UnicodeDecodeError:
        sys.exit(f"prompts file {path}: not UTF-8 text")
    if "\0" in text:
        sys.exit(f"prompts file {path}: it has a NUL character; is it a text file?")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        sys.exit(f"prompts file {path}: it has no prompt; write one per line")
    return prompts


@torch.no_grad()
def encode_prompts(model, prompts, batch_size=64):
    """Encodes prompts with diffusers' own encode_prompt -> {prompt: tuple of CPU tensors}.

    The result always includes None, the unconditional prompt: zeros for SDXL, as in its pipeline,
    and the embedding of "" for the other models.
    """
    check_tokenizers(model)
    encoded = {}
    unique_prompts = list(dict.fromkeys(prompts))
    for i in range(0, len(unique_prompts), batch_size):
        batch = unique_prompts[i : i + batch_size]
        embeds, uncond_embeds = encode_batch(model, [prompt or "" for prompt in batch])
        for k, prompt in enumerate(batch):
            encoded[prompt] = tuple(part[k].cpu() for part in embeds)
        encoded[None] = tuple(part[0].cpu() for part in uncond_embeds)
    return encoded


def check_tokenizers(model):
    """Raises ValueError if a tokenizer has no vocabulary, because all prompts would look alike."""
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(model.pipe, name, None)
        if encoder is not None:
            tokenizer = getattr(model.pipe, name.replace("text_encoder", "tokenizer"))
            check_tokenizer(tokenizer, encoder.config.vocab_size, model.source)


def encode_batch(model, texts):
    """Texts -> their embeddings and the unconditional ones, tuples of (B, tokens, D) or (B, D)."""
    options = dict(device=model.device, num_images_per_prompt=1)
    if model.is_flow:
        # T5's states for 256 tokens with schnell or 512 with dev, and CLIP's pooled state.
        # FLUX has no unconditional prompt, so we encode "" as one more text.
        length = min(512 if model.takes_guidance else 256, model.pipe.tokenizer_2.model_max_length)
        states, pooled, _ = model.pipe.encode_prompt(
            prompt=[*texts, ""], prompt_2=None, max_sequence_length=length, **options
        )
        return (states[:-1], pooled[:-1]), (states[-1:], pooled[-1:])
    out = model.pipe.encode_prompt(prompt=texts, do_classifier_free_guidance=True, **options)
    if len(out) == 4:
        # SDXL: states and pooled states, each with its unconditional counterpart.
        return (out[0], out[2]), (out[1], out[3])
    return (out[0],), (out[1],)


def encode_once(model, prompts, limit=10_000):
    """Encodes all prompts of a run, then frees the text encoders.

    The embeddings of more than `limit` prompts, such as COCO's captions, would fill the memory.
    In that case the encoders stay, and `condition` encodes each batch as needed.
    """
    if len(set(prompts)) > limit:
        return
    model.embeds.update(encode_prompts(model, prompts))
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(model.pipe, name):
            model.pipe.register_modules(**{name: None})
    torch.cuda.empty_cache()


def condition(model, prompts):
    """B prompts (None: unconditional) -> the denoiser's keyword arguments, on its device."""
    embeds = model.embeds
    new_prompts = [prompt for prompt in prompts if prompt not in embeds]
    if new_prompts:
        embeds = {**encode_prompts(model, new_prompts), **embeds}
    per_prompt = [embeds[prompt] for prompt in prompts]
    parts = [
        torch.stack(part).to(model.device, non_blocking=True)  # (B, tokens, D) or (B, D)
        for part in zip(*per_prompt)
    ]
    if model.is_flow:
        return dict(encoder_hidden_states=parts[0], pooled_projections=parts[1])
    cond = dict(encoder_hidden_states=parts[0])
    if len(parts) == 2:
        # SDXL is also told the original size, the crop's corner and the target size.
        size = model.resolution
        sizes = torch.tensor([[size, size, 0, 0, size, size]]).to(parts[0])
        time_ids = sizes.expand(len(prompts), -1)
        cond["added_cond_kwargs"] = dict(text_embeds=parts[1], time_ids=time_ids)
    return cond
