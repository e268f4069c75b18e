"""The experiments behind the README's tables: each prints its figures. Restartable: what is done is not done again.

  $ OMP_NUM_THREADS=1 python tests/claims.py refl --out claims --jobs 2             # 3 training runs and their images
  $ OMP_NUM_THREADS=1 python tests/claims.py imagerefl --out claims --jobs 2        # 12 more runs; uses refl's
  $ OMP_NUM_THREADS=1 python tests/claims.py focus_n_fix --out claims --jobs 2      # 12 short runs
  $ OMP_NUM_THREADS=1 python tests/claims.py dfusion --out claims --jobs 2          # pairs, gradients, 21 runs
  $ OMP_NUM_THREADS=1 python tests/claims.py diffdoctor --out claims                # 12 detectors, 24 treatments
  $ OMP_NUM_THREADS=1 python tests/claims.py dreambooth --out claims                # 3 LoRAs, each treated twice

Writes DIR/<experiment>/*.md, *.json and plots. The training seed is the unit: a figure is the mean over seeds, with the standard
deviation over seeds behind the sign; held-out prompts and image seeds are the same for every row. The experiments are in tests/experiments/.
"""
import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
EXPERIMENTS = ("refl", "imagerefl", "focus_n_fix", "dfusion", "diffdoctor", "dreambooth")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, default=Path("claims"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (set OMP_NUM_THREADS=1 for more than one)")
    args = parser.parse_args()
    experiment = getattr(importlib.import_module(f"experiments.{args.experiment}"), args.experiment)
    experiment((args.out / args.experiment).resolve(), args.jobs)


if __name__ == "__main__":
    main()
