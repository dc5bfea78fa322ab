import subprocess
import sys
import tracemalloc

import pytest

from server.errors import SecurityFileError
from server.security.tokens import TokenFile, line_of, new_token
from server.security.watched_files import WatchedFiles


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens"


def test_a_token_has_the_name_beside_its_hash(path):
    path.write_text(
        f"# who may call\n{line_of('alice', 'a-token')}  # on the robot\n\n{line_of('bob', 'b')}\n"
    )
    tokens = TokenFile(path)

    assert tokens.name_of("a-token") == "alice"
    assert tokens.name_of("b") == "bob"
    assert tokens.name_of("c") is None
    assert "a-token" not in path.read_text()


def test_one_name_may_have_two_tokens_while_one_replaces_the_other(path):
    path.write_text(f"{line_of('alice', 'old')}\n{line_of('alice', 'new')}\n")
    tokens = TokenFile(path)

    assert (tokens.name_of("old"), tokens.name_of("new")) == ("alice", "alice")


def test_a_token_that_is_taken_out_of_the_file_is_known_no_more(path):
    path.write_text(line_of("alice", "a") + "\n" + line_of("bob", "b"))
    tokens = TokenFile(path, WatchedFiles([path], look_pause_s=0.0))

    path.write_text(line_of("bob", "b"))

    assert tokens.name_of("a") is None
    assert tokens.name_of("b") == "bob"


def test_a_file_that_is_broken_while_it_is_in_use_leaves_the_tokens_before(path):
    path.write_text(line_of("alice", "a"))
    tokens = TokenFile(path, WatchedFiles([path], look_pause_s=0.0))

    path.write_text("alice a-token-in-plain-text")

    assert tokens.name_of("a") == "alice"


def test_a_line_that_is_none_is_refused_without_being_quoted(path):
    path.write_text(f"{line_of('alice', 'a')}\nbob secret-in-plain-text\n")

    with pytest.raises(SecurityFileError, match="line 2") as refused:
        TokenFile(path)
    assert "secret" not in str(refused.value)


def test_tokens_differ_and_are_long():
    assert len({new_token() for _ in range(100)}) == 100
    assert len(new_token()) >= 43


def test_the_command_makes_a_token_and_its_line(path):
    command = [sys.executable, "-m", "server.security.tokens", "alice"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    token, line = (text.partition(": ")[2].strip() for text in said)
    path.write_text(line)

    assert TokenFile(path).name_of(token) == "alice"


def test_a_small_file_takes_little_memory_to_read(path):
    path.write_text(line_of("alice", "a"))
    tokens = WatchedFiles([path])

    tracemalloc.start()
    tokens.read()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 64 * 1024
