"""The ledger: what was written is read back, a cut line is removed, other damage is reported, and there is one writer."""

import errno
import os

import pytest

from sifm_min.files.ledger import Ledger, read_rows


def test_a_ledger_is_read_back(tmp_path):
    path = tmp_path / "ledger.jsonl"
    rows = [{"key": "é\u2028\n", "n": [1, None]}, {}, {"x": 0.5}]
    for expected in (0, 3, 6):
        with Ledger(path) as ledger:
            assert len(ledger.rows) == expected and not ledger.repaired
            for row in rows:
                ledger.append(row)
    assert read_rows(path) == rows * 3


def test_a_line_cut_anywhere_is_removed_and_no_other(tmp_path):
    path, rows = tmp_path / "ledger.jsonl", [{"key": "first"}, {"key": "zweite Zeile: ü"}]
    with Ledger(path) as ledger:
        for row in rows:
            ledger.append(row)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for cut in range(start, len(content)):
        path.write_bytes(content[:cut])
        whole = cut == len(content) - 1                      # only the line's end is missing: nothing is lost
        with Ledger(path) as ledger:
            assert ledger.rows == rows[:1 + whole]
            assert ledger.repaired == (0 if whole else cut - start)
            ledger.append({"key": "third"})
        assert read_rows(path) == [*rows[:1 + whole], {"key": "third"}]


def test_zeros_that_a_crash_left_are_removed(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for tail in (bytes(100), bytes(100) + b"\n"):
        path.write_bytes(b'{"key": 1}\n' + tail)
        with Ledger(path) as ledger:
            assert ledger.rows == [{"key": 1}] and ledger.repaired == len(tail)
        assert path.read_bytes() == b'{"key": 1}\n'


@pytest.mark.parametrize("line", [b"{", b"7", b"", b"\xff{}", b"[]"])
def test_damage_within_is_not_repaired_in_silence(line, tmp_path):
    path = tmp_path / "ledger.jsonl"
    content = b'{"key": 1}\n' + line + b'\n{"key": 2}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line 2: is damaged"), Ledger(path):
        pass
    assert path.read_bytes() == content
    path.write_bytes(b"")
    with Ledger(path):                                       # the failed opening kept no lock
        pass


def test_one_writer(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        with pytest.raises(ValueError, match=rf"another run \(process {os.getpid()}\) writes into this folder; wait"), \
                Ledger(path):
            pass
        ledger.append({"still": "open"})
    with Ledger(path) as ledger:
        assert ledger.rows == [{"still": "open"}]


def test_a_full_disk_loses_only_the_line_that_did_not_fit(tmp_path, monkeypatch):
    path, write = tmp_path / "ledger.jsonl", os.write
    with Ledger(path) as ledger:
        ledger.append({"key": 1})

        def full(file, content):
            if len(content) < 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, content[:4])
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError) as caught:
            ledger.append({"key": 2})
        assert caught.value.filename == str(path) and ledger.rows == [{"key": 1}]
        monkeypatch.undo()
        ledger.append({"key": 3})                            # room again: not behind half of another line
    with Ledger(path) as ledger:
        assert ledger.rows == [{"key": 1}, {"key": 3}] and not ledger.repaired


def test_a_full_disk_keeps_no_lock(tmp_path, monkeypatch):
    def full(file, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "write", full)
    with Ledger(tmp_path / "ledger.jsonl") as ledger, pytest.raises(OSError, match="No space"):
        ledger.append({"key": 1})
    monkeypatch.undo()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert ledger.rows == [] and not ledger.repaired


def test_each_line_is_on_the_disk_before_append_returns(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
        ledger.append({"key": 1})
        ledger.append({"key": 2})
        assert synced == [11, 22]


def test_a_closed_journal_takes_no_row(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        pass
    with pytest.raises(OSError, match="closed"):
        ledger.append({"kind": "intent"})
