"""A journal keeps what was finished, whatever kills its writer."""

import json

import pytest

from vim_ssl.utils.resumable import Journal, claim_output


def claim(folder, made_of, strangers=()):
    return claim_output(
        folder, folder / "record.json", made_of, {"command": "test"}, what="things",
        lock=folder / ".lock", strangers=strangers,
    )  # fmt: skip


def test_entries_are_read_by_index_after_the_writer_is_gone(tmp_path):
    first = Journal(tmp_path / "journal")
    for index in (3, 0, 2):
        first.append(index, {"id": f"é{index}", "record": {}})
    second = Journal(tmp_path / "journal")  # the first is never closed, as after a kill
    assert [entry["id"] for entry in second] == ["é0", "é2", "é3"]
    assert (len(second), 0 in second, 1 in second) == (3, True, False)


@pytest.mark.parametrize("torn", [b"{", b'{"index": 9, "id": "x"}'], ids=["part", "no line end"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    Journal(tmp_path / "journal").append(0, {"id": "a"})
    with (tmp_path / "journal").open("ab") as file:
        file.write(torn)
    again = Journal(tmp_path / "journal")
    assert list(again) == [{"index": 0, "id": "a"}]
    again.append(1, {"id": "b"})
    assert [entry["id"] for entry in Journal(tmp_path / "journal")] == ["a", "b"]


def test_an_error_is_kept_until_a_later_entry_replaces_it(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.append(0, {"error": "no disk"})
    assert (0 in journal, len(journal), [e["error"] for e in journal]) == (False, 0, ["no disk"])
    journal.append(0, {"record": {}})
    for current in (journal, Journal(tmp_path / "journal")):
        assert (0 in current, list(current)) == (True, [{"index": 0, "record": {}}])


def test_an_output_is_claimed_once_and_only_with_the_same_settings(tmp_path):
    lock = claim(tmp_path / "out", {"size": 1})
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert record == {"command": "test", "made_of": {"size": 1}, "finished": False}
    with pytest.raises(BlockingIOError, match="another process is writing"):
        claim(tmp_path / "out", {"size": 1})
    lock.release()
    claim(tmp_path / "out", {"size": 1}).release()
    with pytest.raises(ValueError, match=r"out contains things with different size; .*--output"):
        claim(tmp_path / "out", {"size": 2})


def test_files_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "letter.txt").write_text("Dear Sir")
    with pytest.raises(FileExistsError, match=r"letter.txt exists, but no record of things"):
        claim(tmp_path, {}, strangers=[tmp_path / "letter.txt"])
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
