"""docs/from-lmcache.md: no command, key or log line of the guides is missing, and LMKV takes the commands it is said to."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmkv.adapters.lmcache import load_config
from lmkv.adapters.lmcache.adopt_command import make_parser as adopt_parser
from lmkv.adapters.lmcache.serve import parse_arguments
from lmkv.adapters.sglang.settings import asked_for
from lmkv.adapters.standalone.options import parse_options
from lmkv.cli import COMMANDS

ROOT = Path(__file__).parents[3]
SEEDS = ROOT / "tests" / "fixtures" / "seeds"
PAGE = (ROOT / "docs" / "from-lmcache.md").read_text(encoding="utf-8")
#: Commands of the guides, continued lines joined, request bodies and comments left out.
LISTED = (SEEDS / "commands.txt").read_text(encoding="utf-8").splitlines()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's tables, heads left out."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ") and not line.startswith("| LMCache")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


COMMAND_ROWS = [(cells[0][1:-1], cells[1]) for cells in rows("Commands")]
EQUIVALENTS = [code for _, cell in COMMAND_ROWS for code in codes(cell)]


def test_every_command_of_the_guides_has_a_row() -> None:
    assert [command for command, _ in COMMAND_ROWS] == LISTED
    assert len(LISTED) > 100
    assert all(cell for _, cell in COMMAND_ROWS)


def test_no_row_leaves_lmcache_in_lmkvs_column() -> None:
    for code in EQUIVALENTS:
        assert "LMCacheConnectorV1" not in code
        assert "lmcache_server" not in code.replace("p2p_example", "")
        assert "lmcache.v1" not in code


def words_of(code: str) -> tuple[dict[str, str], list[str]]:
    """Variables in front of a command, and the command."""
    words = shlex.split(code.rpartition(" && ")[2])
    count = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_0-9]+=", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


@pytest.mark.parametrize("code", [code for code in EQUIVALENTS if "kv-transfer-config" in code])
def test_connectors_and_their_variables(code: str) -> None:
    environ, words = words_of(code)
    assert Path(words[0]).name == "vllm"
    given = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert given["kv_connector"] == "LMKVConnector"
    assert given["kv_role"] in ("kv_both", "kv_producer", "kv_consumer")
    extra = given.get("kv_connector_extra_config", {})
    overrides = {key.removeprefix("lmkv."): value.replace("<SIZE>", "50") for key, value in extra.items()}
    environ.pop("LMCACHE_CONFIG_FILE", None)
    load_config(environ=environ, overrides=overrides)


@pytest.mark.parametrize("code", [code for code in EQUIVALENTS if re.search(r"\blmkv serve .*[0-9]", code)])
def test_servers(code: str) -> None:
    _, words = words_of(code)
    assert parse_arguments(words[2:], {}).port == 65432


@pytest.mark.parametrize("code", [code for code in EQUIVALENTS if "lmkv.standalone" in code])
def test_standalone_services(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text("chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 5\n")
    _, words = words_of(code.replace("examples/cache_with_configs", str(tmp_path)))
    options = parse_options(words[3:], {})
    assert options.config.ram_capacity == 5 * 1024**3
    assert options.config.model == ("my_model" if "my_model" in code else "standalone_model")


def test_commands_of_lmkv_are_there() -> None:
    named = set(re.findall(r"`lmkv ([a-z]+)", PAGE))
    assert named == {"adopt", "doctor", "inspect", "verify", "serve", "migrate", "run"}
    assert named <= COMMANDS.keys()


def keys_of(data: dict[str, Any], before: str = "") -> set[str]:
    found = set()
    for key, value in data.items():
        if key == "nixl_backend_params":
            found |= set(value)
        if isinstance(value, dict) and key == "extra_config":
            found |= keys_of(value, "extra_config.")
        else:
            found.add(before + key)
    return found


def test_every_key_of_the_guides_has_a_row() -> None:
    wanted: set[str] = set()
    for path in SEEDS.glob("*.yaml"):
        if not path.stem.startswith("docker-"):
            wanted |= keys_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    for path in [*SEEDS.glob("env-*"), *SEEDS.glob("docker-*")]:
        wanted |= {name.lower() for name in re.findall(r"LMCACHE_([A-Z_]+)", path.read_text(encoding="utf-8"))}
    wanted |= {key for command in LISTED for key in re.findall(r'"(discard_partial_chunks|lmcache_rpc_port)"', command)}
    there = {code for cells in rows("Keys") for code in codes(cells[0])}
    assert wanted - {"extra_config"} <= there
    assert len(wanted) > 40


def test_every_log_line_of_the_guides_has_a_row() -> None:
    patterns = []
    for cells in rows("Logs and names"):
        for code in codes(cells[0]):
            text = re.sub(r"[0-9]+", "0", code)
            patterns.append(".*".join(re.escape(part) for part in text.split("…")))
    for line in (SEEDS / "logs.txt").read_text(encoding="utf-8").splitlines():
        text = re.sub(r"[0-9]+", "0", line)
        assert any(re.search(pattern, text) for pattern in patterns), line


def test_there_is_a_way_back() -> None:
    text = section("Switch back")
    for word in ("LMCacheConnectorV1", "lmcache_server", "lmkv:*", "disk_path"):
        assert word in text


@pytest.mark.parametrize("code", [code for code in EQUIVALENTS if "sglang.launch_server" in code])
def test_sglang(code: str) -> None:
    environ, words = words_of(code)
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    assert "--enable-lmcache" in words
    assert asked_for(environ)


def test_the_commands_that_bring_caches_over_are_taken() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", section("Caches that LMCache left"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("lmkv adopt")]
    assert len(lines) == 2
    for words in lines:
        args = adopt_parser().parse_args(words[2:])
        assert args.model == "meta-llama/Llama-3.1-8B-Instruct"
        assert args.config or args.origins == ["redis://localhost:6379"]
