"""`pyrosome chat` at a terminal, driven key by key."""

from __future__ import annotations

import json
import re

import pytest

from tests.cli.sessions import REAL, at_terminal, ended, seen

CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def chat(tmp_path):
    children = []

    def start(*args, **kwargs):
        child = at_terminal(tmp_path, "chat", "builtin:nano", *args, **kwargs)
        children.append(child)
        ready(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def ready(child):
    child.expect(r"\n(?:\x1b\[[0-9;?]*[A-Za-z]|\r)*> ")


def say(child, text):
    child.sendline(text)
    child.expect_exact("\r\n")  # the echo of what was typed
    ready(child)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", child.before).replace("\r", "")


def test_an_answer_follows_its_question_and_the_next_question_waits(chat):
    child = chat()
    assert say(child, "hello there") == "You said: hello there"
    assert say(child, "and again") == "You said: and again"
    child.sendline("/quit")
    assert ended(child) == 0


def test_an_answer_is_shown_while_it_is_still_coming(chat):
    child = chat()
    child.sendline("slow")
    child.expect_exact("word2 ")  # of a hundred thousand words
    child.send(CTRL_C)
    child.expect_exact("(stopped)")


def test_ctrl_c_stops_the_answer_and_what_came_is_remembered(chat):
    child = chat("--think", "off")
    child.sendline("slow")
    child.expect_exact("word5 ")
    child.send(CTRL_C)
    child.expect_exact("(stopped)")
    ready(child)
    asked, answered, _ = json.loads(say(child, "messages").replace("\n", ""))
    assert asked == {"role": "user", "content": "slow"}
    assert answered["role"] == "assistant" and answered["content"].startswith("word0 word1 word2 word3 word4 word5 ")


def test_a_second_ctrl_c_does_not_wait_for_the_step(chat):
    child = chat()
    child.sendline("stuck")
    for line in ("at work", "asked"):
        child.expect_exact(line)
        child.send(CTRL_C)
    child.expect_exact("(stopped)")
    ready(child)
    assert say(child, "hello") == "You said: hello"


def test_an_answer_stopped_among_its_thoughts_takes_the_question_back(chat):
    child = chat()
    child.sendline("only thoughts")
    child.expect_exact("word3 ")
    child.send(CTRL_C)
    child.expect_exact("taken back")
    ready(child)
    assert json.loads(say(child, "messages").replace("\n", "")) == [{"role": "user", "content": "messages"}]


def test_ctrl_c_twice_at_the_prompt_leaves_and_once_does_not(chat):
    child = chat()
    child.send(CTRL_C)
    child.expect_exact("Ctrl-C again leaves")
    ready(child)
    assert say(child, "still here") == "You said: still here"
    child.send(CTRL_C)
    ready(child)
    child.send(CTRL_C)
    assert ended(child) == 130


def test_ctrl_d_leaves(chat):
    child = chat()
    child.send(CTRL_D)
    assert ended(child) == 0


def test_a_failure_costs_its_turn_only(chat):
    child = chat()
    assert "the model will not answer that" in say(child, "fail")
    assert json.loads(say(child, "messages").replace("\n", "")) == [{"role": "user", "content": "messages"}]


def test_modes_are_switched_by_command_and_shown(chat):
    child = chat("--think", "off")
    assert "thought" not in say(child, "think")
    assert say(child, "/think max").strip() == "thinking max"
    assert "thought max hard" in say(child, "think")
    assert say(child, "/think").strip() == "thinking max"
    assert "no way of thinking" in say(child, "/think deeply")
    assert say(child, "/think off").strip() == "thinking off"
    assert say(child, "think") == "You said: think"


def test_thoughts_are_dim_and_the_answer_is_not(chat):
    child = chat()
    say(child, "think")
    assert "\x1b[2mthought \x1b[0m" in seen(child).text
    assert "\x1b[2mYou said:" not in seen(child).text


def test_folded_thoughts_are_hidden_until_they_are_asked_for(chat):
    child = chat()
    say(child, "/fold")
    folded = say(child, "think")
    assert "thought" not in folded and folded.endswith("You said: think")
    assert "thought high hard" in say(child, "/fold")
    assert "thought high hard" in say(child, "think")


def test_without_colour_thoughts_are_marked_in_words(chat):
    child = chat(NO_COLOR="1")
    answer = say(child, "think")
    assert answer == "[thoughts]\nthought high hard\n[answer]\nYou said: think"
    say(child, "/help")
    child.sendline("/quit")
    ended(child)
    assert not seen(child).styled


def test_a_dumb_terminal_gets_no_escape_sequence_at_all(chat):
    child = chat(TERM="dumb")
    say(child, "/fold")
    say(child, "think")
    child.sendline("/quit")
    ended(child)
    assert "\x1b" not in seen(child).text


def test_what_a_model_writes_cannot_control_the_terminal(chat):
    child = chat("--think", "off")
    child.sendline("escape")
    child.expect_exact("red ·[31mtext·back")
    ready(child)
    assert "\x1b[31m" not in seen(child).text and "\x07" not in seen(child).text


def test_a_narrow_terminal_shows_everything(chat):
    child = chat(columns=20)
    answer = say(child, "a question that is longer than twenty columns")
    assert answer.replace("\n", "").endswith("You said: a question that is longer than twenty columns")
    say(child, "/help")
    say(child, "/tokens")
    say(child, "/fold")
    say(child, "think")
    child.sendline("/quit")
    assert ended(child) == 0


def test_status_lines_are_broken_at_blanks_in_a_narrow_terminal(chat):
    child = chat(columns=20)
    greeting = seen(child).plain.split("> ")[0]
    assert max(map(len, greeting.splitlines())) <= 20


def test_a_line_that_ends_in_a_backslash_goes_on(chat):
    child = chat("--think", "off")
    child.send("one\\\r")
    child.expect_exact(". ")
    assert say(child, "two") == "You said: one two"
    assert json.loads(say(child, "messages").replace("\n", ""))[0]["content"] == "one\ntwo"


def test_a_file_goes_with_the_next_message(chat, tmp_path):
    (tmp_path / "notes.txt").write_text("the sea is deep\n")
    child = chat("--think", "off", columns=300)
    assert "notes.txt: 4 tokens" in say(child, f"/file {tmp_path}/notes.txt")
    assert "notes.txt" in say(child, "/file")
    say(child, "what is it?")
    assert json.loads(say(child, "messages").replace("\n", ""))[0]["content"] == (
        "[file name]: notes.txt\n[file content begin]\nthe sea is deep\n\n[file content end]\nwhat is it?"
    )
    assert "none" in say(child, "/file")


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("absent", None, "does not exist"),
        ("zeros", b"text\0more", "zero bytes"),
        ("latin1", b"caf\xe9", "not UTF-8"),
        ("long", b"word " * 2000, "too long for the 1,000"),
    ],
)
def test_a_file_that_cannot_be_sent_is_refused_with_a_reason(chat, tmp_path, name, raw, said):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    child = chat("--think", "off", columns=300)
    assert said in say(child, f"/file {tmp_path / name}")
    assert say(child, "hello") == "You said: hello"


def test_saving_writes_the_conversation_as_json(chat, tmp_path):
    child = chat(columns=300)
    assert "nothing was said" in say(child, f"/save {tmp_path}/talk.json")
    say(child, "think")
    say(child, f"/save {tmp_path}/talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["format"] == "pyrosome-conversation" and saved["model"] == "builtin:nano"
    assert saved["messages"] == [
        {"role": "user", "content": "think"},
        {"role": "assistant", "content": "You said: think", "reasoning_content": "thought high hard"},
    ]


def test_tokens_and_cache_bytes_follow_the_conversation_and_a_reset_forgets_it(chat):
    child = chat(columns=300)
    assert say(child, "/tokens").startswith("0 of 1,000 tokens; KV cache 0 bytes")
    say(child, "hello")
    assert say(child, "/tokens").startswith("17 of 1,000 tokens; KV cache 270 bytes")
    say(child, "/reset")
    assert say(child, "/tokens").startswith("0 of 1,000 tokens")
    assert json.loads(say(child, "messages")) == [{"role": "user", "content": "messages"}]


def test_help_names_every_command_and_an_unknown_one_points_to_it(chat):
    from pyrosome.cli.chat import COMMANDS

    child = chat()
    listed = say(child, "/help")
    assert all(f"/{name}" in listed for name in COMMANDS)
    assert "/help lists them" in say(child, "/nonsense")
    assert say(child, " /nonsense") == "You said: /nonsense"


def test_typed_lines_are_remembered_in_the_next_session(chat, tmp_path):
    child = chat()
    say(child, "a line worth keeping")
    child.send(CTRL_D)
    assert ended(child) == 0
    history = tmp_path / "state" / "pyrosome" / "history"
    assert "a line worth keeping" in history.read_text() and history.stat().st_mode & 0o077 == 0
    child = chat()
    child.send("\x1b[A\r")  # arrow up, enter
    child.expect_exact("You said: a line worth keeping")


def test_history_that_cannot_be_written_is_no_error(chat, tmp_path):
    (tmp_path / "state").write_text("a file where a directory should be")
    child = chat()
    assert say(child, "hello") == "You said: hello"
    child.send(CTRL_D)
    assert ended(child) == 0
    assert "Traceback" not in seen(child).text


def test_an_answer_that_was_cut_says_so(chat):
    assert "--max-tokens" in say(chat(columns=300), "length")


def test_json_at_a_terminal_is_one_object_for_each_answer(chat):
    child = chat("--json", columns=300)
    answer = json.loads(say(child, "think"))
    assert answer["message"]["content"] == "You said: think" and answer["usage"]["completion_tokens"] == 7


def test_a_bad_model_path_is_one_line_and_status_2(tmp_path):
    child = at_terminal(tmp_path, "chat", "/no/such/model", columns=200)
    assert ended(child) == 2
    assert seen(child).plain == "pyrosome: /no/such/model does not exist; give the directory of a checkpoint\n"


def test_the_first_run_without_a_model_says_what_the_official_weights_need(tmp_path):
    child = at_terminal(tmp_path, "chat", columns=300)
    ready(child)
    child.close(force=True)
    assert "159,609,485,896 bytes" in seen(child).text and "166,878,536,440 bytes" in seen(child).text
    assert "pyrosome chat /path/to/DeepSeek-V4-Flash" in seen(child).text


def test_a_long_load_draws_a_bar_and_takes_it_away(tmp_path):
    child = at_terminal(tmp_path, "chat", "builtin:long-load")
    child.expect_exact("loading")
    ready(child)
    child.close(force=True)


def test_a_real_model_talks_stops_and_talks_again(tmp_path, noise_checkpoint):
    child = at_terminal(
        tmp_path, "chat", str(noise_checkpoint), "--think", "off", "--max-tokens", "100000", program=REAL, columns=200
    )
    ready(child)
    child.sendline("Hello")
    child.expect_exact("\r\n")
    child.expect(".{20}")  # noise, and more of it than any end token would let through at once
    child.send(CTRL_C)
    child.expect_exact("(stopped)")
    ready(child)
    tokens = int(re.match(r"([\d,]+) of 1,048,576 tokens", say(child, "/tokens").strip())[1].replace(",", ""))
    assert tokens > 20
    child.sendline("/quit")
    assert ended(child) == 0
