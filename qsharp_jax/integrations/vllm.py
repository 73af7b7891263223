"""Guided decoding in vLLM: a plugin of the group `vllm.logits_processors`, with eta and guides by request.

QSHARP_GUIDES="NAME=FOLDER,..." names the guides. A request with `eta` in its `vllm_xargs` (`extra_args` in Python) is
steered, by the scoring of `integrations/transformers.py`; others are left alone. One class has the interfaces of both
model runners of vLLM: V1, whose rows move, and V2, whose requests keep a slot. Guides run in PyTorch in their process.
Shapes: B rows of one group of guides, T tokens.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qsharp_jax.integrations.transformers import LEAST_ETA, Guide, GuideCache, check, read_config, steer

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
except ImportError:  # a vLLM without the model runner V2; V1 asks for no base class
    LogitsProcessor = object

VARIABLE = "QSHARP_GUIDES"


class Request:
    """The settings of a guided request, of a request's `SamplingParams`.

    Attributes:
      eta, weights: as in `GuidanceLogitsProcessor`.
      group: names of the guides, mode, others and top_k_candidates: requests with the same ones are scored together.
      temperature: which will divide the logits; 1 for greedy decoding.
      source: where its tokens come from: V1's lists of prompt and output tokens, or V2's slot.
      cached: how many of its tokens the guides' caches have.

    Raises:
      ValueError: naming the first field that is out of range.
    """

    def __init__(self, params: Any, source: Any = None):
        fields, known = params.extra_args, folders()
        if not known:
            raise ValueError(f"there are no guides here; start vLLM with {VARIABLE}=NAME=FOLDER")
        self.eta = fields["eta"]
        if not (_is_number(self.eta) and self.eta >= LEAST_ETA):
            raise ValueError(f"eta is {self.eta!r}; it must be a number of at least {LEAST_ETA:g}")
        guide = fields.get("guide", [*known] if len(known) == 1 else None)
        names = tuple(guide) if isinstance(guide, list | tuple) else (guide,)
        if not names or not all(isinstance(name, str) and name in known for name in names):
            raise ValueError(f"guide is {guide!r}; it must be one of {', '.join(known)}, or a list of them")
        weights, count = fields.get("weights"), fields.get("top_k_candidates", 20)
        if not (weights is None or isinstance(weights, list) and all(map(_is_number, weights))):
            raise ValueError(f"weights are {weights!r}; they must be a list of numbers, one for each guide")
        if not isinstance(count, int):
            raise ValueError(f"top_k_candidates is {count!r}; it must be a whole number")
        mode, others = fields.get("mode", "qsharp"), fields.get("others", "mass")
        self.weights = check([_meaning(known[name]) for name in names], weights, mode, others, count)
        self.group = names, mode, others, count
        self.temperature = params.temperature or 1.0
        self.source, self.cached = source, 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@functools.cache
def folders() -> dict[str, str]:
    """The guides' folders or hub ids, by their names; raises a ValueError for a variable of another form."""
    entries = [entry.strip() for entry in os.environ.get(VARIABLE, "").split(",") if entry.strip()]
    pairs = [entry.partition("=") for entry in entries]
    if not all(name and folder for name, _, folder in pairs):
        raise ValueError(
            f"{VARIABLE} is {os.environ[VARIABLE]!r}; it must be NAME=FOLDER, or several with commas between"
        )
    return {name: folder for name, _, folder in pairs}


@functools.cache
def _meaning(folder: str) -> dict:
    return read_config(folder).qsharp


def _request(params: Any, source: Any) -> Request | None:
    return Request(params, source) if "eta" in (params.extra_args or {}) else None


class Batch:
    """The guides' keys and values of a group's requests, a row each, padded on the left."""

    def __init__(self, guides: Sequence[Guide]):
        self.caches = [GuideCache(guide) for guide in guides]
        self.requests: list[Request] = []

    def steer(self, logits: Tensor, requests: Sequence[Request], tokens: Sequence[Any]) -> Tensor:
        """The guided logits [B, V] of the tokens after B sequences, from the reference's [B, V]."""
        lengths = [len(row) for row in tokens]
        if self.requests != [*requests] or any(
            request.cached != length - 1 for request, length in zip(requests, lengths, strict=True)
        ):
            self._arrange(requests, tokens)
        longest, device = max(lengths), logits.device
        attention = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long().to(device)

        def of_rows(numbers: list) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float32, device=device)

        _, mode, others, count = requests[0].group
        guided = steer(
            logits, self.caches, _ids(self.caches[0].guide, [row[-1] for row in tokens]), attention,
            eta=of_rows([request.eta for request in requests]), mode=mode, others=others, count=count,
            temperature=of_rows([request.temperature for request in requests]),
            weights=of_rows([request.weights for request in requests]),
        )  # fmt: skip
        for request, length in zip(requests, lengths, strict=True):
            request.cached = length
        self.requests = [*requests]
        return guided

    def _arrange(self, requests: Sequence[Request], tokens: Sequence[Any]) -> None:
        """Bring all tokens but the last of every row into the caches, rows in the order of the requests.

        Rows that only miss their last token stay as they are, all at once; the tokens that others miss, such as whole
        prompts, go through the guides a row at a time.
        """
        places = {request: place for place, request in enumerate(self.requests)}
        rest = [
            row for row, (request, known) in enumerate(zip(requests, tokens, strict=True))
            if request not in places or request.cached != len(known) - 1
        ]  # fmt: skip
        ready = [row for row in range(len(requests)) if row not in rest]
        order = torch.tensor([*ready, *rest]).argsort()
        for number, cache in enumerate(self.caches):
            parts = [_rows(cache, [places[requests[row]] for row in ready])] if ready else []
            for row in rest:
                place, length = places.get(requests[row]), len(tokens[row]) - 1
                part = GuideCache(cache.guide) if place is None else _rows(cache, [place], requests[row].cached)
                part.crop(length)
                if (known := part.layers.get_seq_length()) < length:
                    missing = _ids(cache.guide, tokens[row][known:length])
                    part.extend(missing[None], torch.ones(1, length, dtype=torch.long))
                parts.append(part)
            self.caches[number] = _joined(parts, max(map(len, tokens)) - 1)
            self.caches[number].layers.batch_select_indices(order.to(cache.guide.device))


def _ids(guide: Guide, tokens: Any) -> Tensor:
    """Token ids that the guide has: a prompt given as ids may have some that only pad the reference's embedding."""
    return torch.as_tensor(tokens, device=guide.device).long().clamp(max=guide.vocab_size - 1)


def _rows(cache: GuideCache, rows: list[int], length: int | None = None) -> GuideCache:
    """Some rows of a cache, their last `length` positions."""
    part = GuideCache(cache.guide)
    for number, layer in enumerate(cache.layers.layers):
        begin = 0 if length is None else layer.keys.shape[2] - length
        part.layers.update(layer.keys[rows, :, begin:], layer.values[rows, :, begin:], number)
    return part


def _joined(parts: Sequence[GuideCache], length: int) -> GuideCache:
    """The rows of several caches in one of `length` positions, padded or cut on the left; empty ones have a row."""
    whole = GuideCache(parts[0].guide)
    filled = [part for part in parts if part.layers.get_seq_length()]
    for number, like in enumerate(filled[0].layers.layers if filled else ()):
        layers = [part.layers.layers[number] if part in filled else None for part in parts]
        keys = [like.keys[:1, :, :0] if layer is None else layer.keys for layer in layers]
        values = [like.values[:1, :, :0] if layer is None else layer.values for layer in layers]
        pair = (torch.cat([F.pad(x, (0, 0, length - x.shape[2], 0)) for x in side]) for side in (keys, values))
        whole.layers.update(*pair, number)
    return whole


class GuidanceLogitsProcessor(LogitsProcessor):
    """Steer vLLM's requests; see the module's docstring.

    Args:
      vllm_config: vLLM's `VllmConfig`.
      place: V1's device, or V2's state of the requests, which has the device too.
      is_pin_memory: of V1.

    Raises:
      ValueError: if a guide does not fit the model's length, or for a setting under which tokens are not known.
    """

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool = False):
        self.states = None if isinstance(place, torch.device) else place
        device = place if self.states is None else place.device
        self.requests: dict[int, Request] = {}  # by V1's row, or V2's slot
        self.batches: dict[tuple, Batch] = {}
        self.guides = {name: Guide.from_pretrained(folder, device=device) for name, folder in folders().items()}
        if not self.guides:
            return
        model = vllm_config.model_config
        if vllm_config.speculative_config or model.enable_prompt_embeds:
            raise ValueError("guides take tokens one by one: leave speculative decoding and prompt embeddings out")
        # V1 gives drawn tokens to a plugin too late then, unless a processor is named by --logits-processors as well.
        if self.states is None and vllm_config.scheduler_config.async_scheduling and not model.logits_processors:
            raise ValueError("guides need every token before the next: start vLLM with --no-async-scheduling")
        for name, guide in self.guides.items():
            longest = guide.trunk.config.max_position_embeddings
            if longest < model.max_model_len:
                raise ValueError(f"the guide {name} has {longest} positions; start vLLM with --max-model-len {longest}")

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise a ValueError, which vLLM answers with, for a request whose fields are out of range."""
        if "eta" in (sampling_params.extra_args or {}):
            Request(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow V1's rows: some are removed, some added, then some moved."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            self._put(row, _request(params, (prompt, output)))
        for row, other, way in batch_update.moved:
            moved, replaced = self.requests.pop(row, None), self.requests.pop(other, None)
            self._put(other, moved)
            if way.name == "SWAP":
                self._put(row, replaced)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take over V2's slot for a request; return whether it is guided."""
        self._put(req_idx, _request(sampling_params, req_idx))
        return req_idx in self.requests

    def _put(self, place: int, request: Request | None) -> None:
        self.requests.pop(place, None)
        if request is not None:
            self.requests[place] = request

    @torch.inference_mode()
    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Steer the guided rows of the logits, in place; `ctx` is V2's layout of the rows."""
        if ctx is None:
            sequences = [(row, request, sum(request.source, [])) for row, request in self.requests.items()]
        else:
            slots = zip(ctx.idx_mapping_np.tolist(), ctx.seq_lens_upper_bound_np.tolist(), strict=True)
            sequences = [
                (row, self.requests[slot], self.states.all_token_ids.gpu[slot, :length])
                for row, (slot, length) in enumerate(slots)
                if slot in self.requests
            ]
        groups: dict[tuple, list] = {}
        for entry in sequences:
            groups.setdefault(entry[1].group, []).append(entry)
        batches = {}
        for group, entries in groups.items():
            batches[group] = self.batches.get(group) or Batch([self.guides[name] for name in group[0]])
            rows, requests, tokens = map(list, zip(*entries, strict=True))
            logits[rows] = batches[group].steer(logits[rows], requests, tokens).to(logits.dtype)
        self.batches = batches  # without groups that have ended
        return logits
