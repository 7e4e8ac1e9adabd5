from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdkit import images
from sdkit.atomic import atomic_write, beside, remove_abandoned
from sdkit.data import latent_file
from sdkit.errors import ImageError, LatentError, SdkitError
from sdkit.file_search import find_files
from sdkit.files import encodable, sha256

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
    from sdkit.atomic import atomic_write
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
    # The mount is visible in this process only, and disappears with it.
    mount = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o {option} tmpfs "{tmp_path}" && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets tests mount nothing")
    done = python(WRITE_A_MEGABYTE.format(setup=""), tmp_path / "file.bin", before=mount)
    assert done.stdout.splitlines() == [f"cannot write {tmp_path / 'file.bin'}: {reason}.", "[]"], done.stderr


@posix
def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_there(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from sdkit.atomic import atomic_write
        with atomic_write(sys.argv[1]) as temporary:
            temporary.write_text("half")
            print(temporary.name, flush=True)
            getattr(os, sys.argv[2])(*((os.getpid(), signal.SIGKILL) if sys.argv[2] == "kill" else (0, 1)))
    """
    killed = python(code, tmp_path / "killed", "kill")
    assert [path.name for path in tmp_path.iterdir()] == [killed.stdout.strip()]
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "living"), "read"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        name = living.stdout.readline().strip()
        # Names that sdkit does not write are kept. Temporary files of another computer may still be in use until they
        # are a day old.
        for other in (
            ".sdkit-mine",
            ".sdkit-00000000-1-0123456789abcdef.png",
            ".sdkit-00000000-1-fedcba9876543210.png",
        ):
            (tmp_path / other).write_text("x")
        (tmp_path / ".sdkit-0123456789abcdef").mkdir()  # the format of older versions
        for old in (".sdkit-mine", ".sdkit-00000000-1-fedcba9876543210.png", ".sdkit-0123456789abcdef"):
            os.utime(tmp_path / old, (0, 0))
        with atomic_write(tmp_path / "next") as temporary:
            temporary.write_text("whole")
        kept = {".sdkit-mine", ".sdkit-00000000-1-0123456789abcdef.png"}
        assert {path.name for path in tmp_path.iterdir()} == {"next", name, *kept}
        living.communicate("go on")
    assert {path.name for path in tmp_path.iterdir()} == {"next", "living", *kept}


@posix
def test_a_leftover_that_is_a_link_takes_nothing_with_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    link = tmp_path / "out" / ".sdkit-0123456789abcdef"
    link.symlink_to(tmp_path / "precious")
    os.utime(link, (0, 0), follow_symlinks=False)
    remove_abandoned(tmp_path / "out")
    assert not link.is_symlink()
    assert (tmp_path / "precious" / "file").read_text() == "x"


def test_a_temporary_name_fits_wherever_the_final_one_does(tmp_path: Path) -> None:
    path = tmp_path / f"a.{'x' * 250}"
    with atomic_write(path) as temporary:
        temporary.write_text("x")
    assert list(tmp_path.iterdir()) == [path]
    assert beside(path, ".png").suffix == ".png"


@posix
def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    with (
        pytest.raises(SdkitError, match=r"^cannot write .*: no file can have this name\.$"),
        atomic_write(tmp_path / "nul\0") as temporary,
    ):
        temporary.write_text("x")
    with pytest.raises(SdkitError, match=r"^cannot read .*: no file can have this name; check the name\.$"):
        find_files([tmp_path / "nul\0"], {".png"})
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    code = """
        import os, sys
        from sdkit.errors import SdkitError
        from sdkit.atomic import atomic_write
        os.chdir(sys.argv[1])
        os.rmdir(sys.argv[1])
        try:
            with atomic_write("file") as temporary:
                temporary.write_text("x")
        except SdkitError as error:
            print(error)
    """
    (tmp_path / "gone").mkdir()
    done = python(code, tmp_path / "gone")
    assert done.stdout == "cannot write file: no such file or directory.\n", done.stderr


@posix
@pytest.mark.timeout(60)
def test_a_checksum_is_of_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        sha256(tmp_path / "pipe")


def test_two_processes_never_mix(tmp_path: Path) -> None:
    code = """
        import sys
        from sdkit.atomic import atomic_write
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


@pytest.mark.parametrize("links", [True, False])
def test_a_name_is_claimed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Of several threads that want a name, exactly one must get it, on file systems with and without hard links."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # as on FAT

    if not links:
        monkeypatch.setattr("os.link", refuse)
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        try:
            with atomic_write(tmp_path / "file", overwrite=False) as temporary:
                temporary.write_text(str(number) * 1000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = [number for number, success in enumerate(pool.map(write, range(8))) if success]
    assert len(won) == 1
    assert (tmp_path / "file").read_text() == str(won[0]) * 1000
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_name_claimed_in_vain_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with (
        pytest.raises(SdkitError, match=r"cannot write .*file: input/output error"),
        atomic_write(tmp_path / "file", overwrite=False) as temporary,
    ):
        temporary.write_text("x")
    assert list(tmp_path.iterdir()) == []


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
    found = find_files([folder], {".png", ".jpg"})
    assert [str(path.relative_to(folder)) for path in found] == ["a.PNG", "b.png", "g.png/in.png", "sub/c.jpg"]


def test_find_keeps_given_files_in_order_and_once(folder: Path) -> None:
    given = [
        folder / "note.txt",
        str(folder / ".hidden.png"),
        folder / "sub",
        folder / "sub" / "c.jpg",
        folder / "note.txt",
    ]
    assert find_files(given, {".jpg"}) == [folder / "note.txt", folder / ".hidden.png", folder / "sub" / "c.jpg"]


def test_find_looks_into_a_given_hidden_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_files([folder / ".cache"], {".png"}) == [folder / ".cache" / "d.png"]
    monkeypatch.chdir(folder / "sub")
    assert find_files(["."], {".jpg"}) == [Path("c.jpg")]


def test_find_says_what_is_missing(folder: Path) -> None:
    for paths, sentence in (
        ([folder / "sub", folder / "no.png"], r"cannot read .*no\.png: no such file or directory; check the name\."),
        ([folder / ("n" * 300)], "cannot read .*: file name too long; check the name"),
        ([folder / "sub"], r"found no \.gif/\.png file in .*sub \(but 1 \.jpg file\); name one, or another"),
        ([], "in an empty list of paths"),
    ):
        with pytest.raises(SdkitError, match=sentence):
            find_files(paths, {".png", ".gif"})


@pytest.mark.parametrize("name", ["a\0b.png", "a\0b/c.png", "x" * 10_000, f"{'y/' * 5000}z.png"])
def test_find_says_what_no_file_can_be_called(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        SdkitError, match=r"^cannot read .*: (no file can have this name|file name too long); check"
    ) as e:
        find_files([tmp_path / name], {".png"})
    assert len(str(e.value)) < 500


@posix
def test_find_in_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for given in (".", "sub", str(tmp_path / "gone")):
        with pytest.raises(SdkitError, match=r"^cannot read .*: no such file or directory; check the name\.$"):
            find_files([given], {".png"})


def test_find_names_what_is_passed_over(folder: Path) -> None:
    for name in ("x.heic", "sub/y.HEIC", "z.svg", "sub/n.txt"):
        (folder / name).touch()
    sentence = (
        r"^2 \.heic files and 1 \.svg file are passed over, which cannot be read: .*sub.y\.HEIC, .*x.heic, .*z.svg\.$"
    )
    with pytest.warns(UserWarning, match=sentence):
        found = find_files([folder], {".png"}, {".heic", ".svg"})
    assert found == find_files([folder], {".png"})
    with pytest.raises(
        SdkitError, match=r"found no \.gif file in .*sub \(but 1 \.heic file and 1 \.jpg file and 1 \.txt"
    ):
        find_files([folder / "sub"], {".gif"}, {".heic"})


@posix
def test_find_follows_links_to_folders_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "deep").mkdir()
    for name in ("o.png", "deep/p.png"):
        (other / name).touch()
    (folder / "b-link").symlink_to(other)
    (folder / "c-link").symlink_to(other)
    (folder / "sub" / "inner").symlink_to(folder / "g.png")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "above").symlink_to(folder.parent)
    (other / "back").symlink_to(folder)
    found = [str(path.relative_to(folder)) for path in find_files([folder], {".png"})]
    assert found == ["a.PNG", "b-link/deep/p.png", "b-link/o.png", "b.png", "g.png/in.png"]


@posix
def test_find_keeps_what_cannot_be_read_for_the_reader_to_report(folder: Path) -> None:
    (folder / "sub" / "dangling.png").symlink_to("nowhere")
    (folder / "sub" / "loop.png").symlink_to("loop.png")
    (folder / "sub" / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(folder / "sub" / "pipe.png")
    names = ["c.jpg", "dangling.png", "loop.png", "pipe.png"]
    assert find_files([folder / "sub"], {".png", ".jpg"}) == [folder / "sub" / name for name in names]


@posix
def test_find_tells_of_folders_that_it_may_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user is simulated if the tests run as root, who may read everything."""
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    Path("closed").mkdir()
    Path("closed/x.png").touch()
    Path("closed").chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        if os.access("closed", os.R_OK, effective_ids=True):
            pytest.skip("this user may read everything")
        found = find_files(["."], {".png"})
        with pytest.raises(SdkitError, match=r"^cannot read closed: permission denied; check the name"):
            find_files(["closed"], {".png"})
        with pytest.raises(ImageError, match="cannot read closed: Permission denied"):
            images.read("closed")
        with pytest.raises(LatentError, match=r"closed: the file cannot be read \(permission denied\)"):
            latent_file.load("closed")
    finally:
        if root:
            os.seteuid(0)
        Path("closed").chmod(0o755)
    assert found == [Path("a.PNG"), Path("b.png"), Path("closed"), Path("g.png/in.png")]


def test_encodable() -> None:
    assert encodable("añ猫") == "añ猫"
    assert encodable(os.fsdecode(b"\xff.png")) == (
        "?.png" if os.name == "posix" else encodable(os.fsdecode(b"\xff.png"))
    )


def test_find_refuses_what_is_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SdkitError, match="neither a regular file nor a folder"):
        find_files([tmp_path / "pipe.png"], {".png"})
    with pytest.raises(SdkitError, match="empty name"):
        find_files([""], {".png"})
