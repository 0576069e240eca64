"""The ``lmkv`` command: one word, one module, imported only when that word is typed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]

#: word -> (module:function that takes the remaining arguments and returns an exit status, what it does)
COMMANDS = {
    "demo": ("lmkv.adapters.transformers.demo:main", "a real language model answers about long documents, cold and cached"),
    "replay": ("lmkv.cli.replay:main", "hit ratios of eviction policies on a request trace"),
    "inspect": ("lmkv.cli.disk:inspect", "what a disk tier's directory holds"),
    "verify": ("lmkv.cli.disk:verify", "prove every record of a disk tier's directory"),
    "compact": ("lmkv.cli.disk:compact", "give back what a disk tier's directory has free"),
    "export": ("lmkv.cli.bundle:export", "write stored texts into a bundle for another machine"),
    "import": ("lmkv.cli.bundle:import_", "put the texts of a bundle into a disk tier's directory"),
    "adopt": (
        "lmkv.adapters.lmcache.adopt_command:main",
        "bring what LMCache 0.3 left in a Redis or on a disk into a disk tier",
    ),
    "migrate": ("lmkv.adapters.lmcache.migrate:main", "print a configuration of LMCache's in LMKV's keys"),
    "run": ("lmkv.adapters.lmcache.run:main", "run a command in which LMCache's commands and imports are LMKV's"),
    "serve": ("lmkv.adapters.lmcache.serve:main", "keep values for clients of LMCache's lm:// protocol"),
    "doctor": ("lmkv.cli.doctor:main", "what this machine has, and what LMKV can use of it"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    words = "\n".join(f"  {word:<{width}}  {text}" for word, (_, text) in COMMANDS.items())
    return f"usage: lmkv COMMAND [ARG ...]\n\ncommands (lmkv COMMAND --help says more):\n{words}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lmkv COMMAND``; returns the exit status (0 done, 1 failed, 2 wrong arguments)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from .. import __version__

        print(f"lmkv {__version__}")
        return 0
    if args[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(COMMANDS)}"
        print(f"lmkv: unknown command {args[0]!r}; {hint}", file=sys.stderr)
        return 2
    module, function = COMMANDS[args[0]][0].split(":")
    try:
        run = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lmkv"):
            raise
        print(f"lmkv {args[0]}: needs the package {error.name!r}: pip install 'lmkv[{args[0]}]'", file=sys.stderr)
        return 1
    return int(run(args[1:]) or 0)
