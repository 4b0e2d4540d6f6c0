"""Files are there whole, on the disk, or not at all."""

import errno
import os
import resource
import stat

import pytest

from klflow_ext.files import checksum, read_json, remove, sync, write_file, write_files, write_folder


def text(words):
    return lambda path: path.write_text(words)


def listed(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_order_of_a_write(tmp_path, monkeypatch):
    """Every file is synced before it gets its name, and the folder after that."""
    done, plain_sync, plain_replace, plain_rename = [], os.fsync, os.replace, os.rename

    def synced(number):
        done.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        plain_sync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"name {b.name}"), plain_replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(f"name {b.name}"), plain_rename(a, b)))
    write_files(tmp_path, {"a": text("1"), "b": text("2")})
    assert done == ["sync a.tmp", "sync b.tmp", "name a", "name b", f"sync {tmp_path.name}"]
    done.clear()
    write_folder(tmp_path / "f", {"a": text("1"), "b": text("2")})
    assert done == ["sync a", "sync b", "sync f.tmp", "name f", f"sync {tmp_path.name}"]
    assert listed(tmp_path) == ["a", "b", "f", "f/a", "f/b"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "chmod", "replace", "rename"])
def test_what_fails_leaves_what_was(tmp_path, monkeypatch, code, call):
    write_files(tmp_path, {"a": text("old")})

    def fails(*arguments, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        if call != "rename":
            with pytest.raises(ValueError, match=rf"{tmp_path}/[ab] cannot be written: {os.strerror(code)}"):
                write_files(tmp_path, {"a": text("new"), "b": text("new")})
        if call != "replace":
            with pytest.raises(ValueError, match=rf"{tmp_path}/f(/a)? cannot be written: {os.strerror(code)}"):
                write_folder(tmp_path / "f", {"a": text("new")})
    assert listed(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_file_that_may_not_grow(tmp_path):
    """The kernel's own refusal in the middle of a file, as of a full disk."""
    write_folder(tmp_path / "f", {"a": text("old")})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ValueError, match=f"{tmp_path}/g/b cannot be written: File too large"):
            write_folder(tmp_path / "g", {"a": text("new"), "b": text("x" * 5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert listed(tmp_path) == ["f", "f/a"]


def test_a_folder_that_has_gone(tmp_path):
    with pytest.raises(ValueError, match="gone/a cannot be written: No such file or directory"):
        write_file(tmp_path / "gone" / "a", text("new"))
    with pytest.raises(ValueError, match="gone/f cannot be written: No such file or directory"):
        write_folder(tmp_path / "gone" / "f", {"a": text("new")})
    remove(tmp_path / "gone" / "a")


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, {"a": text("new"), "b": interrupted})
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "f", {"a": text("new"), "b": interrupted})
    assert listed(tmp_path) == []


def test_a_folder_that_is_left_unfinished_is_no_hindrance(tmp_path):
    (tmp_path / "f.tmp").mkdir()
    (tmp_path / "f.tmp" / "litter").write_text("half")
    write_folder(tmp_path / "f", {"a": text("new")})
    assert listed(tmp_path) == ["f", "f/a"]


def test_files_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        write_files(tmp_path, {"a": text("1")})
        write_folder(tmp_path / "f", {"a": lambda p: (p.write_text("1"), p.chmod(0o600))})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "f" / "a").stat().st_mode) == 0o640


def test_folders_that_cannot_be_synced(tmp_path, monkeypatch):
    def fails(number):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fails)
    sync(tmp_path)
    (tmp_path / "a").write_text("1")
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "a")


def test_json_that_is_none(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"is not whole: it has no a.json"):
        read_json(path)
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.json cannot be read"):
            read_json(path)
    with open(path, "wb") as file:
        file.truncate(10**11)  # no bytes on the disk
    with pytest.raises(ValueError, match=r"a.json cannot be read: it has 100000000000 bytes, allowed are 16777216"):
        read_json(path)


def test_checksum_is_that_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert checksum(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
