"""Small copies of each kind, for ``compute-sanitizer``: ``compute-sanitizer --tool memcheck python tests/gpu/sanitize.py``.

Every vector width, both directions, staged and by a kernel alone, whole and partial chunks; results are compared. Prints
``well``.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from lmkv.layout import KVLayout
from lmkv.pool import HostPool
from lmkv.transfer import CopyEngine, Gpu, GpuOptions, Part, Pinner


def main() -> int:
    """Run all cases once."""
    gpu = Gpu.of(0)
    generator = np.random.default_rng(5)
    for head_size, dtype in ((5, "uint8"), (3, "bfloat16"), (7, "float32"), (12, "bfloat16"), (64, "bfloat16")):
        torch_dtype = getattr(torch, dtype)
        layout = KVLayout.dense(layers=3, heads=2, head_size=head_size, dtype=dtype, chunk_tokens=32)
        layers = [
            [torch.randint(0, 100, (9, 16, 2, head_size), device="cuda").to(torch_dtype) for _ in range(2)] for _ in range(3)
        ]
        engine = CopyEngine(layers, layout)
        pool = HostPool(8192 + layout.chunk_bytes, 3)
        slots = pool.allocate(3)
        assert slots is not None
        pinner = Pinner(pool, gpu)
        assert pinner.wait(30)
        blocks = generator.permutation(9)[:6]
        for stop in (96, 90, 35):
            parts = []
            for i, slot in enumerate(slots):
                if 32 * i < stop:
                    payload = pool.view(slot)[4096 : 4096 + layout.chunk_bytes]
                    parts.append(Part(payload, 32 * i, 32 * i + 32, 32 * i, min(stop, 32 * i + 32)))
            for options in (GpuOptions(4096, 2, 7, 3, 64, 0), GpuOptions(), GpuOptions(direct_bytes=1 << 30)):
                gpu.tune(options)
                engine.gather(parts, [blocks]).wait()
                before = [part.clone() for pair in layers for part in pair]
                for pair in layers:
                    for part in pair:
                        part[torch.as_tensor(blocks[: -(-stop // 16)], device="cuda")] = 0
                copy = engine.scatter(parts, [blocks], layerwise=True)
                copy.wait_layer(2)
                copy.wait()
                used = -(-stop // 16) * 16
                for was, now in zip(before, [part for pair in layers for part in pair], strict=True):
                    text_was = was[torch.as_tensor(blocks, device="cuda")].flatten(0, 1)
                    text_now = now[torch.as_tensor(blocks, device="cuda")].flatten(0, 1)
                    assert torch.equal(text_was[:stop], text_now[:stop])
                    assert not text_now[stop:used].any()
                    now.copy_(was)
        gpu.tune(GpuOptions())
        pinner.close()
        pool.close()
    print("well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
