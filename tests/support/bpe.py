"""A tokenizer as downloaded models have them, made offline: byte-level BPE, special tokens, a chat template."""

import functools
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, EOT, ROLE = 0, 1, 2, 3
SPECIAL = ["<|bos|>", "<|eos|>", "<|eot|>", "<|role|>"]
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<|role|>{{ turn.role }}\n{{ turn.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)


@functools.cache
def _core() -> str:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    core.train_from_iterator(["How many eggs does Sam have? Sam has twelve eggs."] * 4, trainer)
    return core.to_str()


def make(*, bos: bool = True, template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """About 290 tokens, of which the first four are special.

    Args:
      bos: the tokenizer's own defaults put the bos token before a text.
    """
    core = tokenizers.Tokenizer.from_str(_core())
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", chat_template=template
    )


def save(folder: Path, *, generation_config: dict | None = None, **changes) -> Path:
    """`make` in a folder, with a generation_config.json if given."""
    make(**changes).save_pretrained(folder)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder
