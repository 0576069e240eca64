#!/usr/bin/env bash
# What of the copies needs a GPU, on a machine that has one and an installed lmkv with torch, pytest and hypothesis:
# the suite, compute-sanitizer and the bench. Ends with the bench's rows; the first failure ends it.
set -euo pipefail
tests=$(cd "$(dirname "$0")/.." && pwd)
cd "$tests" # not the repository's root: there Python would find lmkv's sources instead of what is installed
python3 -m pytest -q -p no:cacheprovider native/test_copy.py -m gpu
for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 python3 gpu/sanitize.py | tail -3
done
python3 bench/copies.py --json --only gpu
