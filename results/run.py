"""Runs the experiments behind the pages in results/. Each prints its numbers and draws pictures.

An interrupted experiment resumes where it stopped and repeats nothing that is done. The file
experiments/NAME.py says what question NAME asks, what it runs, and how long that took.

  $ OMP_NUM_THREADS=1 python results/run.py refl --jobs 2           # 3 runs and their images
  $ OMP_NUM_THREADS=1 python results/run.py imagerefl --jobs 2      # 7 more runs; it uses refl's
  $ OMP_NUM_THREADS=1 python results/run.py flows --jobs 2          # both on toy-flux, 9 short runs
  $ OMP_NUM_THREADS=1 python results/run.py focus_n_fix --jobs 2    # 27 short runs
  $ OMP_NUM_THREADS=1 python results/run.py unwanted_concept --jobs 2    # 7 more of its runs
  $ OMP_NUM_THREADS=1 python results/run.py dfusion --jobs 2        # pairs, gradients, 29 runs
  $ OMP_NUM_THREADS=1 python results/run.py diffdoctor              # 13 detectors, 22 treatments
  $ OMP_NUM_THREADS=1 python results/run.py dreambooth              # 2 LoRAs, each treated

Runs, images and tables go to OUT/NAME, and the pictures to results/pictures. The training seed is
the unit: a number is the mean over seeds, and after the ± is the standard deviation over seeds.
Held-out prompts and image seeds are the same for every row.
"""

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Python must find our packages, wherever this file is run from.
sys.path.insert(0, str(ROOT))
EXPERIMENTS = ("refl", "imagerefl", "flows", "focus_n_fix", "unwanted_concept", "dfusion")
EXPERIMENTS += ("diffdoctor", "dreambooth")


def find_experiment(name):
    """The function that runs an experiment: it has the name of its file."""
    module = importlib.import_module(f"results.experiments.{name}")
    return getattr(module, name)


def main():
    parser = argparse.ArgumentParser(
        "results/run.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS, help="which experiment to run")
    add("--out", type=Path, default=ROOT / "results" / "work", help="folder for all its output")
    add("--jobs", type=int, default=2, help="processes at a time; above 1, set OMP_NUM_THREADS=1")
    args = parser.parse_args()
    experiment = find_experiment(args.experiment)
    experiment((args.out / args.experiment).resolve(), args.jobs)


if __name__ == "__main__":
    main()
