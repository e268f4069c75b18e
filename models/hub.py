"""Finds and reads models: by a key of MODELS, a folder, or a hub id such as "owner/name@revision".

Nothing here is particular to a family.
"""

import json
import os
import sys
from pathlib import Path

import transformers
from huggingface_hub import list_repo_files
from transformers.utils import cached_file

from models import FAMILIES, MODELS


def split_revision(name):
    """A key of MODELS, a folder, or "owner/name@revision" -> (folder or hub id, revision)."""
    source = str(MODELS.get(name, name))
    if os.path.isdir(source):
        return source, None
    repo, _, revision = source.partition("@")
    return repo, revision or None


def read_json(source, filename):
    """A JSON file from a folder or hub model -> (its content, its local path)."""
    repo, revision = split_revision(source)
    path = Path(cached_file(repo, filename, revision=revision))
    return json.loads(path.read_text()), path


def find_pipeline(name):
    """The pipeline class of --model, and the path of the model_index.json that names it."""
    if name not in MODELS and not os.path.isdir(name) and name.count("/") != 1:
        known = ", ".join(MODELS)
        sys.exit(f"--model {name}: unknown. Use {known}, a diffusers folder or a hub id")
    try:
        index, path = read_json(name, "model_index.json")
    except OSError as error:
        sys.exit(f"--model {name}: we cannot read its model_index.json. {error}")
    class_name = index.get("_class_name")
    pipelines = {pipeline_class.__name__: pipeline_class for pipeline_class in FAMILIES}
    if class_name not in pipelines:
        sys.exit(f"--model {name} is a {class_name}; we support {', '.join(pipelines)}")
    return pipelines[class_name], path


def weight_variant(repo, revision, index_path):
    """ "fp16" if the model also comes in half precision: we load it in bf16 anyway. Else None."""
    files = [path.name for path in index_path.parent.rglob("*.safetensors")]
    if not files:
        files = list_repo_files(repo, revision=revision)
    has_half = any(file.endswith(".fp16.safetensors") for file in files)
    return "fp16" if has_half else None


def load_text_encoders(repo, index, dtype, options):
    """Loads the pipeline's text encoders, by name. A weight missing from the files is an error.

    diffusers could load them, too, but it would fill missing weights with random numbers.
    """
    encoders = {}
    for name, entry in index.items():
        if not name.startswith("text_encoder") or entry[0] != "transformers":
            continue
        encoder_class = getattr(transformers, entry[1])
        encoders[name], report = encoder_class.from_pretrained(
            repo, subfolder=name, dtype=dtype, output_loading_info=True, **options
        )
        if report["missing_keys"]:
            raise ValueError(f"the weights of its {name} lack {min(report['missing_keys'])}")
    return encoders


def check_tokenizer(tokenizer, vocab_size, source):
    """Raises ValueError if the vocabulary is missing: transformers would read all words as unknown.

    A tokenizer may have somewhat fewer tokens than the text encoder has embeddings, as BLIP's does.
    """
    if not 0.9 * vocab_size <= len(tokenizer) <= vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, but its model {vocab_size}. "
            "Is tokenizer.json, vocab.json or vocab.txt missing?"
        )
