"""Where this project differs on purpose, case by case, each with its reason.

docs/chat.md shows these tables; `python -m tests.chat.exceptions` writes them there.
"""

from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "chat.md"

_DEVELOPER = "DeepSeek's reference code makes a developer message a user turn; its API refuses the role, and OpenAI's clients mean a system message, as it is read here"  # noqa: E501
_TASK = "quick-instruction tasks are in the reference code only; the API has no field for them"

# Cases of reference_encode that the API, and so this project, renders otherwise.
REFERENCE = {
    "official_test_3": _DEVELOPER,
    "official_test_4": _TASK,
    "developer_chat": _DEVELOPER,
    "developer_dropped_chat": _DEVELOPER,
    "developer_format_thinking": _DEVELOPER,
    "task_query_chat": _TASK,
    "task_authority_chat": _TASK,
    "task_read_url_chat": _TASK,
    "task_action_chat": _TASK,
    "task_action_answered_chat": _TASK,
    "task_title_chat": _TASK,
    "task_title_answered_chat": _TASK,
    "task_read_url_thinking": _TASK,
    "task_action_thinking": _TASK,
    "task_action_answered_thinking": _TASK,
    "task_title_thinking": _TASK,
    "rawargs_empty_obj": "the API writes no empty line within a call that has no arguments",
    "tool_names_unicode": "the API refuses tool names other than ASCII letters, digits, _ and -",
    "tool_result_list_content": "the API writes [Unsupported Image] for an image, the reference code [Unsupported image_url]",  # noqa: E501
    "tool_unknown_ids": "the API refuses a tool result whose id no call has",
    "tools_midsystem": "the API moves every system message to the front",
}

# Cases of api_encode that the default manner answers otherwise than the official API.
DEFAULT_MANNER = {
    "chat_prefix_tools_off": "a final turn can be continued where tools are declared too",
    "chat_rawargs_empty": "empty arguments are those of a call without any",
    "chat_err_json_word": "JSON is given to whoever asks for it, whether the messages say so or not",
    "chat_err_stream_options": "stream_options without stream are of no effect",
    "chat_sampling_think": "temperature, top_p and penalties are honoured while thinking",
    "msg_tools_named_on": "a named tool can be had after thinking",
    "msg_tools_named_adaptive": "a named tool can be had after thinking",
    "msg_prefill_on": "a final assistant message is continued, as Anthropic's contract says",
    "msg_prefill_off": "a final assistant message is continued, as Anthropic's contract says",
    "msg_tools_any_off": "tool_choice any means that a tool is called",
    "msg_redacted": "redacted thoughts are left out",
    "msg_json_schema": "output_config.format is kept to",
    "resp_tools_required_think": "a required tool can be had after thinking",
    "resp_err_prev": "a previous response is not kept, and an answer without it would be another one",
}

# Cases of parse where the official parser's answer is of no use.
PARSE = {
    "m_json_body": "arguments written as one JSON object in place of parameters are those arguments",
    "m_eos_mid_block": "a call that ends before its first parameter has the arguments {}, if its schema allows that",
}

TABLES = {"DEFAULT_MANNER": DEFAULT_MANNER, "REFERENCE": REFERENCE, "PARSE": PARSE}


def table(rows):
    """A table of cases, those with one reason together."""
    reasons = {}
    for case, reason in rows.items():
        reasons.setdefault(reason, []).append(f"`{case}`")
    lines = [f"| {', '.join(cases)} | {reason} |" for reason, cases in reasons.items()]
    return "\n".join(["| cases | reason |", "|---|---|", *lines])


def documented(text):
    """The document with every table as the lists above have it."""
    for name, rows in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + table(rows) + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(documented(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
