"""The way to beat: Q# as a `LogitsProcessor` of `transformers`' own `generate`, in PyTorch.

Written as a careful user would: the guide keeps a key-value cache of its own, and the pending token and the candidates
go through it together under a tree mask; the candidates' entries are cropped from the cache afterwards.
"""

import time

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_utils import PreTrainedModel


class Guidance(LogitsProcessor):
    """Adds log E exp(z/eta), z ~ Bernoulli, to the logits of the likeliest candidates."""

    def __init__(self, guide: PreTrainedModel, candidates: int, eta: float):
        self.guide, self.candidates, self.eta = guide, candidates, eta
        self.cache = DynamicCache(config=guide.config)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        past = self.cache.get_seq_length()
        if past == 0 and input_ids.shape[1] > 1:
            self.guide(input_ids[:, :-1], past_key_values=self.cache, use_cache=True)
            past = self.cache.get_seq_length()
        candidates = scores.topk(self.candidates, dim=-1).indices
        tokens = torch.cat([input_ids[:, -1:], candidates], dim=1)
        count = tokens.shape[1]
        dtype = self.guide.dtype
        mask = torch.full((count, past + count), torch.finfo(dtype).min, dtype=dtype, device=scores.device)
        mask[:, : past + 1] = 0
        mask[range(count), range(past, past + count)] = 0
        positions = torch.tensor([[past] + [past + 1] * self.candidates], device=scores.device)
        logits = (
            self.guide(
                tokens,
                attention_mask=mask.expand(len(tokens), 1, -1, -1),
                position_ids=positions.expand(len(tokens), -1),
                past_key_values=self.cache,
                use_cache=True,
            )
            .logits[:, 1:, 0]
            .float()
        )
        self.cache.crop(-self.candidates)
        softplus = torch.nn.functional.softplus
        return scores.scatter_add(1, candidates, softplus(logits + 1 / self.eta) - softplus(logits))


@torch.inference_mode()
def generate(
    ref: PreTrainedModel,
    guide: PreTrainedModel | None,
    prompts: np.ndarray,
    new_tokens: int,
    *,
    candidates: int,
    eta: float,
    sample: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[np.ndarray, float]:
    """Exactly `new_tokens` for each of the prompts [B, P]; with the seconds that it took."""
    processors = LogitsProcessorList([] if guide is None else [Guidance(guide, candidates, eta)])
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=sample, top_k=0, pad_token_id=0,
        temperature=temperature, top_p=top_p,
    )  # fmt: skip
    began = time.perf_counter()
    tokens = ref.generate(
        torch.from_numpy(prompts).long().to(ref.device), generation_config=config, logits_processor=processors
    )
    return tokens[:, prompts.shape[1] :].cpu().numpy(), time.perf_counter() - began
