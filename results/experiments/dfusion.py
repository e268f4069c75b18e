"""Do D-Fusion's pairs teach more than naive ones? Its pairs, their gradients, and the training.

  dfusion_pairs.py        what the pairs look like, and which layers and steps make them
  dfusion_gradients.py    which sampling steps carry the reward's gradient
  dfusion_training.py     what training on fused and on naive pairs learns

Prints   the tables of the three, in this order.
Took     about 2 minutes per training run on a CPU core; the other two, minutes each.
"""

from .dfusion_gradients import measure_gradients
from .dfusion_pairs import measure_pairs
from .dfusion_training import measure_training


def dfusion(out, jobs):
    out.mkdir(parents=True, exist_ok=True)
    lines = [*measure_pairs(out), *measure_gradients(out), *measure_training(out, jobs)]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
