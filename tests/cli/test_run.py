"""`pyrosome run`: what goes where, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest

from tests.cli.sessions import FAKE, REAL, ROOT, TIMEOUT, at_terminal, ended, environment, piped, seen


def test_output_is_the_text_and_the_summary_goes_to_standard_error(tmp_path):
    done = piped(tmp_path, "run", "builtin:nano", "-p", "some words")
    assert (done.returncode, done.stdout) == (0, b"You said: some words\n")
    assert b"generated 4 tokens (stop)" in done.stderr and b"bytes per token of history" in done.stderr


def test_a_dash_reads_the_prompt_from_standard_input(tmp_path):
    assert (
        piped(tmp_path, "run", "builtin:nano", "-p", "-", stdin=b"from a pipe\n").stdout == b"You said: from a pipe\n"
    )


def test_the_first_run_without_a_model_says_what_can_be_done_and_what_is_needed(tmp_path):
    said = piped(tmp_path, "run").stderr.decode()
    assert "159,609,485,896 bytes" in said and "166,878,536,440 bytes" in said and "GiB of memory" in said
    assert "/path/to/DeepSeek-V4-Flash" in said and "pyrosome doctor" in said
    assert all(piped(tmp_path, c, "--help").returncode == 0 for c in set(re.findall(r"^ +pyrosome (\w+)", said, re.M)))
    assert "159,609" not in piped(tmp_path, "run", "builtin:nano").stderr.decode()


def test_json_is_one_object_and_nothing_else(tmp_path):
    done = piped(tmp_path, "run", "--json", "-p", "escape")
    report = json.loads(done.stdout)
    assert done.stderr == b"" and done.stdout.count(b"\n") == 1
    assert report["text"] == "red \x1b[31mtext\x07\rback" and report["finish_reason"] == "stop"


def test_control_characters_are_shown_as_dots_on_a_terminal_and_kept_in_a_pipe(tmp_path):
    child = at_terminal(tmp_path, "run", "builtin:nano", "-p", "escape")
    assert ended(child) == 0
    assert "red ·[31mtext·back\n" in seen(child).plain and "\x07" not in seen(child).text
    assert piped(tmp_path, "run", "-p", "escape").stdout == b"red \x1b[31mtext\x07\rback\n"


def test_ctrl_c_ends_the_text_with_what_was_generated_and_status_130(tmp_path):
    child = at_terminal(tmp_path, "run", "builtin:nano", "-p", "slow")
    child.expect_exact("word3 ")
    child.send("\x03")
    child.expect(r"generated \d+ tokens \(interrupted\)")
    assert ended(child) == 130


def test_an_interrupted_run_still_prints_its_json(tmp_path):
    command = [sys.executable, *FAKE, "run", "--json", "-p", "stuck"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment(tmp_path)
    ) as child:
        for line in (b"at work\n", b"asked\n"):
            assert child.stderr.readline() == line
            child.send_signal(signal.SIGINT)
        report = json.loads(child.stdout.read())
        assert child.wait(TIMEOUT) == 130
    assert (report["text"], report["finish_reason"]) == ("begun ", "interrupted")


def test_a_reader_that_goes_away_ends_the_run_without_a_word(tmp_path):
    command = (
        f"'{sys.executable}' -m tests.cli.fake_llm run builtin:nano -p slow | head -c 12; echo \" ${{PIPESTATUS[0]}}\""
    )
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, cwd=ROOT, env=environment(tmp_path), timeout=TIMEOUT
    )
    assert (done.stdout, done.stderr) == (b"word0 word1  141\n", b"")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("/no/such/model",), b"/no/such/model does not exist"),
        (("builtin:nano", "-p", ""), b"the prompt is empty"),
        (("builtin:nano", "--temperature", "-1"), b"temperature is -1.0"),
        (("builtin:nano", "--top-p", "0"), b"top_p is 0.0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, args, said):
    done = piped(tmp_path, "run", *args)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"pyrosome: ") and said in done.stderr and done.stderr.count(b"\n") == 1


def test_a_real_checkpoint_is_continued_and_a_file_that_is_none_is_refused(tmp_path, noise_checkpoint):
    for model in (str(noise_checkpoint), "builtin:nano"):
        done = piped(tmp_path, "run", model, "-p", "Hello", "--max-tokens", "4", "--json", program=REAL)
        assert done.returncode == 0, done.stderr.decode()
        report = json.loads(done.stdout)
        assert len(report["token_ids"]) == 4 or (report["finish_reason"] == "stop" and model == "builtin:nano")
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    (tmp_path / "config.json").write_text("{}")
    done = piped(tmp_path, "run", str(tmp_path / "model.safetensors"), program=REAL)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.startswith(b"pyrosome: ")
