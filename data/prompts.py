"""Prompts from a text file, or the captions of COCO 2017."""

import sys
from pathlib import Path

from data.coco import captions


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
