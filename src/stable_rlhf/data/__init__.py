"""Prompts: from files, hubs and lists to token ids, and the order in which they are drawn.

A prompt is a text, or a list of chat messages ``{"role": ..., "content": ...}``. The way through this package:

    load_prompts, as_dataset -> Dataset with a `prompt` column -> encode_prompts -> EncodedPrompts
    PromptStream.take(k) -> k row indexes into both
    StreamedPrompts, for rows that arrive one by one, is all three

Rows are counted from 1 in messages to people, as editors count them, and from 0 in code.
"""

from stable_rlhf.data.chat import Message, Text, plain_text, prompt_text
from stable_rlhf.data.encoding import EncodedPrompts, PromptEncoder, encode_prompts
from stable_rlhf.data.sources import load_prompts
from stable_rlhf.data.split import Prompts, split_datasets
from stable_rlhf.data.stream import PromptStream
from stable_rlhf.data.streamed import StreamedPrompts, StreamedRows
from stable_rlhf.data.tokenized import turn_end_missing

__all__ = [
    "EncodedPrompts",
    "Message",
    "PromptEncoder",
    "PromptStream",
    "Prompts",
    "StreamedPrompts",
    "StreamedRows",
    "Text",
    "encode_prompts",
    "load_prompts",
    "plain_text",
    "prompt_text",
    "split_datasets",
    "turn_end_missing",
]
