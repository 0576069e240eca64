"""LMKV under SGLang: one page store behind its doors. ``docs/sglang.md`` says how to start it and what is served.

- :mod:`.plugin`: what the entry point ``sglang.srt.plugins`` runs: ``--enable-lmcache`` is served by LMKV where the user
  asked for it.
- :mod:`.linker`: the store reached straight from the device's KV pools (SGLang's ``UnifiedCacheLinker``).
- :mod:`.radix`: the same behind the prefix tree of versions that have no such linker (0.5.17).
- :mod:`.hicache`: the store behind HiCache's host memory, by SGLang's own flags.
- :mod:`.pages`: the page store that the doors share; :mod:`.pools` and :mod:`.identity` say what it holds.

Nothing here is imported before SGLang asks for it.
"""

from __future__ import annotations
