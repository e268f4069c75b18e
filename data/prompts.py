"""Reads prompts from a file or COCO, and turns them into the embeddings that the denoiser takes.

  prompts = read_prompts("prompts.txt")      one prompt per line, or the captions of COCO
  encode_once(model, prompts)                encodes all prompts of a run, frees the text encoders
  cond = condition(model, prompts)           the `cond` of common.denoise for a batch of prompts
"""

import os
import sys
from pathlib import Path

import torch

from data.coco import captions
from models.hub import check_tokenizer


def read_prompts(path, split="train"):
    """Returns a list of prompts: one per line of a UTF-8 text file, blank lines skipped.

    If path is None, returns the captions of a split of COCO, one per image.
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

    The result always includes None, the unconditional prompt.
    """
    check_tokenizers(model)
    encoded = {}
    unique_prompts = list(dict.fromkeys(prompts))
    for i in range(0, len(unique_prompts), batch_size):
        batch = unique_prompts[i : i + batch_size]
        texts = [prompt or "" for prompt in batch]
        embeds, uncond_embeds = model.family.encode(model, texts)
        for prompt, parts in zip(batch, embeds):
            encoded[prompt] = tuple(part.cpu() for part in parts)
        encoded[None] = tuple(part.cpu() for part in uncond_embeds)
    return encoded


def text_encoders(model):
    """The names of the pipeline's text encoders that are loaded."""
    parts = model.pipe.components
    return [name for name in parts if name.startswith("text_encoder") and parts[name] is not None]


def check_tokenizers(model):
    """Raises ValueError if a tokenizer has no vocabulary, because all prompts would look alike."""
    for name in text_encoders(model):
        vocab_size = getattr(model.pipe, name).config.vocab_size
        tokenizer = getattr(model.pipe, name.replace("text_encoder", "tokenizer"))
        check_tokenizer(tokenizer, vocab_size, model.source)


def encode_once(model, prompts, limit=16e9):
    """Encodes all prompts of a run, then frees the text encoders.

    If the embeddings, such as those of COCO's captions, need more than `limit` bytes of memory, the
    encoders stay, and `condition` encodes each batch as needed. In bf16 this limit is reached at
    135,000 prompts with SD1.5, 50,000 with SDXL, 6,000 with SD3.5 and 4,000 with FLUX.1-dev.
    """
    unique_prompts = list(dict.fromkeys(prompts))
    some = encode_prompts(model, unique_prompts[:64])
    num_bytes = sum(part.nbytes for parts in some.values() for part in parts)
    # Under torchrun, every process of this machine keeps its own.
    num_bytes *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if num_bytes * len(unique_prompts) / len(some) > limit:
        return
    model.embeds.update({**some, **encode_prompts(model, unique_prompts[64:])})
    for name in text_encoders(model):
        model.pipe.register_modules(**{name: None})
    torch.cuda.empty_cache()


def condition(model, prompts):
    """B prompts (None: unconditional) -> the denoiser's keyword arguments, on its device."""
    embeds = model.embeds
    new_prompts = [prompt for prompt in prompts if prompt not in embeds]
    if new_prompts and not text_encoders(model):
        raise ValueError(f"the text encoders are freed: pass {new_prompts[0]!r} to encode_once too")
    if new_prompts:
        embeds = {**encode_prompts(model, new_prompts), **embeds}
    return model.family.condition(model, [embeds[prompt] for prompt in prompts])
