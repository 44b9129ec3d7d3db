"""A file is replaced whole or left as it was."""

import os
import threading
import zlib

import pytest

from tasks.common.storage import atomic_write, checksum, read_record, replacing, write_json


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_appears_whole_with_its_folder(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    atomic_write(path, b"old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_two_who_write_at_once_do_not_meet(tmp_path):
    """The one that is first does not take the file of the other away."""
    path = tmp_path / "file.txt"
    both = threading.Barrier(2)

    def write(text):
        with replacing(path) as temporary:
            both.wait(10)
            temporary.write_text(text)
            both.wait(10)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("one", "two")
    assert names(tmp_path) == ["file.txt"]


def test_others_may_read_what_the_mask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        atomic_write(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_json_and_what_reads_it_back(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": "ä"}, indent=None, ensure_ascii=False)
    assert path.read_bytes() == '{"a": "ä"}\n'.encode()
    assert read_record(path) == {"a": "ä"}
    assert checksum(path) == f"{zlib.crc32(path.read_bytes()):08x}"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"), allow_nan=False)
    for content in ("[1]", "{", "\xff"):
        path.write_bytes(content.encode("latin-1"))
        assert read_record(path) == {}
    assert read_record(tmp_path / "none.json") == {}
