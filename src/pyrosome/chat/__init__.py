"""Messages in, token ids out, and back.  Nothing here needs torch."""

from pyrosome.chat.chat import Chat
from pyrosome.chat.detokenize import Detokenizer
from pyrosome.chat.events import Message, ToolCall, Usage
from pyrosome.chat.parser import Parser
from pyrosome.chat.prompt import Prompt
from pyrosome.chat.request import InvalidRequest
from pyrosome.chat.tokenizer import Tokenizer

__all__ = ["Chat", "Detokenizer", "InvalidRequest", "Message", "Parser", "Prompt", "Tokenizer", "ToolCall", "Usage"]
