"""`pyrosome chat` without a terminal: the whole input is one message, and only the answer is output."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.cli.sessions import FAKE, ROOT, TIMEOUT, at_terminal, ended, environment, piped, seen


def test_the_whole_input_is_one_message_and_its_lines_are_no_commands(tmp_path):
    done = piped(tmp_path, "chat", "builtin:nano", stdin=b"first line\n/save stolen.json\n/quit\n")
    assert done.returncode == 0
    assert done.stdout == b"You said: first line /save stolen.json /quit\n"
    assert not (ROOT / "stolen.json").exists()


def test_only_the_answer_is_output_and_no_thought(tmp_path):
    done = piped(tmp_path, "chat", "builtin:nano", stdin=b"think")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"You said: think\n", b"")


def test_json_holds_thoughts_usage_and_the_reason_of_the_end(tmp_path):
    done = piped(tmp_path, "chat", "builtin:nano", "--json", "--think", "max", stdin=b"think")
    assert json.loads(done.stdout) == {
        "message": {"role": "assistant", "content": "You said: think", "reasoning_content": "thought max hard"},
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 10, "completion_tokens": 7, "reasoning_tokens": 3, "cached_tokens": 0},
    }


def test_control_characters_reach_a_file_unchanged(tmp_path):
    done = piped(tmp_path, "chat", "builtin:nano", stdin=b"escape")
    assert done.stdout == b"red \x1b[31mtext\x07\rback\n"


@pytest.mark.parametrize(
    ("args", "stdin", "said"),
    [
        ((), b"", b"standard input is empty"),
        ((), b"\n \n", b"standard input is empty"),
        ((), b"caf\xe9", b"not UTF-8"),
        (("--think", "deeply"), b"hello", b"'deeply' is no way of thinking; there are off, high, max"),
        (("--max-tokens", "0"), b"hello", b"max_tokens is 0"),
        ((), b"fail", b"the model will not answer that"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, args, stdin, said):
    done = piped(tmp_path, "chat", "builtin:nano", *args, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"pyrosome: ") and said in done.stderr and done.stderr.count(b"\n") == 1


def test_an_interrupted_answer_is_output_as_far_as_it_came_with_status_130(tmp_path):
    command = [sys.executable, *FAKE, "chat", "builtin:nano", "--think", "off"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=environment(tmp_path),
    ) as child:  # fmt: skip
        child.stdin.write(b"slow")
        child.stdin.close()
        begun = child.stdout.read(12)
        child.send_signal(signal.SIGINT)
        rest = child.stdout.read()
        assert child.wait(TIMEOUT) == 130
        assert child.stderr.read() == b"(stopped)\n"
    assert begun == b"word0 word1 " and rest.endswith(b"\n")


def test_piped_in_at_a_terminal_thoughts_are_dim_and_there_is_no_prompt(tmp_path):
    child = at_terminal(
        tmp_path, "-c", f"echo think | '{sys.executable}' -m tests.cli.fake_llm chat builtin:nano", shell=True
    )
    assert ended(child) == 0
    assert seen(child).plain == "thought high hard\n\nYou said: think\n"


def test_questions_typed_while_answers_go_to_a_file_leave_the_file_clean(tmp_path):
    line = f"'{sys.executable}' -m tests.cli.fake_llm chat builtin:nano > '{tmp_path}/answers'"
    child = at_terminal(tmp_path, "-c", line, shell=True)
    child.expect_exact("> ")
    child.sendline("think")
    child.expect_exact("> ")
    child.send("\x04")
    assert ended(child) == 0
    assert (tmp_path / "answers").read_text() == "You said: think\n"


@pytest.mark.parametrize(
    ("model", "args", "expected"),
    [
        ("builtin:other", (), None),
        ("builtin:nano", ("--think", "off"), {"max_tokens": 256, "temperature": 1.0, "top_p": 0.95}),
        ("builtin:other", ("--think", "off", "--seed", "3"), {"max_tokens": 300, "seed": 3, "top_p": 0.95}),
        ("builtin:other", ("--temperature", "0"), {"max_tokens": 990, "temperature": 0.0}),
        ("builtin:other", ("--max-tokens", "5", "--top-p", "0.5"), {"max_tokens": 5, "top_p": 0.5, "temperature": 1.0}),
    ],
)
def test_an_option_replaces_one_part_of_the_modes_own_sampling(tmp_path, model, args, expected):
    done = piped(tmp_path, "chat", model, *args, stdin=b"params")
    params = json.loads(done.stdout)
    assert params == expected if expected is None else expected.items() <= params.items()
