"""Started by test_processes.py under torchrun: runs several command lines in the same processes.

  $ torchrun --nproc_per_node 2 tests/run_commands.py commands.json

commands.json holds [["refl", ["--train_steps", 4]], ...]. The file commands.done.json then holds
the exit status or message of each.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from conftest import run_script

from run_folder import is_main_process, joined_processes


def main(path):
    statuses = []
    with joined_processes(SimpleNamespace(device="cpu")):
        for name, words in json.loads(path.read_text()):
            statuses.append(run_script(importlib.import_module(name), *words))
        if is_main_process():
            path.with_suffix(".done.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
