"""An engine in this process: texts, a flush, the texts again, other weights, the texts twice; one line of JSON says what came.

``python sglang_engine.py SETTINGS TEXTS``, both JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    import sglang
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    settings, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    engine = sglang.Engine(log_level="error", **settings)

    def flush() -> None:
        deadline = time.monotonic() + 30
        while not engine.flush_cache().success and time.monotonic() < deadline:
            time.sleep(0.2)

    def ask() -> dict[str, Any]:
        answers = [engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 8, "temperature": 0}) for ids in texts]
        told = [answer["meta_info"] for answer in answers]
        return {
            "answers": [answer["output_ids"] for answer in answers],
            "cached": [meta["cached_tokens"] for meta in told],
            "host": sum((meta.get("cached_tokens_details") or {}).get("host", 0) for meta in told),
        }

    steps = [ask()]
    flush()
    steps.append(ask())
    flush()  # SGLang ends if it can't flush behind an update, as while HiCache still backs up
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(settings["model_path"], folder, dirs_exist_ok=True)
        weights = Path(folder) / "model.safetensors"
        tensors = {name: -tensor if "_proj" in name else tensor for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        updated = engine.update_weights_from_disk(folder)
        assert updated[0], updated
        flush()
        steps.append(ask())  # the first rank answers before the others have read the files
    flush()
    steps.append(ask())
    engine.shutdown()
    print(json.dumps(steps), flush=True)


if __name__ == "__main__":
    main()
