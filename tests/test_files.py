from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sdkit.errors import SdkitError
from sdkit.files import atomic_write, encodable, find

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def python(code: str, *args: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_writes_the_file_and_makes_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    for content in ("first", "second"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".txt"
            temporary.write_text(content)
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError, SdkitError])
def test_any_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, stop: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        if stop is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
        raise stop

    with pytest.raises(stop), atomic_write(path) as temporary:
        write_half(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    sentence = r"cannot write .*file\.txt: no such file or directory"
    with pytest.raises(SdkitError, match=sentence), atomic_write(tmp_path / "file.txt"):
        pass


@posix
def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with atomic_write(tmp_path / "atomic") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@posix
def test_link_is_kept_and_its_target_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "deep" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@posix
def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "folder", "it is a folder"),
        (tmp_path / "pipe", "it is not a regular file"),
        (tmp_path / "file" / "inside", "not a directory"),
        (tmp_path / ("n" * 300), "file name too long"),
        (Path("/"), "it is a folder"),
    ):
        with (
            pytest.raises(SdkitError, match=f"^cannot write {re.escape(str(path))}: {reason}\\.$"),
            atomic_write(path) as temporary,
        ):
            temporary.write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe", "file"}


WRITE_A_MEGABYTE = """
    import sys
    from pathlib import Path
    from sdkit.errors import SdkitError
    from sdkit.files import atomic_write
    {setup}
    try:
        with atomic_write(sys.argv[1]) as temporary:
            temporary.write_bytes(bytes(2**20))
    except SdkitError as error:
        print(error)
    print([path.name for path in Path(sys.argv[1]).parent.iterdir()])
"""


@posix
def test_file_over_the_size_limit(tmp_path: Path) -> None:
    setup = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))"
    done = python(WRITE_A_MEGABYTE.format(setup=setup), tmp_path / "file.bin")
    assert done.stdout.splitlines() == [f"cannot write {tmp_path / 'file.bin'}: file too large.", "[]"], done.stderr


@pytest.mark.parametrize(
    ("option", "reason"), [("size=64k", "no space left on device"), ("ro", "read-only file system")]
)
def test_full_and_read_only_disks(tmp_path: Path, option: str, reason: str) -> None:
    # The mount is seen by this one process only, and goes with it.
    mount = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o {option} tmpfs "{tmp_path}" && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets tests mount nothing")
    done = python(WRITE_A_MEGABYTE.format(setup=""), tmp_path / "file.bin", before=mount)
    assert done.stdout.splitlines() == [f"cannot write {tmp_path / 'file.bin'}: {reason}.", "[]"], done.stderr


def test_two_processes_never_mix(tmp_path: Path) -> None:
    code = """
        import sys
        from sdkit.files import atomic_write
        for _ in range(50):
            with atomic_write(sys.argv[1]) as temporary:
                temporary.write_bytes(sys.argv[2].encode() * 2**18)
    """
    path = tmp_path / "file"
    path.write_bytes(b"a" * 2**18)
    writers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path), letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        content = path.read_bytes()
        assert len(content) == 2**18
        seen.add(bytes(set(content)))
    assert seen == {b"a", b"b"}
    assert [writer.returncode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.png",
        "a.PNG",
        "note.txt",
        ".hidden.png",
        "sub/c.jpg",
        ".cache/d.png",
        "sub/.git/e.png",
        "g.png/in.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_find_expands_folders(folder: Path) -> None:
    found = find([folder], {".png", ".jpg"})
    assert [str(path.relative_to(folder)) for path in found] == ["a.PNG", "b.png", "g.png/in.png", "sub/c.jpg"]


def test_find_keeps_given_files_in_order_and_once(folder: Path) -> None:
    given = [
        folder / "note.txt",
        str(folder / ".hidden.png"),
        folder / "sub",
        folder / "sub" / "c.jpg",
        folder / "note.txt",
    ]
    assert find(given, {".jpg"}) == [folder / "note.txt", folder / ".hidden.png", folder / "sub" / "c.jpg"]


def test_find_looks_into_a_given_hidden_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find([folder / ".cache"], {".png"}) == [folder / ".cache" / "d.png"]
    monkeypatch.chdir(folder / "sub")
    assert find(["."], {".jpg"}) == [Path("c.jpg")]


def test_find_says_what_is_missing(folder: Path) -> None:
    for paths, sentence in (
        ([folder / "sub", folder / "no.png"], r"cannot read .*no\.png: no such file or directory; check the name\."),
        ([folder / ("n" * 300)], "cannot read .*: file name too long; check the name"),
        ([folder / "sub"], r"found no \.gif/\.png file in .*sub; name one, or another folder\."),
        ([], "in an empty list of paths"),
    ):
        with pytest.raises(SdkitError, match=sentence):
            find(paths, {".png", ".gif"})


def test_encodable() -> None:
    assert encodable("añ猫") == "añ猫"
    assert encodable(os.fsdecode(b"\xff.png")) == (
        "?.png" if os.name == "posix" else encodable(os.fsdecode(b"\xff.png"))
    )


def test_find_refuses_what_is_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SdkitError, match="neither a regular file nor a folder"):
        find([tmp_path / "pipe.png"], {".png"})
    with pytest.raises(SdkitError, match="empty name"):
        find([""], {".png"})
