"""Prompts and responses: from a document's fields to the tokens of one row, and which of them are predicted.

    {"prompt": ..., "response": ...}   ->   prompt tokens | response tokens <end of turn> | padding

`format` finds out, before anything is packed, how a tokenizer writes a conversation and ends a turn; `chat`
renders its template; `stream` makes the rows. What the model is given when it answers, the prompt, is
tokenised by itself, and every row begins with exactly these tokens.
"""

from ddkmix.prompts.format import PromptFormat, find_format
from ddkmix.prompts.stream import PromptStream

__all__ = ["PromptFormat", "PromptStream", "find_format"]
