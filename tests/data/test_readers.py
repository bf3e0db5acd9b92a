"""Lines of files of any size."""

import gzip

import pytest

from tasks import readers

CONTENT = "one\n\r\n\ntwo words\r\nthree\rünf\r\r\nsix".encode()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n"])
def test_lines_are_the_same_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk, name, end):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    content = CONTENT + end
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = list(readers.lines(str(tmp_path / name)))
    assert found == list(enumerate(content.decode().splitlines(), start=1))
    assert len(found) == 8


def test_a_file_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 10)
    (tmp_path / "a.txt").write_bytes(b"good\ngood\n" * 3 + b"\xff\n")
    lines = readers.lines(str(tmp_path / "a.txt"))
    assert [next(lines) for _ in range(6)][-1] == (6, "good"), "before what is bad has been seen"
    with pytest.raises(ValueError, match=r"a\.txt:7: not UTF-8"):
        next(lines)


def test_a_file_without_line_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 10)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"a\.txt: no line end in"):
        list(readers.lines(str(tmp_path / "a.txt")))
