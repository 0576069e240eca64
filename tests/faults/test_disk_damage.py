"""Damaged directories: whatever happened to the files, what is found is right, the quota holds, nothing else is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import disk_damage
import pytest


@pytest.mark.parametrize(
    ("kind", "tries", "expected"),
    [
        ("slot_bits", 6, {"misses", "whole"}),
        ("slot_zeros", 6, {"misses", "whole"}),
        ("slot_torn", 6, {"misses", "whole"}),
        ("first_page", 6, {"misses", "whole"}),
        ("truncated", 6, {"misses", "whole"}),
        ("deleted", 6, {"misses", "whole"}),
        ("swapped", 4, {"misses", "whole"}),
        ("linked", 6, {"misses", "whole"}),
        ("foreign_segment", 4, {"misses", "whole"}),
        ("older_index", 1, {"misses"}),
        ("older_data", 5, {"misses", "whole"}),
        ("no_index", 1, {"misses"}),
        ("index_bits", 40, {"misses", "whole", "refused", "disabled"}),
        ("index_zeros", 14, {"misses", "whole", "refused", "disabled"}),
    ],
)
def test_damage(tmp_path: Path, kind: str, tries: int, expected: set[str]) -> None:
    command = [sys.executable, disk_damage.__file__, kind, str(tmp_path), "7", str(tries)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert set(outcome) <= expected, (outcome, done.stderr)
    assert sum(outcome.values()) == tries
