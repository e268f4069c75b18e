"""Prompts with items for D-Fusion: which words of a prompt name the things in its image."""

import json
import re
import sys
from pathlib import Path

from data.prompts import read_prompts

JSON_FORM = '{template: {"train": [{"prompt", "items", "thresholds"}, ...], "test": [prompt, ...]}}'


def read_items(path, template=None):
    """Return the training rows and the test prompts of a prompts file.

    A row is dict(prompt=text, items=[text, ...], thresholds=[number, ...]), with one threshold per
    item. Rows may lack their thresholds.
    A file whose name ends in .json has the form above; `template` is one of its keys, by default
    the first. Any other file has one line "prompt | item; item" per prompt, and no test prompts.
    """
    if str(path).endswith(".json"):
        rows, test_prompts = read_json_items(path, template)
    else:
        if template:
            sys.exit(f"--template {template}: {path} has no templates, only a JSON file has")
        rows = [parse_line(path, line) for line in read_prompts(path)]
        test_prompts = []

    for row in rows:
        check_row(path, row)
    unique_prompts = {row["prompt"] for row in rows}
    if not rows or len(unique_prompts) < len(rows):
        sys.exit(f"prompts file {path}: it has no training prompts, or one of them is repeated")
    return rows, test_prompts


def read_json_items(path, template):
    """Return the rows and the test prompts of one template of a JSON file."""
    try:
        templates = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        sys.exit(f"prompts file {path}: {error}")
    if not isinstance(templates, dict) or not templates:
        sys.exit(f"prompts file {path}: we expect {JSON_FORM}")
    if template is None:
        template = next(iter(templates))
    if template not in templates:
        sys.exit(f"--template {template}: {path} has only {', '.join(templates)}")
    lists = templates[template]
    if not isinstance(lists, dict) or not {"train", "test"} <= lists.keys():
        sys.exit(f"prompts file {path}: {template} lacks a list. We expect {JSON_FORM}")
    return lists["train"], lists["test"]


def parse_line(path, line):
    """Return the row of a line "prompt | item; item"."""
    prompt, bar, items = line.partition("|")
    if not bar:
        sys.exit(f"prompts file {path}: {line!r} is not of the form 'prompt | item; item'")
    return dict(prompt=prompt.strip(), items=[item.strip() for item in items.split(";")])


def check_row(path, row):
    """Exit if a row is incomplete, or its number of thresholds is not its number of items."""
    required = {"prompt", "items"}
    if not isinstance(row, dict) or not required <= row.keys() <= required | {"thresholds"}:
        sys.exit(f"prompts file {path}: {row!r} does not fit. We expect {JSON_FORM}")
    if not row["prompt"] or not row["items"] or "" in row["items"]:
        sys.exit(f"prompts file {path}: {row!r} has an empty prompt or item")
    if "thresholds" in row and len(row["thresholds"]) != len(row["items"]):
        sys.exit(f"prompts file {path}: {row['prompt']!r} needs one threshold per item")


def write_items(path, rows, test_prompts):
    """Write rows and test prompts as JSON that read_items reads."""
    templates = {"prompts": dict(train=rows, test=test_prompts)}
    Path(path).write_text(json.dumps(templates, indent=1, ensure_ascii=False), encoding="utf-8")


def token_span(tokenizer, prompt, item, which="own"):
    """Return the positions of an item's tokens in the encoded prompt.

    With which="next", return that of the token after them, which may be the end of the text.
    The item must be one or more whole words that occur exactly once in the prompt.
    """
    whole_words = rf"(?<!\w){re.escape(item)}(?!\w)"
    matches = list(re.finditer(whole_words, prompt, re.IGNORECASE))
    if len(matches) != 1:
        sys.exit(
            f"prompt {prompt!r}: its item {item!r} occurs {len(matches)} times in it. "
            "It must occur once: add more of the prompt's words to it"
        )
    start, end = matches[0].span()
    max_length = tokenizer.model_max_length
    encoded = tokenizer(
        prompt, return_offsets_mapping=True, truncation=True, max_length=max_length
    )
    positions = []
    for position, (first, last) in enumerate(encoded.offset_mapping):
        # The start and end tokens cover no characters.
        if first < last and first < end and last > start:
            positions.append(position)
    if not positions:
        sys.exit(f"prompt {prompt!r}: {item!r} is after the {max_length} tokens that we read")
    if which == "own":
        return positions
    return [positions[-1] + 1]
