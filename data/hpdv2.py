"""Writes the 400 test prompts of HPDv2, on which ImageReFL measures, to a file for --test_prompts.

  $ python data/hpdv2.py hpdv2_test.txt        # needs the hub; ymhao/HPDv2 is under Apache 2.0
"""

import argparse
import json
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download


def main(path):
    try:
        source = hf_hub_download("ymhao/HPDv2", "test.json", repo_type="dataset")
    except OSError as error:
        sys.exit(f"ymhao/HPDv2 cannot be downloaded. {error}")
    rows = json.loads(Path(source).read_text())
    # One prompt per line: some have line breaks of their own.
    prompts = [" ".join(row["prompt"].split()) for row in rows]
    prompts = list(dict.fromkeys(prompts))
    Path(path).write_text("\n".join(prompts) + "\n")
    print(f"{len(prompts)} prompts: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="the file to write, one prompt per line")
    main(parser.parse_args().path)
