"""Does each kind of data improve DiffDoctor's detector, and does treatment remove artifacts?

  diffdoctor_detector.py     13 detectors, from the first labels to pseudo labels
  diffdoctor_treatment.py    22 runs that treat toy and toy-flux with toy/detector

Prints   the tables of the two, in this order. The case of section 4.3 is in dreambooth.py.
Took     one to seven minutes per run on two CPU cores.
"""

from .diffdoctor_detector import measure_detectors
from .diffdoctor_treatment import measure_treatments


def diffdoctor(out, jobs):
    measure_detectors(out, jobs)
    measure_treatments(out, jobs)
