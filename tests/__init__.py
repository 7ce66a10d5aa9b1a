"""The tests. torchvision and timm, which some tests of images need, are beside the environment (see Makefile)."""

import sys
from pathlib import Path

sys.path.append(str(Path(sys.prefix) / "vision"))
