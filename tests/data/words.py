"""A tokenizer of single words, with what it adds before and after a text, and with a chat template or without."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", "<end>", "user", "assistant", "system", "tool", "a", "b", "c", "d", "e"]
"""Each word's id is its place."""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def words(adds: str = "$A", template: str | None = None) -> PreTrainedTokenizerFast:
    """``adds``: what the tokenizer makes of a text $A, such as "<s> $A </s>"."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    added = [(token, WORDS.index(token)) for token in adds.split() if token != "$A"]
    if added:
        made.post_processor = processors.TemplateProcessing(single=adds, special_tokens=added)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    wrapped.chat_template = template
    return wrapped


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]
