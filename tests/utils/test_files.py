"""Files are written whole or not at all."""

import pytest

from vim_ssl.utils.files import atomic_path, atomic_write, read_json, read_text, reading


@pytest.mark.parametrize(("content", "expected"), [("ä", "ä".encode()), (b"\xff", b"\xff")])
def test_a_file_is_replaced(tmp_path, content, expected):
    path = tmp_path / "file.txt"
    path.write_text("old")
    atomic_write(path, content)
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_an_error_keeps_the_old_content_and_leaves_nothing(tmp_path, shared, kind):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path, shared=shared) as partial:
            if kind == "folder":
                partial.mkdir()
                (partial / "part").write_text("new")
            elif kind == "file":
                partial.write_text("new")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_and_the_first_of_two_is_kept(tmp_path):
    path = tmp_path / "folder"
    with atomic_path(path) as slow:
        slow.mkdir()
        (slow / "file").write_text("slow")
        with atomic_path(path) as fast:
            fast.mkdir()
            (fast / "file").write_text("fast")
            assert not path.exists()
    assert (path / "file").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_path(path, shared=False) as partial:
        pass_on = partial
        partial.write_text("half")
    pass_on.write_text("half a file, left by a kill")
    with atomic_path(path, shared=False) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyError("name"), ValueError("odd"), EOFError("short")])
def test_an_error_of_a_reader_names_the_file_and_what_to_do(tmp_path, error):
    file = tmp_path / "log.jsonl"
    text = r"log\.jsonl cannot be read as a log .*; delete it\."
    with pytest.raises(ValueError, match=text), reading(file, "a log", "delete it"):
        raise error


def test_errors_that_name_the_file_pass_unchanged(tmp_path):
    file = tmp_path / "log.jsonl"
    with pytest.raises(ValueError, match=r"log\.jsonl: line 3$"), reading(file, "a log"):
        raise ValueError(f"{file}: line 3")
    with pytest.raises(FileNotFoundError), reading(file, "a log"):
        file.read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1,\n "b": [2,]}', "line 2"),
        ('{"a": 1,\n "b": NaN}', "NaN in line 2; write null"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice in one object"),
        (b'{"a": "\xe9"}', r"is not UTF-8 \(line 1\)"),
        ("", "line 1"),
    ],
)
def test_a_json_file_that_cannot_be_meant_is_refused_with_its_line(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"a\.json .*{says}"):
        read_json(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_with_a_byte_order_mark_are_read_without_it(tmp_path, encoding):
    (tmp_path / "a").write_bytes('{"é": 1}\n'.encode(encoding))
    assert read_text(tmp_path / "a") == '{"é": 1}\n'
    assert read_json(tmp_path / "a") == {"é": 1}
