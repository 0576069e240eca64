"""``KVReuse``: look a batch up, load what is known, compute the rest, keep what is new.

The KV of a batch stands in columns, padding on the left. Each row's text is looked up by itself, so its hit reaches to another
column; rows that lag behind are computed alone up to the column of the best one, and all go on together from there. At
least the last column is always computed: it yields the logits.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ...chunks import Namespace
from ...config import StoreConfig
from ...errors import ArgumentError, ConfigError, LayoutMismatchError, NativeError
from ...events import EventSink
from ...store import Match, Store
from ...transfer import DenseKV, Gpu
from .model import (
    accepts,
    active_adapters,
    adapter_state,
    cache_argument,
    generate_cache_argument,
    kv_fingerprint,
    layout_from,
    layout_of,
    namespace_settings,
    probe,
)
from .plan import generated_texts, mask_from_padding, plan_of
from .room import Buffers, cache_over, empty_buffers
from .rows import Row, RowUse, check_ids, check_mask, rows_of

__all__ = ["KVReuse", "Prefill"]

#: Columns computed at once behind a loaded prefix. Attention over such a rectangle of queries and keys gets a mask and so does
#: all of its work, where a whole text gets a causal kernel that does half of it; narrow rectangles waste little.
_BLOCK = 512

#: Room for generated tokens that is made before the first one; more is made when needed.
_ROOM = 128


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What :meth:`KVReuse.prefill` returns.

    Args:
        past_key_values: a ``DynamicCache`` with the KV of all given columns, ready for ``model(next_ids, cache=…)``, or
            ``past_key_values=…`` before transformers 5.24.
        logits: of the last position, [batch, vocabulary].
        rows: what was loaded and stored for each row.
    """

    past_key_values: DynamicCache
    logits: torch.Tensor
    rows: tuple[RowUse, ...]

    @property
    def hit_tokens(self) -> tuple[int, ...]:
        """Tokens of each row whose KV was loaded instead of computed."""
        return tuple(row.hit_tokens for row in self.rows)


@dataclasses.dataclass
class _Loaded:
    """A batch whose known prefix lies in a cache."""

    rows: list[Row]
    mask: torch.Tensor | None
    cache: DynamicCache
    uses: list[RowUse]


class KVReuse:
    """Reuse of KV between calls of one model.

    Serves decoders all of whose layers attend to the whole text before (Llama, Qwen2 and 3, Mistral without a window, GPT-NeoX,
    GPT-2, …). May be used from several threads as far as the model itself may.

    Args:
        model: a causal language model in evaluation mode. Its weights and active adapters must stay as they are.
        store: where KV is kept; its layout must be :func:`layout_of` the model and its config must name the model. Keys also
            hold a fingerprint of the model's config and weights, so a name used twice never mixes two models.

    Raises:
        ConfigError: the model's KV can't be kept (the message says why), or the store's config names no model.
        LayoutMismatchError: the store is for KV of another shape, dtype or number of layers.
    """

    def __init__(self, model: PreTrainedModel, store: Store) -> None:
        keys = probe(model)
        layout = layout_from(keys, store.layout.chunk_tokens)
        if layout != store.layout:
            raise LayoutMismatchError(
                f"expected a store with the layout of {type(model).__name__}, {layout.describe}; got {store.layout.describe}: "
                "make it with layout_of(model), or use KVReuse.open(model)"
            )
        if not store.namespace.model:
            raise ConfigError(
                "expected a store whose config names the model; got an empty name: pass StoreConfig(model='name@revision', …)"
            )
        self._adapters, self._adapted = active_adapters(model), adapter_state(model)
        if self._adapters and not store.namespace.lora:
            raise ConfigError(
                f"expected a store whose config names the active adapters {list(self._adapters)}; got none: "
                "pass StoreConfig(lora='name@version', …)"
            )
        self.model = model
        self.store = store
        #: The namespace of this model's keys; ``namespace.replace(salt=…)`` separates tenants.
        self.namespace: Namespace = store.namespace.replace(
            extra=f"{store.namespace.extra}transformers:{kv_fingerprint(model)}"
        )
        self._places = [(key.device, key.dtype) for key in keys]
        self._direct = _copies_directly({key.device for key in keys})
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._owns_store = False
        self._local = threading.local()

    @classmethod
    def open(cls, model: PreTrainedModel, config: StoreConfig | None = None, *, on_event: EventSink | None = None) -> KVReuse:
        """A reuse with a store of its own, which :meth:`close` closes.

        Args:
            model: as for the class.
            config: the store's settings, by default from file and environment; model, revision and RoPE parameters that it
                leaves empty are filled in from the model.
            on_event: as for :class:`lmkv.Store`.

        Raises:
            ConfigError: as for the class; a model made on the spot has no name, which ``config`` then has to give.
        """
        config = StoreConfig.load() if config is None else config
        said = namespace_settings(model)
        config = dataclasses.replace(
            config,
            model=config.model or said["model"],
            revision=config.revision or said["revision"],
            rope=config.rope or said["rope"],
        )
        if not config.model:
            raise ConfigError(
                "expected a model with a name; got one made on the spot: pass StoreConfig(model='a name of your choice', …)"
            )
        store = Store(config, layout_of(model, config.chunk_size or 256), on_event=on_event)
        try:
            reuse = cls(model, store)
        except BaseException:
            store.close()
            raise
        reuse._owns_store = True
        return reuse

    def close(self) -> None:
        """Close the store if :meth:`open` made it. Idempotent."""
        if self._owns_store:
            self._owns_store = False
            self.store.close()

    def __enter__(self) -> KVReuse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def last_use(self) -> tuple[RowUse, ...]:
        """What this thread's last call loaded and stored, one entry a row of its batch."""
        return getattr(self._local, "uses", ())

    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, namespace: Namespace | None = None
    ) -> Prefill:
        """The KV of a batch, as far as possible from the store, and the logits that follow it; stores what was missing.

        Args:
            input_ids: [batch, tokens], on the model's device.
            attention_mask: of the same shape, 0 for padding left of a row; ``None`` where there is none.
            namespace: a variant of :attr:`namespace`.

        Raises:
            ArgumentError: ids, mask or namespace are not that.
        """
        self._check(input_ids, namespace)
        loaded = self._load_batch(input_ids, attention_mask, 0, namespace)
        logits = self._compute(input_ids, loaded.mask, loaded.cache, input_ids.shape[1])
        texts = [(row.index, row.padding, row.tokens) for row in loaded.rows]
        self._keep(loaded, texts, 1, namespace)
        return Prefill(loaded.cache, logits, self.last_use)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        keep_generated: bool = False,
        namespace: Namespace | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Any:
        """``model.generate`` that computes only what the store does not know; what was missing is stored at the end.

        Greedy search, sampling and beam search are served; batches are padded on the left.

        Args:
            input_ids, attention_mask: as for :meth:`prefill`. Without a mask, padding is found as ``model.generate`` does it.
            keep_generated: store the KV of generated tokens, too, so that the next turn of a chat hits them. The last token of
                a row has no KV yet and is left out. Not with beams.
            namespace: a variant of :attr:`namespace`.
            generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer, tokenizer: handed to
                ``model.generate``.
            settings: fields of transformers' ``GenerationConfig``, for example ``max_new_tokens``; nothing else is taken.

        Returns:
            What ``model.generate`` returns.

        Raises:
            ArgumentError: an argument that is no such field or can't be served; ids or mask as for :meth:`prefill`.
        """
        plan = plan_of(self.model, generation_config, settings)
        beams = plan.num_beams or 1
        if beams > 1 and keep_generated:
            raise ArgumentError(
                f"expected keep_generated=False with beams; got num_beams={beams}: a beam's KV is spread over rows"
            )
        self._check(input_ids, namespace)
        if attention_mask is None:
            attention_mask = mask_from_padding(input_ids, plan)
        room = min(_ROOM, plan.max_new_tokens or _ROOM)
        loaded = self._load_batch(input_ids, attention_mask, room, namespace)
        if loaded.cache.get_seq_length():
            self._compute(input_ids, loaded.mask, loaded.cache, input_ids.shape[1] - _BLOCK)
        copies = max(beams, plan.num_return_sequences or 1)
        if copies > 1:
            loaded.cache.batch_repeat_interleave(copies)
        extra = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, "streamer": streamer}
        extra |= {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn, "tokenizer": tokenizer}
        extra = {name: value for name, value in extra.items() if value is not None}
        out = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids) if loaded.mask is None else loaded.mask,
            generation_config=generation_config,
            **{generate_cache_argument(): loaded.cache},
            **extra,
            **settings,
        )
        texts = [(row.index * copies, row.padding, row.tokens) for row in loaded.rows]
        if keep_generated:
            sequences = out if isinstance(out, torch.Tensor) else out.sequences
            texts = generated_texts(sequences.cpu(), loaded.rows, copies, plan)
        self._keep(loaded, texts, copies, namespace)
        return out

    # Loading

    def _load_batch(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, room: int, namespace: Namespace | None
    ) -> _Loaded:
        mask = None if attention_mask is None else check_mask(attention_mask, ids)
        if mask is not None and bool(mask.all()):
            mask = None
        rows = rows_of(ids, mask)
        batch, width = ids.shape
        matches = [self._lookup(row, namespace) for row in rows]
        if batch > 1:  # slow tiers read for all rows at once
            for match in matches:
                if match is not None and match.hit_tokens:
                    self.store.prefetch(match)
        group = self.store.layout.groups[0]
        buffers = empty_buffers(self._places, (batch, group.heads, width + room, group.head_size))
        hits = [self._load_row(row, match, buffers) for row, match in zip(rows, matches, strict=True)]
        start = max((row.padding + hit for row, hit in zip(rows, hits, strict=True) if hit), default=0)
        for row, hit in zip(rows, hits, strict=True):
            self._catch_up(row, hit, start, ids, buffers)
        uses = [RowUse(len(row), hit, _tiers(match, hit)) for row, match, hit in zip(rows, matches, hits, strict=True)]
        self._local.uses = tuple(uses)
        return _Loaded(rows, mask, cache_over(buffers, start), uses)

    def _check(self, input_ids: object, namespace: Namespace | None) -> None:
        check_ids(input_ids, self._vocabulary, self._device())
        if self.model.training:
            raise ConfigError("expected the model in evaluation mode (dropout changes its KV); call model.eval() first")
        if adapter_state(self.model) != self._adapted:
            names = active_adapters(self.model)
            other = "these with other scales or layers, or merged" if names == self._adapters else list(names)
            raise ConfigError(
                f"expected the adapters that were active when KVReuse was made, {list(self._adapters)}; got {other}: "
                "make a KVReuse for each set of adapters"
            )
        if namespace is not None and (namespace.extra, namespace.layout) != (self.namespace.extra, self.namespace.layout):
            raise ArgumentError(
                "expected a variant of this reuse's namespace; got one of another model: use reuse.namespace.replace(…)"
            )

    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def _lookup(self, row: Row, namespace: Namespace | None) -> Match | None:
        """What the store knows of a row's tokens, the last one left out: it is computed for its logits."""
        if len(row) < 2:
            return None
        match = self.store.lookup(row.tokens[:-1], namespace=namespace or self.namespace)
        return match.wait(self.store.config.deadline_seconds) if match.pending else match

    def _load_row(self, row: Row, match: Match | None, buffers: Buffers) -> int:
        """Copy a row's known prefix into its columns; returns its tokens."""
        if match is None or not match.hit_tokens:
            return 0
        with self.store.lease(match) as lease:
            if not lease.hit_tokens:
                return 0
            begin, end = row.padding, row.padding + lease.hit_tokens
            parts = [tuple(t[row.index, :, begin:end] for t in pair) for pair in buffers]
            if self._direct:
                return self.store.retrieve(lease, DenseKV(parts))
            hosts = [tuple(torch.empty(t.shape, dtype=t.dtype) for t in pair) for pair in parts]
            loaded = self.store.retrieve(lease, DenseKV(hosts))
        for pair, host in zip(parts, hosts, strict=True):
            for target, source in zip(pair, host, strict=True):
                target[:, :loaded] = source[:, :loaded]
        return loaded

    def _catch_up(self, row: Row, hit: int, start: int, ids: torch.Tensor, buffers: Buffers) -> None:
        """Fill a row's columns before ``start``: zeros under its padding, its KV behind ``hit`` computed alone."""
        own = min(row.padding, start)
        for pair in buffers:
            for tensor in pair:
                tensor[row.index, :, :own] = 0  # masked, but what lies there must be a number
        if row.padding + hit >= start:
            return
        views = [(k[row.index, None, :, row.padding : start], v[row.index, None, :, row.padding : start]) for k, v in buffers]
        self._compute(ids[row.index, None, row.padding : start], None, cache_over(views, hit), start - row.padding)

    def _compute(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: DynamicCache, stop: int) -> torch.Tensor | None:
        """Append the KV of columns up to ``stop`` to ``cache``; logits of the last one, or ``None`` if all were there."""
        arguments: dict[str, Any] = {cache_argument(self.model): cache, "use_cache": True}
        if accepts(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits: torch.Tensor | None = None
        start = cache.get_seq_length()
        while start < stop:
            end = min(stop, start + _BLOCK) if start else stop
            if mask is not None:
                arguments["attention_mask"] = mask[:, :end]
            if accepts(self.model, "position_ids"):
                arguments["position_ids"] = positions[:, start:end]
            with torch.no_grad():
                out = self.model(input_ids=ids[:, start:end], **arguments)
            logits = out.logits[:, -1]
            start = end
        return logits

    # Keeping

    def _keep(self, loaded: _Loaded, texts: Sequence[tuple[int, int, Any]], copies: int, namespace: Namespace | None) -> None:
        """Store ``(cache row, padding, tokens)`` texts and note how much was new."""
        new = [0] * len(loaded.rows)
        step = self.store.layout.chunk_tokens
        for cache_row, padding, tokens in texts:
            use = loaded.uses[cache_row // copies]
            start = use.hit_tokens - use.hit_tokens % step  # chunks before were found whole
            begin, end = padding + start, padding + len(tokens)
            parts = [
                (layer.keys[cache_row, :, begin:end], layer.values[cache_row, :, begin:end]) for layer in loaded.cache.layers
            ]
            if not self._direct:
                parts = [(keys.cpu(), values.cpu()) for keys, values in parts]
            source = DenseKV(parts, first_token=start)
            new[cache_row // copies] += self.store.store(tokens, source, start=start, namespace=namespace or self.namespace)
        self._local.uses = tuple(dataclasses.replace(use, new_tokens=n) for use, n in zip(loaded.uses, new, strict=True))


def _copies_directly(devices: set[torch.device]) -> bool:
    """Whether the store copies from and to tensors there itself; else they pass through host memory."""
    if len(devices) != 1:
        return False
    device = next(iter(devices))
    if device.type != "cuda":
        return device.type == "cpu"
    try:
        Gpu.of(device.index or 0)
    except NativeError:  # no driver of the kind we know, or no kernels for it
        return False
    return True


def _tiers(match: Match | None, hit_tokens: int) -> dict[str, int]:
    """Where the first ``hit_tokens`` tokens lay at lookup."""
    tiers: dict[str, int] = {}
    for hit in match.hits if match else ():
        tokens = min(hit.tokens, hit_tokens - hit.start)
        if tokens > 0:
            tiers[hit.tier] = tiers.get(hit.tier, 0) + tokens
    return tiers
