"""A batch as texts: which tokens each row holds without its padding, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ...errors import ArgumentError

__all__ = ["Row", "RowUse", "check_ids", "check_mask", "rows_of"]


@dataclass(frozen=True)
class RowUse:
    """What one call did for one row of its batch.

    Args:
        tokens: the row's tokens without padding.
        hit_tokens: leading tokens whose KV was loaded.
        tiers: where those lay at lookup: tier name -> tokens.
        new_tokens: tokens whose KV was stored.
    """

    tokens: int
    hit_tokens: int = 0
    tiers: Mapping[str, int] = field(default_factory=dict)
    new_tokens: int = 0


@dataclass(frozen=True)
class Row:
    """One row of a batch: ``padding`` columns that mean nothing, then ``tokens`` (uint32)."""

    index: int
    padding: int
    tokens: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.tokens)


def check_ids(input_ids: object, vocabulary: int, device: torch.device) -> None:
    """Prove that ``input_ids`` are a batch of token ids that a model on ``device`` can read.

    Raises:
        ArgumentError: no tensor ``[batch, tokens]`` of int32 or int64, empty, on another device, or an unknown id.
    """
    wanted = "expected input_ids as an int64 tensor [batch, tokens]"
    if not isinstance(input_ids, torch.Tensor):
        raise ArgumentError(f"{wanted}; got {type(input_ids).__name__}: tokenize with return_tensors='pt'")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"{wanted}; got dtype {input_ids.dtype}: pass token ids, not embeddings or probabilities")
    if input_ids.ndim != 2:
        raise ArgumentError(f"{wanted}; got shape {tuple(input_ids.shape)}: one text is input_ids[None]")
    if 0 in input_ids.shape:
        raise ArgumentError(f"{wanted} with at least one token; got shape {tuple(input_ids.shape)}")
    if input_ids.device.type != device.type:
        raise ArgumentError(
            f"expected input_ids on {device}, where the model is; got {input_ids.device}: use .to({str(device)!r})"
        )
    low, high = (int(x) for x in torch.aminmax(input_ids))
    if low < 0 or high >= vocabulary:
        raise ArgumentError(f"expected token ids from 0 to {vocabulary - 1}; got {low if low < 0 else high}: wrong tokenizer?")


def check_mask(attention_mask: object, input_ids: torch.Tensor) -> torch.Tensor:
    """``attention_mask`` on the ids' device, if it pads rows on the left and nothing else.

    Raises:
        ArgumentError: another shape, other values than 0 and 1, an empty row, padding on the right or inside.
    """
    shape = tuple(input_ids.shape)
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != shape:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise ArgumentError(f"expected attention_mask as a tensor of input_ids' shape {shape}; got {got}")
    mask = attention_mask.to(input_ids.device, torch.long)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ArgumentError("expected an attention_mask of zeros and ones; got other values")
    if bool((mask[:, -1] == 0).any()):
        raise ArgumentError("expected each row to end with a token; got padding: use a tokenizer with padding_side='left'")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ArgumentError("expected padding only left of a row's tokens; got zeros between them: pass rows without holes")
    return mask


def rows_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[Row]:
    """The texts of a checked batch, without their padding."""
    ids = input_ids.cpu().numpy().astype(np.uint32)
    paddings = [0] * len(ids) if attention_mask is None else (attention_mask == 0).sum(dim=1).tolist()
    return [Row(i, padding, ids[i, padding:]) for i, padding in enumerate(paddings)]
