"""Test infrastructure: the one function of SGLang's kernels that its CPU engine calls for a plain model (see README.txt)."""

import torch

__version__ = "0.0"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new slots, one request's behind the other's in ``out_cache_loc``, into its row."""
    at = 0
    for row, start, stop in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        count = stop - start
        req_to_token[row, start:stop] = out_cache_loc[at : at + count].to(req_to_token.dtype)
        at += count


def __getattr__(name: str) -> object:
    """Names that SGLang imports on a CPU and calls only for what these tests do not use."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} is not here: this is a stand-in for tests")

    return absent
