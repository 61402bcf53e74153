"""Import every module of the suite: with the user's requirements alone, nothing may be missing."""

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Comes with PyTorch for GPUs only, and is needed there only.
NEEDED_ON_A_GPU = {"charseq2seq.gpu_kernels": "triton"}


def modules() -> list[str]:
    """The names of all modules that are not tests or benchmarks."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "charseq2seq").rglob("*.py"), *(ROOT / "data").rglob("*.py")]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    names = sorted(".".join(part for part in of_one if part != "__init__") for of_one in parts)
    return [name for name in names if importlib.util.find_spec(NEEDED_ON_A_GPU.get(name, "sys"))]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for module in modules():
        importlib.import_module(module)
    print(f"{len(modules())} modules import")
