"""Prompters over the tiny tokenizer, and templates that only tests have."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from loralab.data.example import Conversation, Message
from loralab.data.images.files import ImageFolder
from loralab.data.prompts.prompter import Prompter
from loralab.data.prompts.templates import TEMPLATES
from support import tiny

# Where the pictures of rows would lie that have none.
NO_PICTURES = ImageFolder(Path("/nowhere"), False, Path("/nowhere/kept"))
CHATML = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# As many published templates do: content is stripped.
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
# The generation prompt is not how the answer's turn begins.
UNFAITHFUL = CHATML.replace("assistant\n{% endif %}", "assistant: {% endif %}")
NO_STOP = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def build_tokenizer(template: str | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.chat_template = template
    return tokenizer


def build_prompter(template: str = TEMPLATES["alpaca"], *, stop: list[str] | None = None) -> Prompter:
    return Prompter(build_tokenizer(template), stop)


def conversation(*turns: str) -> Conversation:
    """Return a conversation of `role: content` turns."""
    return Conversation(tuple(Message(*turn.split(": ", 1)) for turn in turns))
