"""One round of the demo: every document, one question each, answered with LMKV and without it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .demo_texts import Document, prompt
from .reuse import KVReuse

__all__ = ["ROUNDS", "Request", "run_round"]

#: Rounds in their order; each asks another question.
ROUNDS = ("cold", "ram", "disk")


@dataclass(frozen=True)
class Request:
    """One answered question, as ``--json`` prints it.

    Args:
        round: ``cold``, ``ram`` or ``disk``.
        document: its name.
        tokens: of the whole prompt.
        hit_tokens: of them, those whose KV was loaded.
        tier: where most of those came from; empty without a hit.
        ttft_s: seconds from handing over the token ids to the first new token.
        ttft_without_cache_s: the same for ``model.generate`` without LMKV.
        speedup: the second over the first.
        answer_equal: whether both gave the same tokens.
        answer: the answer's text.
    """

    round: str
    document: str
    tokens: int
    hit_tokens: int
    tier: str
    ttft_s: float
    ttft_without_cache_s: float
    speedup: float
    answer_equal: bool
    answer: str


class _FirstToken(BaseStreamer):  # type: ignore[misc]  # mypy does not read transformers
    """Notes when the first new token comes; ``generate`` hands over the prompt first."""

    def __init__(self) -> None:
        self.seen = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def run_round(
    name: str,
    title: str,
    reuse: KVReuse,
    tokenizer: Any,
    documents: list[Document],
    max_new_tokens: int,
    report: Callable[[Request], None],
    say: Callable[[str], None],
) -> None:
    """Answer one question about each document and report each; rounds after the first take the documents in mixed order.

    Args:
        name: one of :data:`ROUNDS`.
        title: what the round is called in lines for the user.
        reuse: answers with LMKV, and its model without.
        tokenizer: the model's.
        documents: what is asked about.
        max_new_tokens: length of an answer.
        report: gets each answered question.
        say: gets a line before and after each answer, since one may take many seconds.
    """
    order = list(documents)
    if name != "cold":
        random.Random(name).shuffle(order)
    for number, document in enumerate(order, start=1):
        question = document.questions[ROUNDS.index(name) % len(document.questions)]
        ids = prompt(document, question, tokenizer)
        say(f"{title}, question {number} of {len(order)}: {document.name}, {ids.shape[1]:,} tokens")
        cached, ttft = _answer(reuse.generate, ids, max_new_tokens)
        use = reuse.last_use[0]
        tier = max(use.tiers, key=lambda tier: use.tiers[tier], default="")
        found = f"{use.hit_tokens:,} tokens from {tier}" if tier else "nothing kept yet"
        reuse.store.flush()  # or else its writes would take time from what is measured next
        say(f"  first token after {ttft:.2f} s, {found}; answering once more without LMKV")
        plain, ttft_without = _answer(reuse.model.generate, ids, max_new_tokens)
        equal = torch.equal(cached, plain)
        say(f"  first token after {ttft_without:.2f} s; {'the same answer' if equal else 'ANOTHER ANSWER'}")
        report(
            Request(
                round=name,
                document=document.name,
                tokens=use.tokens,
                hit_tokens=use.hit_tokens,
                tier=tier,
                ttft_s=round(ttft, 4),
                ttft_without_cache_s=round(ttft_without, 4),
                speedup=round(ttft_without / ttft, 2),
                answer_equal=equal,
                answer=tokenizer.decode(cached[0, ids.shape[1] :], skip_special_tokens=True).strip(),
            )
        )


def _answer(generate: Callable[..., torch.Tensor], ids: torch.Tensor, max_new_tokens: int) -> tuple[torch.Tensor, float]:
    """The whole sequence of a greedy answer, and the seconds to its first token."""
    first = _FirstToken()
    mask = torch.ones_like(ids)
    begin = time.perf_counter()
    out = generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, streamer=first)
    return out, first.at - begin
