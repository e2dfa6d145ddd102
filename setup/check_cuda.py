"""Says whether torch can use the machine's GPU, and if not, what to do. Exit code 1 where it cannot."""

import os
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

import torch

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    usable = torch.cuda.is_available()
if usable:
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    print(f"setup: torch {torch.__version__} uses {names}", file=sys.stderr)
    # What torch.compile needs for FlexAttention; without it the update is slower.
    compilers = (os.environ.get("CC"), "gcc", "clang")
    missing = [] if any(map(shutil.which, filter(None, compilers))) else ["a C compiler (gcc)"]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(f"Python's headers (python{sys.version_info[0]}.{sys.version_info[1]}-dev)")
    if missing:
        print(f"setup: install {' and '.join(missing)}: training is slower without", file=sys.stderr)
    sys.exit(0)
reason = " ".join(str(said[0].message).split()) if said else "torch.cuda.is_available() is False"
built = torch.version.cuda and f"built for CUDA {torch.version.cuda}"
print(
    f"setup: torch {torch.__version__} ({built or 'built without CUDA'}) cannot use the GPU: {reason}\n"
    "setup: update the NVIDIA driver (nvidia-smi shows the newest CUDA that it knows) and run this "
    "again, or install for the CPU: make install ACCELERATOR=cpu",
    file=sys.stderr,
)
sys.exit(1)
