"""Between text and token ids, through a `transformers` tokenizer. Knows nothing about models or tasks."""

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from qsharp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenizer with this program's conventions: a prompt starts with the bos token, a response ends with eos."""

    tokenizer: PreTrainedTokenizerFast

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_token_id,)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The prompt's ids, the bos token first.

        Raises:
          UserError: for a word or symbol that the vocabulary does not have.
        """
        encoded = self.tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=False)
        for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token == self.tokenizer.unk_token_id:
                piece = prompt[begin:end].strip() or prompt[begin:end]
                raise UserError(
                    f"the model's vocabulary does not have {piece!r}, at character {prompt.index(piece, begin)} of the"
                    f" prompt {prompt[:60]!r}; write the prompt in the words of its task"
                )
        return [self.tokenizer.bos_token_id, *encoded["input_ids"]]

    def encode_response(self, response: str) -> list[int]:
        return [*self.tokenizer(response, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
