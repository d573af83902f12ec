"""The parts of `tests/gpu.py`, a module each with `run(part)`; what they share is in `part.py`.

What the benchmarks measure they import from there.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests" / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
