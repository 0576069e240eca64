"""The command line of the standalone service.

Flags of the service itself are listed by ``--help``; any other ``--key value`` or ``--key=value`` sets a key of the store's
configuration, in LMKV's or LMCache's spelling, with dashes or underscores. ``docs/standalone.md`` has the whole table.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmkv.config import StoreConfig, parse_bytes, parse_yaml
from lmkv.errors import ConfigError, LayoutMismatchError
from lmkv.layout import KVLayout, LayerGroup

from ..access import is_loopback, read_token
from ..lmcache import load_config
from ..lmcache.config import known_keys

__all__ = ["Options", "parse_options"]

DEFAULT_PORT = 7711
DEFAULT_SHAPE = "2,2,256,4,16"
DEFAULT_MODEL = "standalone_model"
#: Config keys whose value is not a scalar: on the command line they are YAML.
_STRUCTURED = ("tiers", "extra_config")


@dataclass(frozen=True)
class Options:
    """Everything the service needs to start.

    Args:
        config, layout: of the store.
        host, port: to listen on; port 0 picks a free one.
        token: what clients have to bear; ``None`` for nothing.
        max_body: bytes of one request's body.
        max_requests: requests that use the store at once; further ones wait.
        patience_seconds: how long a client may keep the service waiting.
        grace_seconds: how long running requests may go on after SIGTERM.
        warnings: lines for the person who started the service.
    """

    config: StoreConfig
    layout: KVLayout
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    token: str | None = None
    max_body: int = 16 * 1024**3
    max_requests: int = 16
    patience_seconds: float = 30.0
    grace_seconds: float = 10.0
    warnings: tuple[str, ...] = ()


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false; got {text!r}")


def _bytes(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 byte; got {text!r}")
    return size


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of more than 0; got {text!r}")
    return number


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse declares NoReturn; raising is that
        raise ConfigError(f"command line: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lmkv.standalone",
        description="Keeps KV caches for other processes and serves them over HTTP; needs no GPU and no engine.",
        epilog="Any other --key value sets a key of the store's configuration, LMKV's or LMCache's: "
        "--ram-capacity 8GiB, --disk-path /data/kv, --max_local_cpu_size=5.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file with LMKV's or LMCache's keys")
    add("--model-name", metavar="NAME", help=f"whose KV this is; enters every key (default {DEFAULT_MODEL})")
    add("--worker-id", type=int, default=0, metavar="N", help="this shard's number (default 0)")
    add("--world-size", type=int, default=1, metavar="N", help="number of shards (default 1)")
    add("--kv-dtype", metavar="DTYPE", help="element type of --kv-shape (default float16)")
    add("--kv-shape", metavar="L,KV,T,H,D", help=f"layers, 2 or 1, tokens, heads, head size (default {DEFAULT_SHAPE})")
    add("--kvcache-shape-spec", metavar="SPEC", help="'(2,2,256,4,16):float16:2', groups joined by ';'; replaces --kv-shape")
    add("--use-mla", nargs="?", const=True, default=False, type=_boolean, help="one latent a token: kv = 1, heads = 1")
    add("--device", default="cpu", help="cpu, the only one there is")
    add("--fmt", help="taken for compatibility, without effect")
    add("--host", default=Options.host, help="address to listen on (default %(default)s)")
    add("--port", type=int, default=DEFAULT_PORT, help="port to listen on, 0 for a free one (default %(default)s)")
    add("--token-file", metavar="FILE", help="file that holds the bearer token; LMKV_TOKEN in the environment does too")
    add("--insecure", action="store_true", help="listen on other addresses than loopback without a token")
    add("--max-body", type=_bytes, default=Options.max_body, metavar="SIZE", help="largest request body (default 16GiB)")
    add("--max-requests", type=int, default=Options.max_requests, help="requests served at once (default %(default)s)")
    add("--patience-seconds", type=_positive, default=Options.patience_seconds, help="for slow clients (default %(default)s)")
    add("--grace-seconds", type=_positive, default=Options.grace_seconds, help="for requests at SIGTERM (default %(default)s)")
    return parser


_BARE_FLAGS = ("--insecure", "--help", "-h")


def _split(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """Arguments for argparse, and overrides of config keys."""
    flags = {option for action in parser._actions for option in action.option_strings}
    mine: list[str] = []
    overrides: dict[str, object] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--"):
            if word == "-h":
                mine.append(word)
                continue
            raise ConfigError(f"command line: expected --key value or --key=value; got {word!r}")
        follows = not equals and name not in _BARE_FLAGS and rest and not rest[0].startswith("--")
        if follows:
            value = rest.pop(0)
        if name in flags:
            mine.append(f"{name}={value}" if equals or follows else name)
            continue
        key = name[2:].replace("-", "_")
        if key not in known_keys():
            raise _unknown(name, flags)
        text = value if equals or follows else "true"
        overrides[key] = parse_yaml(text, f"command line: {name}") if key in _STRUCTURED else text
    return mine, overrides


def _unknown(name: str, flags: set[str]) -> ConfigError:
    if name == "--token":
        return ConfigError(
            "command line: --token is not taken, every user of the machine could read it there: use --token-file or LMKV_TOKEN"
        )
    known = sorted(flags | {"--" + key.replace("_", "-") for key in known_keys()})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "--help lists the flags, docs/standalone.md the configuration keys"
    return ConfigError(f"command line: unknown key {name}; {hint}")


def _shape_layout(shape: str, dtype: str, mla: bool) -> KVLayout:
    """A layout of one group from ``layers,kv,tokens,heads,head_size``."""
    form = "--kv-shape: expected five whole numbers layers,kv,tokens,heads,head_size such as 32,2,256,8,128"
    try:
        dims = [int(part) for part in shape.strip().strip("()").split(",")]
    except ValueError:
        raise ConfigError(f"{form}; got {shape!r}") from None
    if len(dims) != 5:
        raise ConfigError(f"{form}; got {shape!r}")
    if dims[1] not in (1, 2) and dims[0] in (1, 2):
        dims[0], dims[1] = dims[1], dims[0]  # written kv first, as in a shape spec
    layers, kv, tokens, heads, head_size = dims
    if kv not in (1, 2):
        raise ConfigError(f"{form} with kv = 2, or 1 for MLA; got {shape!r}")
    if mla or (kv == 1 and heads == 1):
        kv, heads, head_size = 1, 1, heads * head_size
    return KVLayout((LayerGroup(layers, kv, heads, head_size, dtype),), tokens)


def _layout(args: argparse.Namespace, chunk_size: int | None, warnings: list[str]) -> KVLayout:
    if args.kvcache_shape_spec is not None:
        for flag, value in (("--kv-shape", args.kv_shape), ("--kv-dtype", args.kv_dtype)):
            if value is not None:
                warnings.append(f"{flag} has no effect beside --kvcache-shape-spec")
        layout = KVLayout.parse(args.kvcache_shape_spec)
        if args.use_mla:
            groups = tuple(LayerGroup(g.layers, 1, 1, g.heads * g.head_size, g.dtype) for g in layout.groups)
            layout = KVLayout(groups, layout.chunk_tokens)
    else:
        layout = _shape_layout(args.kv_shape or DEFAULT_SHAPE, args.kv_dtype or "float16", args.use_mla)
    if chunk_size is not None and chunk_size != layout.chunk_tokens:
        if args.kvcache_shape_spec or args.kv_shape:
            warnings.append(f"chunk_size {chunk_size} replaces the {layout.chunk_tokens} tokens of the given shape")
        layout = dataclasses.replace(layout, chunk_tokens=chunk_size)
    return layout


def _shard(args: argparse.Namespace) -> str:
    if args.world_size < 1 or not 0 <= args.worker_id < args.world_size:
        raise ConfigError(f"command line: expected 0 <= --worker-id < --world-size; got {args.worker_id} of {args.world_size}")
    return f"tp{args.worker_id}/{args.world_size}" if args.world_size > 1 else ""


def _check_service(args: argparse.Namespace, token: str | None) -> None:
    if args.device != "cpu":
        raise ConfigError(f"--device: expected cpu; got {args.device!r}: the standalone service keeps KV in host memory only")
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port: expected 0 to 65535; got {args.port}")
    if args.max_requests < 1:
        raise ConfigError(f"--max-requests: expected at least 1; got {args.max_requests}")
    if not args.host:
        raise ConfigError("--host: expected an address such as 127.0.0.1; got an empty text")
    if not is_loopback(args.host) and token is None and not args.insecure:
        raise ConfigError(
            f"--host: expected a loopback address, or a token; got {args.host!r} and no token: others could read and change "
            "the cache. Set LMKV_TOKEN or --token-file, or say --insecure"
        )


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Options from a command line and an environment.

    Raises:
        ConfigError: an unknown key, a wrong value, or settings that contradict each other.
        LayoutMismatchError: a shape that no layout has.
        SystemExit: after ``--help``.
    """
    parser = _parser()
    mine, overrides = _split(parser, argv)
    args = parser.parse_args(mine)
    warnings: list[str] = []
    if args.fmt is not None:
        warnings.append("--fmt has no effect: a layout is named by its shape")
    shard = _shard(args)
    for key, value, flag in (("model", args.model_name, "--model-name"), ("shard", shard, "--worker-id")):
        if value:
            if overrides.get(key, value) != value:
                raise ConfigError(f"command line: expected one value for {key}; got {overrides[key]!r} and {flag} {value!r}")
            overrides[key] = value
    loaded = load_config(args.config, environ=environ, overrides=overrides)
    warnings.extend(loaded.warnings)
    token = read_token(args.token_file, environ, warnings)
    _check_service(args, token)
    try:
        layout = _layout(args, loaded.config.chunk_size, warnings)
    except LayoutMismatchError as error:
        flag = "--kv-shape" if args.kvcache_shape_spec is None else "--kvcache-shape-spec"
        raise LayoutMismatchError(f"{flag}: {error}") from None
    config = dataclasses.replace(loaded.config, chunk_size=layout.chunk_tokens, model=loaded.config.model or DEFAULT_MODEL)
    return Options(
        config=config, layout=layout, host=args.host, port=args.port, token=token, max_body=args.max_body,
        max_requests=args.max_requests, patience_seconds=args.patience_seconds, grace_seconds=args.grace_seconds,
        warnings=tuple(warnings),
    )  # fmt: skip
