"""A module imports only from what stands before it, so the story reads in one direction and the core stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Parts of the package, each importing only from those before it; the launchers at the end name adapters, nobody else does.
ORDER = [
    "_native", "errors", "layout", "config", "events", "_plugins", "processes",
    "chunks", "record", "codecs", "eviction", "index", "pool",
    "backends", "transfer", "tiers", "handles", "worth", "loading", "finding", "peers", "store", "aio", "testing",
    "adapters", "cli", "standalone",
]  # fmt: skip
LAUNCHERS = ("cli", "standalone")
OUTSIDE = ("adapters", *LAUNCHERS)
USES_TORCH = ("transfer", "pool", "adapters")
ENGINES = {
    "torch",
    "transformers",
    "vllm",
    "sglang",
    "accelerate",
    "aiohttp",
    "aiofiles",
    "blosc2",
    "cryptography",
    "redis",
    "obstore",
    "mooncake",
    "nixl",
    "infinistore",
    "gguf",
    "matplotlib",
    "rich",
}


def source_files() -> Iterator[tuple[str, Path]]:
    """Dotted name within the package and path of every module."""
    for folder, prefix in (("lmkv", ""), ("native", "_native"), ("adapters", "adapters")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [part for part in (prefix, *path.relative_to(ROOT / folder).with_suffix("").parts) if part]
            if parts[-1] == "__init__":
                parts.pop()
            if parts:
                yield ".".join(parts), path


FILES = dict(source_files())
#: Runs where the package is built, and is imported by nobody.
BUILD = "_native.build"


def part_of(name: str) -> str:
    return name.split(".")[0]


def is_package(name: str) -> bool:
    return FILES[name].name == "__init__.py"


def resolved(name: str, node: ast.ImportFrom) -> list[str]:
    """Absolute names of the modules that a ``from`` import may mean."""
    if node.level:
        base = ["lmkv", *name.split(".")]
        base = base[: len(base) - node.level + is_package(name)]
        module = ".".join([*base, *([node.module] if node.module else [])])
    else:
        module = node.module or ""
    return [module, *(f"{module}.{alias.name}" for alias in node.names)]


def imports(name: str) -> Iterator[tuple[ast.AST, str]]:
    """Every import of a module, wherever it stands in it, with the absolute names it may mean."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, target) for target in resolved(name, node))


def own_parts(target: str) -> Iterator[str]:
    """The part of lmkv that an absolute name belongs to, if it names one."""
    parts = target.split(".")
    if parts[0] == "lmkv" and len(parts) > 1 and parts[1] in ORDER:
        yield parts[1]


def test_every_part_has_its_place() -> None:
    assert {part_of(name) for name in FILES} <= set(ORDER), "a new module: give it a place in ORDER"
    assert len(set(ORDER)) == len(ORDER)
    assert len(FILES) > 30


@pytest.mark.parametrize("name", FILES)
def test_imports_only_from_what_stands_before(name: str) -> None:
    mine = part_of(name)
    for node, target in imports(name):
        for part in own_parts(target):
            where = f"{FILES[name].relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            assert part == mine or ORDER.index(part) < ORDER.index(mine), (
                f"{where} imports {target}, which stands behind {mine}"
            )
            assert part != "adapters" or mine == "adapters", f"{where} imports {target}: adapters are named by launchers only"


@pytest.mark.parametrize("name", [name for name in FILES if part_of(name) not in (*LAUNCHERS, "adapters")])
def test_nobody_but_the_launchers_names_adapters(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr)
    }
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [node.lineno for node in texts if id(node) not in docs and "lmkv.adapters" in str(node.value)]


@pytest.mark.parametrize("name", [name for name in FILES if part_of(name) not in ("adapters", "testing", "cli")])
def test_the_core_imports_no_engine_at_its_top(name: str) -> None:
    for node, target in imports(name):
        package = target.split(".")[0]
        if package not in ENGINES:
            continue
        assert getattr(node, "col_offset", 0) > 0, f"{name}: {target} is imported with the module"
        if package == "torch":
            assert part_of(name) in USES_TORCH, f"{name}: torch is for {', '.join(USES_TORCH)}"


@pytest.mark.parametrize("name", [name for name in FILES if part_of(name) not in ("config", *OUTSIDE) and name != BUILD])
def test_only_the_configuration_reads_the_environment(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("environ", "getenv", "putenv"), f"{name}:{node.lineno} reads the environment"


@pytest.mark.parametrize("name", [name for name in FILES if part_of(name) not in OUTSIDE and name != BUILD])
def test_the_core_writes_no_logs_of_its_own(name: str) -> None:
    for _, target in imports(name):
        assert target.split(".")[0] != "logging", f"{name} imports logging: tell the store's listener instead"
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Name) and node.id == "print"), f"{name}:{getattr(node, 'lineno', 0)} prints"


# -- what an import costs ----------------------------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Top-level names in ``sys.modules`` after running ``code`` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing() -> None:
    before, after = loaded_by("pass"), loaded_by("import lmkv")
    assert not (after - before) & (
        ENGINES | {"numpy", "lmdb", "xxhash", "cffi", "yaml", "sortedcontainers", "hypothesis", "pytest"}
    )
    assert (
        after - before
        <= {"lmkv", "importlib", "typing", "collections", "functools", "warnings", "contextlib"} | sys.stdlib_module_names
    )


def test_a_store_at_work_loads_no_engine(tmp_path: Path) -> None:
    loaded = loaded_by(f"""
import lmkv, numpy as np
layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=4)
with lmkv.Store(lmkv.StoreConfig(ram_capacity="1MiB", disk_capacity="1MiB", disk_path={str(tmp_path)!r}), layout) as store:
    kv = np.ones((1, 2, 1, 10, 4), "float32")
    assert store.store(range(10), kv) == 10
    with store.lease(store.lookup(range(10))) as lease:
        assert store.retrieve(lease, kv) == 10
""")
    assert not loaded & (ENGINES | {"hypothesis", "pytest"})


def test_importing_starts_no_thread() -> None:
    code = "import lmkv, lmkv.store, lmkv.aio, threading; assert threading.active_count() == 1, threading.enumerate()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    code = "import lmkv, lmkv.testing\nfor module in (lmkv, lmkv.testing):\n for name in module.__all__: getattr(module, name)"
    subprocess.run([sys.executable, "-c", code], check=True)
    import lmkv

    assert lmkv.__all__ == sorted(lmkv.__all__) == dir(lmkv)
    with pytest.raises(AttributeError, match="no attribute 'Stroe'"):
        _ = lmkv.Stroe
