"""`python -m hf_layerprune`, which is the same as `hf-layerprune`."""

from __future__ import annotations

from .cli import main

raise SystemExit(main())
