"""The repository's root on the path, so that `pytest` alone finds the scripts, however it is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
