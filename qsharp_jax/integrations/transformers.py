"""Guided decoding in `transformers`: a logits processor, and a `generate` for `custom_generate`, in PyTorch.

pi(y|x) ∝ pi_ref(y|x) E_{z~Z(x,y)}[exp(z/eta)] ("Q#", arXiv 2502.20548): the guide scores the likeliest tokens, and
their log-weights are added to the logits before temperature, top-k and top-p. This file needs torch and transformers
alone: `qsharp export` puts a copy of it beside every guide, as custom_generate/generate.py.
Shapes: B rows, T tokens, V vocabulary, K candidates, M outputs of the guide, G guides.
"""

import functools
import inspect
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

MODES = ("qsharp", "cd", "expectation")
OTHERS = ("mass", "prefix", "zero")
LEAST_ETA = 1e-6  # below it float32 no longer tells the values of two tokens apart, once divided by eta


class Guide:
    """A value model: a decoder's trunk and a head that gives the distribution of the reward-to-go.

    A V-type's head has M outputs at a token's own position; a Q-type's one for each token of the vocabulary, at the
    position before it: logits of the distribution ("bernoulli", "categorical" on atoms [M]), or its mean ("scalar").
    """

    def __init__(self, trunk: torch.nn.Module, head: torch.nn.Linear, meaning: dict):
        self.trunk, self.head, self.meaning = trunk, head, meaning
        self.type, self.distribution = meaning["type"], meaning["distribution"]
        self.device, self.vocab_size = head.weight.device, trunk.config.vocab_size
        self.atoms = torch.tensor(meaning.get("atoms") or [], device=self.device)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, dtype: Any = "auto", device: Any = "cpu") -> "Guide":
        """Load a guide that `qsharp export` wrote, from a folder or the hub; a ValueError for another model."""
        config = read_config(folder)
        q_type = config.qsharp["type"] == "q"
        kind = transformers.AutoModelForCausalLM if q_type else _classifier(config.model_type)
        model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
        model.eval().requires_grad_(False)
        head = model.get_output_embeddings() if q_type else getattr(model, "score", None) or model.classifier
        return cls(model.base_model, head, config.qsharp)

    def outputs(self, hidden: Tensor, tokens: Tensor | None) -> Tensor:
        """Float32 outputs [B, N, M] for hidden [B, N, D]; of a Q-type [B, K, 1] of tokens [B, K], or all [B, V, 1]."""
        weight = self.head.weight
        if self.type == "v":
            return F.linear(hidden.float(), weight.float(), self.head.bias.float())
        columns = weight[None] if tokens is None else weight[tokens]
        return torch.einsum("bod,bkd->bko", hidden.float(), columns.float())

    def log_weights(self, outputs: Tensor, eta: Tensor, mode: str) -> Tensor:
        """Log-weights in nats: log E exp(z/eta) ("qsharp"), E z / eta ("cd"), or log E z ("expectation").

        [B, K, M] float32 and eta [B] in (0, inf] -> [B, K]; inf gives 0.
        """
        eta, single = eta[:, None], outputs[..., 0]
        if self.distribution == "bernoulli":
            log_mgf, mean, log_mean = _bernoulli_log_mgf(single, eta), single.sigmoid(), F.logsigmoid(single)
        elif self.distribution == "categorical":
            log_mgf, mean = _categorical_log_mgf(outputs, self.atoms, eta[..., None]), outputs.softmax(-1) @ self.atoms
            log_mean = (outputs.log_softmax(-1) + self.atoms.log()).logsumexp(-1)
        else:
            log_mgf, mean, log_mean = single / eta, single, single.clamp(min=0).log()
        return {"qsharp": log_mgf, "cd": mean / eta, "expectation": torch.where(eta.isinf(), 0, log_mean)}[mode]


def read_config(folder: str | os.PathLike) -> Any:
    """Return a guide's config.json, whose entry "qsharp" says what the outputs mean; a ValueError for another model."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if not getattr(config, "qsharp", None):
        raise ValueError(f'{folder} is not a guide: its config.json has no entry "qsharp"; give an exported guide')
    return config


def _classifier(model_type: str) -> Any:
    """The class of token classifiers; `transformers` has none of Gemma 3's text models."""
    if model_type != "gemma3_text":
        return transformers.AutoModelForTokenClassification
    from transformers.modeling_layers import GenericForTokenClassification

    class Gemma3TextForTokenClassification(GenericForTokenClassification, transformers.Gemma3PreTrainedModel):
        config_class = transformers.Gemma3TextConfig

    return Gemma3TextForTokenClassification


def _bernoulli_log_mgf(logits: Tensor, eta: Tensor) -> Tensor:
    """softplus(logits + 1/eta) - softplus(logits), without its cancellation: see `qsharp_jax.values`."""
    tilt = 1 / eta
    weak = torch.log1p(logits.sigmoid() * torch.expm1(tilt.clamp(max=1)))
    shifted = logits + tilt
    strong = torch.minimum(shifted.clamp(min=0), tilt) + (-shifted.abs()).exp().log1p() - (-logits.abs()).exp().log1p()
    return torch.where(tilt <= 1, weak, strong)


def _categorical_log_mgf(logits: Tensor, atoms: Tensor, eta: Tensor) -> Tensor:
    """logsumexp(log_softmax(logits) + atoms/eta), [B, K], with digits as in `qsharp_jax.values`."""
    weak = torch.log1p((logits.softmax(-1) * torch.expm1((atoms / eta).clamp(-1, 1))).sum(-1))
    logits = logits.clamp(min=torch.finfo(logits.dtype).min)  # -inf has no whole part
    whole = logits.round()
    rest = logits - whole
    whole = whole - whole.amax(-1, keepdim=True)
    rest_tilt = atoms.fmod(eta)  # exact, unlike division
    whole_tilt = ((atoms - rest_tilt) / eta).round()
    strong = (whole + whole_tilt + (rest + rest_tilt / eta)).logsumexp(-1) - (whole + rest).logsumexp(-1)
    return torch.where((atoms.abs() <= eta).all(-1), weak, strong)


class GuideCache:
    """A guide's keys and values of some rows' tokens [B, T], padded on the left; layers with a window keep them all."""

    def __init__(self, guide: Guide):
        self.guide = guide
        self.layers = transformers.DynamicCache()
        parameters = inspect.signature(guide.trunk.forward).parameters
        self._name = "cache" if "cache" in parameters else "past_key_values"  # before transformers 5.24

    def crop(self, length: int) -> None:
        """Keep the first `length` positions."""
        if length < self.layers.get_seq_length():
            self.layers.crop(length - self.layers.get_seq_length())

    def extend(self, tokens: Tensor, attention: Tensor) -> None:
        """Append tokens [B, N] with the mask [B, T + N] of all tokens."""
        tokens, attention = tokens.to(self.guide.device), attention.to(self.guide.device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)  # in the row; 0 at padding
        self._forward(tokens, attention, positions[:, -tokens.shape[1] :])

    def score(self, pending: Tensor, attention: Tensor, candidates: Tensor) -> Tensor:
        """Append the pending tokens [B], with the mask [B, T + 1] of all; return hidden states [B, 1, D].

        A V-type sees the candidates [B, K] for the position after in the same pass, [B, 1 + K, D]; they are not kept.
        """
        pending, attention, candidates = (x.to(self.guide.device) for x in (pending, attention, candidates))
        place = attention.sum(1, keepdim=True) - 1
        if self.guide.type == "q":
            return self._forward(pending[:, None], attention, place)
        count = candidates.shape[1]
        tokens = torch.cat([pending[:, None], candidates], 1)
        positions = torch.cat([place, (place + 1).expand(-1, count)], 1)
        config = self.guide.trunk.config
        window = getattr(config, "sliding_window", None)
        masks: Any = _mask(attention, count, window)
        if getattr(config, "layer_types", None):
            masks = {"full_attention": _mask(attention, count, None), "sliding_attention": masks}
        hidden = self._forward(tokens, masks, positions)
        self.layers.crop(-count)
        return hidden

    def _forward(self, tokens: Tensor, attention: Any, positions: Tensor) -> Tensor:
        caches = {self._name: self.layers, "use_cache": True}
        return self.guide.trunk(tokens, attention_mask=attention, position_ids=positions, **caches).last_hidden_state


def _mask(attention: Tensor, count: int, window: int | None) -> Tensor:
    """The mask [B, 1, 1 + K, T + K] of the pending token and `count` candidates, which see tokens and themselves."""
    length = attention.shape[1]
    keys = torch.arange(length, device=attention.device)
    queries = torch.arange(1 + count, device=attention.device).clamp(max=1)[:, None] + (length - 1)  # slots
    visible = attention.bool()[:, None, :].expand(-1, 1 + count, -1)
    if window:
        visible = visible & (queries - keys < window)
    own = F.pad(torch.eye(count, dtype=torch.bool, device=attention.device), (0, 0, 1, 0))  # [1 + K, K]
    return torch.cat([visible, own.expand(len(attention), -1, -1)], 2)[:, None]


def steer(
    ref_logits: Tensor,
    caches: Sequence[GuideCache],
    pending: Tensor,
    attention: Tensor,
    *,
    eta: Tensor,
    temperature: Tensor,
    weights: Tensor,
    mode: str,
    others: str,
    count: int,
) -> Tensor:
    """The guided policy's float32 logits [B, V], before temperature and truncation.

    Args:
      ref_logits: [B, V] of the reference, for the next token.
      caches: one per guide, all V-types or all Q-types, with all tokens but the last.
      pending: [B], the last token of every row, which is appended to the caches.
      attention: [B, T], the mask of all tokens, padded on the left.
      eta, temperature: [B]; the temperature that will divide the logits, 1 for greedy decoding.
      weights: [B, G], what each guide's log-weights are multiplied by.
      mode, others, count: as in `check`; K is `count`.
    """
    size = ref_logits.shape[1]
    known = min(size, *(cache.guide.vocab_size for cache in caches))
    ref_logits = ref_logits[:, :known].float()  # ids from there on pad the embedding and are never drawn
    candidates = ref_logits.topk(min(count, known)).indices  # [B, K]
    zero = -math.inf if mode == "expectation" else 0.0  # the log-weight of reward 0
    scores, rest = 0, 0
    for g, cache in enumerate(caches):
        guide, weight = cache.guide, weights[:, g : g + 1]
        hidden = cache.score(pending, attention, candidates)
        scored = None if others == "prefix" else candidates.to(guide.device)
        new = guide.log_weights(guide.outputs(hidden, scored), eta.to(guide.device), mode).to(ref_logits)
        of_others = torch.where(eta.isfinite(), zero, 0.0)[:, None]
        if guide.type == "v":  # the pending token's comes first
            of_others = new[:, :1] if others == "prefix" else of_others
            new = new[:, 1:]
        scores, rest = scores + weight * new, rest + weight * of_others
    if guide.type == "q" and others == "prefix":  # every token is scored
        scores = scores[:, :known]
        logits = ref_logits + (scores - _mass(ref_logits, scores, temperature))
    else:
        of_candidates = ref_logits.gather(1, candidates)
        rest = _mass(of_candidates, scores, temperature) if others == "mass" else rest
        shift = torch.where(rest.isfinite(), rest, 0)  # changes no policy, and with equal log-weights no logit
        logits = (ref_logits + (rest - shift)).scatter(1, candidates, of_candidates + (scores - shift))
    return F.pad(logits, (0, size - known), value=-math.inf)


def _mass(ref_logits: Tensor, log_weights: Tensor, temperature: Tensor) -> Tensor:
    """T log E exp(log_weights / T), [B, 1], over pi_ref at T of the scored tokens [B, K], which keep their mass."""
    temperature = temperature[:, None]
    probs = (ref_logits / temperature).softmax(-1)
    possible = ref_logits > -math.inf
    largest = log_weights.where(possible, -math.inf).amax(-1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0)
    excess = torch.where(possible, log_weights - largest, 0) / temperature  # <= 0
    # Near 1 the mean is taken as its difference to 1, which is exactly 0 where all log-weights are equal.
    mean = (probs * excess.exp()).sum(-1, keepdim=True)
    difference = (probs * excess.expm1()).sum(-1, keepdim=True)
    return largest + temperature * torch.where(mean > 0.5, difference.log1p(), mean.log())


def check(guides: Sequence[dict], weights: Sequence[float] | None, mode: str, others: str, count: int) -> list[float]:
    """Return the weights of guides, or raise a ValueError that names the first setting out of range.

    `guides` are the entries "qsharp" of their config.json; the rest is as in `GuidanceLogitsProcessor`.
    """
    for name, value, choices in (("mode", mode, MODES), ("others", others, OTHERS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    if len({guide["type"] for guide in guides}) != 1:
        raise ValueError("guides that are composed must be V-types, or Q-types, all of them, and at least one")
    atoms = [atom for guide in guides for atom in guide.get("atoms") or []]
    negative = min(atoms, default=0) < 0 or any(guide["distribution"] == "scalar" for guide in guides)
    if mode == "expectation" and negative:
        raise ValueError(
            'mode "expectation" takes the logarithm of the mean, so the guide must not give negative ones; use a'
            " bernoulli guide, or a categorical one with atoms of 0 and more"
        )
    weights = [1.0] if weights is None and len(guides) == 1 else list(weights or [])
    least = 0 if mode == "expectation" else -math.inf
    if len(weights) != len(guides) or not all(least < weight < math.inf for weight in weights):
        raise ValueError(f"weights are {weights}; give {len(guides)} numbers above {least} and below inf")
    if count < 1:
        raise ValueError(f"top_k_candidates is {count}; it must be at least 1")
    return weights


class GuidanceLogitsProcessor(transformers.LogitsProcessor):
    """Steer `model.generate(**inputs, logits_processor=[GuidanceLogitsProcessor(...)])` with a guide, or several.

    It keeps the guides' keys and values between steps, and begins with the first token that differs from those that it
    has seen: one processor serves one batch of prompts, or the turns of one conversation.

    Args:
      guides: a `Guide`, or a folder or hub id to load on the CPU, or a list of them, whose tilts are multiplied.
      eta: weight of the KL, in the unit of the rewards: small is strong guidance, inf the reference alone. One number,
        or one for each prompt.
      weights: [G], what each guide's log-weights are multiplied by; needed for several guides.
      mode: how values tilt: "qsharp", log E exp(z/eta); "cd", E z/eta; or "expectation", log E z.
      others: log-weight of tokens that the guide does not score: "mass", so that the scored ones keep their mass under
        the reference; "prefix", the guide's own of the text so far; or "zero", that of reward 0.
      top_k_candidates: how many of the likeliest tokens the guide scores at each step.
      temperature: the one that `generate` samples with, 1 for greedy decoding; "mass" depends on it.
      attention_mask: [prompts, T] of the prompts, padded on the left; needed where they differ.

    Raises:
      ValueError: naming the first argument that is out of range; in a step, for a batch that they do not fit.
    """

    def __init__(
        self,
        guides: Any,
        *,
        eta: float | Sequence[float] | Tensor,
        weights: Sequence[float] | None = None,
        mode: str = "qsharp",
        others: str = "mass",
        top_k_candidates: int = 20,
        temperature: float = 1.0,
        attention_mask: Tensor | None = None,
    ):
        listed = guides if isinstance(guides, list | tuple) else [guides]
        loaded = [Guide.from_pretrained(one) if isinstance(one, str | os.PathLike) else one for one in listed]
        self.weights = check([guide.meaning for guide in loaded], weights, mode, others, top_k_candidates)
        self.eta = torch.as_tensor(eta, dtype=torch.float32)
        if self.eta.dim() > 1 or not (self.eta >= LEAST_ETA).all():
            raise ValueError(f"eta is {eta}; it must be a number of at least {LEAST_ETA:g}, or one for each prompt")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; it must be above 0, and 1 for greedy decoding")
        self.mode, self.others, self.count = mode, others, top_k_candidates
        self.temperature, self.mask = temperature, attention_mask
        self.caches = [GuideCache(guide) for guide in loaded]
        self._seen: Tensor | None = None  # [B, T], the tokens in the caches

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the guided logits [B, V] of the tokens after `input_ids` [B, T], from the reference's [B, V]."""
        rows, length = input_ids.shape
        eta = self._per_row("eta", self.eta.reshape(-1), rows).to(scores.device)
        if eta.isinf().all():
            return scores
        attention = self._attention(input_ids)
        common = self._common(input_ids)
        if common == 0:
            self.caches = [GuideCache(cache.guide) for cache in self.caches]
        for cache in self.caches:
            cache.crop(common)
            if common < length - 1:
                cache.extend(input_ids[:, common:-1], attention[:, :-1])
        self._seen = input_ids.clone()
        weights = torch.tensor([self.weights], device=scores.device).expand(rows, -1)
        return steer(
            scores, self.caches, input_ids[:, -1], attention, eta=eta, weights=weights, mode=self.mode,
            temperature=torch.full_like(eta, self.temperature), others=self.others, count=self.count,
        ).to(scores.dtype)  # fmt: skip

    def _per_row(self, name: str, values: Tensor, rows: int) -> Tensor:
        """Repeat the prompts' entries for each prompt's samples, [B, ...]."""
        if rows % len(values):
            raise ValueError(f"{name} has {len(values)} entries for {rows} rows; give one, or one for each prompt")
        return values.repeat_interleave(rows // len(values), 0)

    def _attention(self, input_ids: Tensor) -> Tensor:
        """The mask [B, T] of the prompts and of what was generated."""
        if self.mask is None:
            if self._seen is None and (input_ids != input_ids[:1]).any():
                raise ValueError("the prompts differ; give attention_mask, which says where short ones are padded")
            return torch.ones_like(input_ids)
        mask = self._per_row("attention_mask", self.mask.to(input_ids), len(input_ids))
        if mask.shape[1] > input_ids.shape[1] or not mask[:, -1].all():
            raise ValueError("attention_mask must have an entry for every token of the prompts, padded on the left")
        return F.pad(mask, (0, input_ids.shape[1] - mask.shape[1]), value=1)

    def _common(self, input_ids: Tensor) -> int:
        """The number of leading tokens that the caches have already; the last is left out."""
        if self._seen is None or len(self._seen) != len(input_ids):
            return 0
        length = min(self._seen.shape[1], input_ids.shape[1] - 1)
        return int((self._seen[:, :length] == input_ids[:, :length]).all(0).cumprod(0).sum())


def generate(
    model: Any,
    guide: Any = None,
    eta: Any = 0.1,
    weights: Any = None,
    mode: str = "qsharp",
    others: str = "mass",
    top_k_candidates: int = 20,
    logits_processor: Any = None,
    **arguments: Any,
) -> Any:
    """Run `model.generate` with a guide: `model.generate(**inputs, custom_generate=DIR, trust_remote_code=True)`.

    `guide` is by default that of the folder or hub id `custom_generate`. It and the settings are as in
    `GuidanceLogitsProcessor`; the other arguments are those of `model.generate`.
    """
    if guide is None:
        # transformers runs a copy of this file and does not pass on where it comes from: its local variable says it.
        guide = inspect.currentframe().f_back.f_locals.get("custom_generate")
    if guide is None:
        raise ValueError("give guide, the folder or hub id of a guide")
    guides = [
        _loaded(os.fspath(member), model.device) if isinstance(member, str | os.PathLike) else member
        for member in (guide if isinstance(guide, list | tuple) else [guide])
    ]
    chosen = arguments.get("generation_config") or model.generation_config
    configs = [arguments, vars(chosen), vars(model.generation_config)]
    sampled, temperature = (
        next((config[name] for config in configs if config.get(name) is not None), None)
        for name in ("do_sample", "temperature")
    )
    processor = GuidanceLogitsProcessor(
        guides, eta=eta, weights=weights, mode=mode, others=others, top_k_candidates=top_k_candidates,
        temperature=temperature if sampled and temperature else 1.0, attention_mask=arguments.get("attention_mask"),
    )  # fmt: skip
    return model.generate(logits_processor=[*(logits_processor or []), processor], **arguments)


@functools.lru_cache(maxsize=4)
def _loaded(folder: str, device: torch.device) -> Guide:
    """The guide of a folder or hub id, loaded once in a process."""
    return Guide.from_pretrained(folder, device=device)
