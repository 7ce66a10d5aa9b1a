"""The tests. torchvision and timm, which some tests of images need, are beside the environment (see Makefile)."""

import sys
import sysconfig
from pathlib import Path

_PREFIX = str(Path(sys.prefix) / "vision")
sys.path.append(sysconfig.get_path("platlib", vars={"base": _PREFIX, "platbase": _PREFIX}))
