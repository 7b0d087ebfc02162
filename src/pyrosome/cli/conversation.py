"""A conversation as data: messages in the chat-completions form, files that wait for the next one, and its file.

Nothing here knows a terminal or a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrosome.cli.terminal import decoded
from pyrosome.errors import RequestError

FORMAT, VERSION = "pyrosome-conversation", 1
_BYTES_PER_TOKEN = 64  # more than any text has on average: a longer file is refused before it is read
_FILE = "[file name]: {name}\n[file content begin]\n{text}\n[file content end]\n"  # the form DeepSeek recommends


class Conversation:
    """What was said, oldest first."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.files: list[tuple[str, str]] = []  # name and text, for the next message
        self._asked: list[tuple[str, str]] = []
        self._saved: set[Path] = set()

    def ask(self, text: str) -> list[dict[str, Any]]:
        """Add a message of the user's, waiting files first; returns all messages."""
        content = "".join(_FILE.format(name=name, text=body) for name, body in self.files) + text
        self._asked, self.files = self.files, []
        self.messages.append({"role": "user", "content": content})
        return self.messages

    def answer(self, content: str, reasoning: str | None, tool_calls: list[Any] | None = None) -> None:
        """Add the model's answer."""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if tool_calls:
            message["tool_calls"] = tool_calls
        self.messages.append(message)

    def take_back(self) -> None:
        """Forget the last question, which nothing answered; its files wait again."""
        self.messages.pop()
        self.files = self._asked + self.files

    def reset(self) -> None:
        """Forget everything."""
        self.messages.clear()
        self.files.clear()

    def attach(self, name: str, count_tokens: Callable[[str], int], max_tokens: int) -> int:
        """Read a text file for the next message; returns its tokens.

        Raises:
            RequestError: it is missing, no regular file, unreadable, not text, or longer than `max_tokens`.
        """
        path = Path(name).expanduser()
        try:
            if path.is_dir():
                raise RequestError(f"{path} is a directory; give one text file")
            if path.exists() and not path.is_file():
                raise RequestError(f"{path} is a device or a pipe; give a regular text file")
            num_bytes = path.stat().st_size
            if num_bytes > max_tokens * _BYTES_PER_TOKEN:
                raise RequestError(
                    f"{path} has {num_bytes:,} bytes, too long for the {max_tokens:,} tokens that are left of the "
                    "context; give a part of it"
                )
            raw = path.read_bytes()
        except FileNotFoundError:
            raise RequestError(f"{path} does not exist in {Path.cwd()}; give the path of a text file") from None
        except (OSError, ValueError) as error:
            raise RequestError(f"{path} cannot be read ({error}); give the path of a text file") from None
        if b"\0" in raw:
            raise RequestError(f"{path} is not text (it holds zero bytes); give a text file")
        text = decoded(raw, str(path))
        num_tokens = count_tokens(text)
        if num_tokens > max_tokens:
            raise RequestError(
                f"{path} has {num_tokens:,} tokens, too long for the {max_tokens:,} that are left of the context; give "
                "a part of it"
            )
        self.files.append((path.name, text))
        return num_tokens

    def save(self, name: str, **about: Any) -> Path:
        """Write the conversation as JSON; returns the path.

        Raises:
            RequestError: nothing was said, a file of that name is there that this conversation did not write, or it
                cannot be written.
        """
        path = Path(name).expanduser().absolute()
        if not self.messages:
            raise RequestError("nothing was said yet, so there is nothing to save")
        if path.exists() and path not in self._saved:
            raise RequestError(f"{path} exists and was not written by this conversation; choose another name")
        values = {"format": FORMAT, "version": VERSION, **about, "messages": self.messages}
        part = path.with_name(f".{path.name}.partial")
        try:
            part.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", "utf-8", "replace")
            os.replace(part, path)
        except (OSError, ValueError) as error:
            raise RequestError(f"{path} cannot be written ({error}); choose another place") from None
        self._saved.add(path)
        return path
