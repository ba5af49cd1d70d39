"""`loralab chat` through a pipe and on a terminal, and what `generate` says about its answers."""

import json
import os
import pty
import re
import select
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from loralab.data.example import Message
from loralab.evaluation.generate import GenerationSettings, generate_answers
from loralab.progress import Reporter
from loralab.workflows.session import open_session
from support import tiny
from support.command import Answer, read_problems, run_here, snapshot, write_config

PROMPTS = ["red cat sings", "two dogs in the house"]
SHORT = ["--max-new-tokens", 7]
AT_LIMIT = "the answer ended at max_new_tokens (7), not by a stop token\n"


@dataclass(frozen=True)
class World:
    """A tiny base and a finished run of it; read only."""

    folder: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(20))
    config = write_config(folder / "config.yaml", tiny.run_config(base, rows, folder / "run"))
    assert run_here("train", config).code == 0
    return World(folder, folder / "run")


def generated(world: World, *options: object) -> list[dict[str, dict[str, str]]]:
    """Return what `generate` answers to each of `PROMPTS`."""
    prompts = [part for prompt in PROMPTS for part in ("-p", prompt)]
    answer = run_here("generate", world.run, *prompts, *SHORT, *options, "--json")
    assert answer.code == 0, answer.err
    return list(json.loads(answer.out)["answers"])


def answer_to(world: World, *messages: Message) -> str:
    """Return the greedy answer to a conversation, from the ids of its prompt."""
    session = open_session(world.run, overrides=[], base_model=None, reporter=Reporter())
    (answer,) = generate_answers(
        session.model,
        [session.prompter.encode_prompt(messages)],
        prompter=session.prompter,
        settings=GenerationSettings(7),
        batch_size=1,
        reporter=Reporter(),
    )
    return answer.text


# --- through a pipe ----------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate(world: World) -> None:
    before = snapshot(world.run)
    wanted = generated(world, "--base")
    talk = f"{PROMPTS[0]}\n/reset\n{PROMPTS[1]}\n/base\n/reset\n{PROMPTS[0]}\n/reset\n{PROMPTS[1]}\n"
    answer = run_here("chat", world.run, *SHORT, stdin=talk)
    sides = [(side, each) for side in ("adapter", "base") for each in wanted]
    assert answer.code == 0, answer.err
    assert answer.out == "".join(f"{each[side]['text']}\n" for side, each in sides)
    assert wanted[0]["adapter"] != wanted[0]["base"]
    assert answer.err.count(AT_LIMIT) == sum(not each[side]["stopped"] for side, each in sides) > 0
    based = run_here("chat", world.run / "adapter", *SHORT, "--base", stdin=f"{PROMPTS[0]}\n")
    assert based.out == f"{wanted[0]['base']['text']}\n"
    assert snapshot(world.run) == before


def test_second_turn_is_asked_under_the_template_with_the_first_answer(world: World) -> None:
    answer = run_here("chat", world.run, *SHORT, "--system", "Be a cat.", stdin=f"{PROMPTS[0]}\n{PROMPTS[1]}\n")
    turns = [Message("system", "Be a cat."), Message("user", PROMPTS[0])]
    first = answer_to(world, *turns)
    second = answer_to(world, *turns, Message("assistant", first), Message("user", PROMPTS[1]))
    assert answer.out == f"{first}\n{second}\n"
    alone = answer_to(world, turns[0], Message("user", PROMPTS[1]))
    assert second != alone  # what was said before is seen
    without = run_here("chat", world.run, *SHORT, stdin=f"{PROMPTS[0]}\n")
    assert without.out != f"{first}\n"  # and so is the system message


def test_several_lines_are_one_turn(world: World) -> None:
    wanted = answer_to(world, Message("user", "/red\ncat"))
    for talk in ('"""\n/red\ncat\n"""\n', "//red\\\ncat\n"):
        assert run_here("chat", world.run, *SHORT, stdin=talk).out == f"{wanted}\n"


def test_long_conversation_goes_on_without_its_beginning(world: World) -> None:
    turn = "red cat " * 12
    answer = run_here("chat", world.run, *SHORT, stdin=f"{turn}\n" * 8)
    assert answer.code == 0, answer.err
    assert answer.out.count("\n") >= 8
    left_out = re.findall(r"its oldest (?:(\d+) exchanges are|exchange is) left out", answer.err)
    counts = [int(count or 1) for count in left_out]
    assert counts
    assert counts == sorted(set(counts))  # said each time that there are more, and only then
    (problem,) = read_problems(run_here("chat", world.run, *SHORT, stdin="red cat " * 300))
    assert "but the model has 256 positions" in problem.what


@pytest.mark.parametrize(
    ("talk", "what", "where"),
    [
        ("\n/bsae\nred\n", "no such command: '/bsae'", "standard input, line 2"),
        ("/base now\n", "/base takes no text, got 'now'", "standard input, line 1"),
        ('"""\nred\n', "does not end", "standard input, line 1"),
        ("caf\udce9\n", "not UTF-8 text", "standard input, line 1, character 4"),
    ],
)
def test_mistake_in_a_script(talk: str, what: str, where: str, world: World) -> None:
    (problem,) = read_problems(run_here("chat", world.run, stdin=talk))
    assert what in problem.what
    assert problem.where == where


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--seed", 3], "seed 3 has no effect at temperature 0"),
        (["--max-new-tokens", 0], "max_new_tokens"),
        (["evaluation.batch_size=2"], "evaluation.batch_size has no effect"),
        (["--system", "\udce9"], "not UTF-8 text"),
    ],
)
def test_settings_that_cannot_be_used(options: list[object], what: str, world: World) -> None:
    (problem,) = read_problems(run_here("chat", world.run, *options, stdin="red\n"))
    assert what in problem.what


@pytest.mark.parametrize("command", [["generate", "-p", "red"], ["chat"]], ids=["generate", "chat"])
def test_changed_template_is_refused(command: list[str], world: World, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(world.run / "adapter", tmp_path / "adapter"))
    template = adapter / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("Response", "response"), encoding="utf-8")
    name, *rest = command
    answer = run_here(name, adapter, *rest, stdin="red\n")
    assert (answer.code, answer.out) == (3, "")
    assert "prompt contract broken: the template differs" in answer.err
    assert "### Response:" in answer.err  # the difference, from both sides
    assert "### response:" in answer.err
    assert f"where: {adapter}" in answer.err


def test_sampling_is_seeded_once(world: World) -> None:
    options = [*SHORT, "--temperature", 2.0, "--seed", 5]
    wanted = run_here("generate", world.run, "-p", PROMPTS[0], *options).out
    talk = f"{PROMPTS[0]}\n/undo\n{PROMPTS[0]}\n"
    first, again = (run_here("chat", world.run, *options, stdin=talk).out for _ in range(2))
    assert first == again
    assert first.startswith(wanted)
    assert first != wanted * 2


def test_closed_stdout_ends_it_quietly(world: World) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "loralab.cli", "chat", str(world.run), "--max-new-tokens", "4"],
            input=b"red\nblue\n",
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 141, done.stderr
    assert b"Error" not in done.stderr


def test_generate_says_how_many_answers_were_cut(world: World) -> None:
    def cut(answer: Answer) -> list[str]:
        assert answer.code == 0
        return [line for line in answer.err.splitlines() if "by a stop token" in line]

    wanted = generated(world, "--base")
    options = [part for prompt in PROMPTS for part in ("-p", prompt)]
    lines = cut(run_here("generate", world.run, *options, "--base", *SHORT))
    counts = {side: sum(not each[side]["stopped"] for each in wanted) for side in ("adapter", "base")}
    limit = "ended at max_new_tokens (7), not by a stop token"
    assert lines == [
        f"{counts[side]} of 2 answers{who} {limit}"
        for side, who in (("adapter", ""), ("base", " of the base"))
        if counts[side]
    ]
    assert counts["adapter"] > 0


def test_system_message_of_the_contract_is_sent_and_said(world: World) -> None:
    rows = [{**row, "system": "Be a cat."} for row in tiny.alpaca_rows(12)]
    file = tiny.write_rows(world.folder / "cats.json", rows)
    values = tiny.run_config(world.folder / "base", file, world.folder / "cats")
    assert run_here("train", write_config(world.folder / "cats.yaml", values)).code == 0
    said = "system message, as trained: Be a cat."
    cat = ["--system", "Be a cat."]
    for command in (["generate", world.folder / "cats", "-p", PROMPTS[0]], ["chat", world.folder / "cats"]):
        by_contract, given, none = (
            run_here(*command, *SHORT, *system, stdin=f"{PROMPTS[0]}\n") for system in ([], cat, ["--system", ""])
        )
        assert [said in answer.err for answer in (by_contract, given, none)] == [True, False, False]
        assert by_contract.out == given.out != none.out


# --- on a terminal -----------------------------------------------------------------------------------------------


# Takes the terminal for its own first, so that Ctrl-C is a signal.
_ON_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv[0] = "loralab"
from loralab.cli import main
main()
"""


class Terminal:
    """A chat on a terminal of its own, keyed and read by a test."""

    def __init__(self, *arguments: object, state: Path) -> None:
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "200"}
        command = [sys.executable, "-c", _ON_TERMINAL, "chat", *map(str, arguments)]
        self.screen, far = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=far, stdout=far, stderr=far, env=environment, start_new_session=True
        )
        os.close(far)
        self.text = ""

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Return what came up to and including `text`; escape sequences and carriage returns are left out."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            ready, _, _ = select.select([self.screen], [], [], 0.1)
            if ready:
                self.text += re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", os.read(self.screen, 65536).decode())
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.text}"
        before, _, self.text = self.text.partition(text)
        return before + text

    def key(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


def test_chat_on_a_terminal(world: World, tmp_path: Path) -> None:
    wanted = generated(world, "--base")
    terminal = Terminal(world.run, *SHORT, state=tmp_path)
    try:
        terminal.wait_for("/help lists the commands, Ctrl-D leaves\n")
        terminal.wait_for("to adapter> ")
        terminal.key(f"{PROMPTS[0]}\n")
        shown = terminal.wait_for("to adapter> ")
        assert shown.startswith(f"{PROMPTS[0]}\n{wanted[0]['adapter']['text']}\n")
        terminal.key("/bsae\n")
        assert "did you mean '/base'?" in terminal.wait_for("to adapter> ")
        terminal.key("/base\n")
        terminal.wait_for("to base> ")
        terminal.key("/reset\n")
        terminal.wait_for("to base> ")
        terminal.key("\x1b[A\x1b[A\x1b[A\x1b[A\n")  # four up: the first question again
        assert f"\n{wanted[0]['base']['text']}\n" in terminal.wait_for("to base> ")
        time.sleep(1)  # Python's readline misses a signal that comes just before it waits for a key
        terminal.key("\x03")
        assert "to leave: Ctrl-C again" in terminal.wait_for("to base> ")
        terminal.key("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
    history = tmp_path / "loralab" / "chat_history"
    assert history.read_text(encoding="utf-8").splitlines() == [PROMPTS[0], "/bsae", "/base", "/reset", PROMPTS[0]]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_history_is_not_touched_by_a_script(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert run_here("chat", world.run, *SHORT, stdin="red\n").code == 0
    assert list(tmp_path.iterdir()) == []
