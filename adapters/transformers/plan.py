"""What a call of ``generate`` is going to do, read from transformers' generation settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ...errors import ArgumentError
from .rows import Row

__all__ = ["generated_texts", "mask_from_padding", "plan_of"]

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


def plan_of(model: PreTrainedModel, given: GenerationConfig | None, settings: Mapping[str, object]) -> GenerationConfig:
    """The settings that ``model.generate(generation_config=given, **settings)`` will use.

    Raises:
        ArgumentError: a setting that is no field of ``GenerationConfig``, or one that can't be served.
    """
    plan = copy.deepcopy(model.generation_config)
    for name in settings:
        if name not in vars(plan):
            raise ArgumentError(f"expected fields of GenerationConfig; got {name!r}, which KVReuse.generate does not take")
    chosen = {} if given is None else {name: value for name, value in given.to_dict().items() if value is not None}
    for name, value in {**chosen, **settings}.items():
        setattr(plan, name, value)
    reason = None
    if plan.get_generation_mode() not in _MODES:
        reason = f"greedy search, sampling or beam search; got {plan.get_generation_mode().value}"
    elif plan.cache_implementation not in (None, "dynamic", "hybrid"):  # transformers reads a default "hybrid" as dynamic
        reason = f"the dynamic cache; got cache_implementation={plan.cache_implementation!r}"
    elif plan.use_cache is False:
        reason = "use_cache=True; got False"
    elif getattr(plan, "token_healing", False):
        reason = "token_healing=False, since it changes the prompt; got True"
    if reason:
        raise ArgumentError(f"expected {reason}: call model.generate for that")
    return plan


def mask_from_padding(input_ids: torch.Tensor, plan: GenerationConfig) -> torch.Tensor | None:
    """The mask that ``model.generate`` would infer: zeros at pad tokens, where there is one that is no end token."""
    pad = plan.pad_token_id
    if pad is None or pad in _end_tokens(plan):
        return None
    mask = input_ids.ne(pad)
    return None if bool(mask.all()) else mask.long()


def generated_texts(
    sequences: torch.Tensor, rows: Sequence[Row], copies: int, plan: GenerationConfig
) -> list[tuple[int, int, torch.Tensor]]:
    """``(cache row, padding, tokens)`` of each generated row: up to its end token, without the last column, which has no KV.

    Args:
        sequences: what was generated, prompts included, [rows * copies, tokens], in host memory.
        rows: the prompts.
        copies: generated rows a prompt.
        plan: names the end tokens.
    """
    ends = torch.tensor(_end_tokens(plan), dtype=sequences.dtype)
    texts = []
    for cache_row, sequence in enumerate(sequences):
        row = rows[cache_row // copies]
        prompt = row.padding + len(row)
        stops = torch.isin(sequence[prompt:], ends).nonzero()
        stop = prompt + int(stops[0]) + 1 if len(stops) else len(sequence)
        texts.append((cache_row, row.padding, sequence[row.padding : min(stop, len(sequence) - 1)]))
    return texts


def _end_tokens(plan: GenerationConfig) -> list[int]:
    eos = plan.eos_token_id
    return [] if eos is None else [int(token) for token in eos] if isinstance(eos, (list, tuple)) else [int(eos)]
