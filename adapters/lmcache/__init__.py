"""What users of LMCache already have, understood: their configuration keys and environment variables."""

from __future__ import annotations

from .config import Loaded, Translated, load_config, translate

__all__ = ["Loaded", "Translated", "load_config", "translate"]
