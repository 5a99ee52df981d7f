"""Prompts: from files, hubs and lists to token ids, in the order in which they are trained on."""

from stable_rlhf.data.chat import Message, Text, plain_text, prompt_text
from stable_rlhf.data.encoding import EncodedPrompts, encode_prompts
from stable_rlhf.data.sources import load_prompts
from stable_rlhf.data.split import split_datasets
from stable_rlhf.data.stream import PromptStream

__all__ = [
    "EncodedPrompts",
    "Message",
    "PromptStream",
    "Text",
    "encode_prompts",
    "load_prompts",
    "plain_text",
    "prompt_text",
    "split_datasets",
]
