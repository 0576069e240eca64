from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmkv.errors import ConfigError
from lmkv.eviction import make_policy, policy_names
from lmkv.eviction.base import EvictionPolicy
from lmkv.eviction.lfu import LFU
from lmkv.eviction.s3fifo import S3FIFO


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with entry points, as pip leaves it."""
    (tmp_path / "other_policies.py").write_text(
        "from lmkv.eviction.lru import LRU\nclass Mine(LRU):\n    pass\ndef nothing(capacity):\n    return capacity\n"
    )
    info = tmp_path / "other_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lmkv.policies]\n"
        "mine = other_policies:Mine\n"
        "LRU = other_policies:Mine\n"
        "nothing = other_policies:nothing\n"
        "gone = other_policies:Gone\n"
        "missing = no_such_module_anywhere:Policy\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_policies", raising=False)


def test_built_in_names_in_any_case() -> None:
    assert policy_names()[:5] == ["lru", "lfu", "fifo", "mru", "s3fifo"]
    for name in policy_names()[:5]:
        assert isinstance(make_policy(name, 10), EvictionPolicy)
    assert isinstance(make_policy("LFU", 10), LFU)
    assert isinstance(make_policy("S3Fifo", 10), S3FIFO)


def test_unknown_name_says_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"expected one of lru, lfu, .*got 's3-fifo'; did you mean 's3fifo'\?"):
        make_policy("s3-fifo", 10)
    with pytest.raises(ConfigError, match=r"got 'zzzzzz'$"):
        make_policy("zzzzzz", 10)


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_below_one_is_refused(capacity: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 chunk"):
        make_policy("lru", capacity)


@pytest.mark.usefixtures("other_package")
class TestOtherPackages:
    def test_found_by_name_and_imported_on_first_use(self) -> None:
        assert "mine" in policy_names()
        assert "other_policies" not in sys.modules
        assert type(make_policy("Mine", 10)).__name__ == "Mine"

    def test_built_in_names_win(self) -> None:
        assert type(make_policy("lru", 10)).__module__ == "lmkv.eviction.lru"
        assert policy_names().count("lru") == 1

    def test_nearest_name_counts_them_too(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'mine'"):
            make_policy("mime", 10)

    @pytest.mark.parametrize("name", ["gone", "missing"])
    def test_what_cannot_be_loaded_is_an_error(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"policy {name}: expected .* to be importable"):
            make_policy(name, 10)

    def test_what_is_no_policy_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match="to make an EvictionPolicy; got int"):
            make_policy("nothing", 10)
