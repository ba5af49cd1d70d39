"""Paths of pictures: where they may lead, what is kept, and what is decoded later."""

import concurrent.futures
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loralab.data.example import Conversation, Document, ImageFile, ImagePart, Message
from loralab.data.formats.fields import RowError
from loralab.data.images import files, pictures
from loralab.data.images.files import ImageFolder, decode
from loralab.errors import DataError, StorageError
from support.drawing import encoded, noise, png_claiming


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    (tmp_path / "data" / "images").mkdir(parents=True)
    return ImageFolder(tmp_path / "data", allow_outside=False, kept=tmp_path / "kept")


def put(folder: ImageFolder, name: str, data: bytes | None = None) -> bytes:
    path = folder.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = encoded(noise(6, 4)) if data is None else data
    path.write_bytes(data)
    return data


def error_of(folder: ImageFolder, source: str | bytes) -> str:
    with pytest.raises(RowError) as caught:
        folder.open(source)
    return str(caught.value)


def test_a_picture_is_what_its_file_is(folder: ImageFolder) -> None:
    data = put(folder, "images/a.png")
    path = folder.root / "images" / "a.png"
    found = folder.open("images/a.png")
    assert found == ImageFile(
        path=str(path.resolve()),
        sha256=hashlib.sha256(data).hexdigest(),
        width=6,
        height=4,
        size_bytes=len(data),
        modified_ns=path.stat().st_mtime_ns,
    )
    assert decode(found).tobytes() == noise(6, 4).tobytes()


@pytest.mark.parametrize("name", ["a.png", "with blank.png", "Ünïcode 图.png", "100%25.png", "a:b.png", "x" * 200])
def test_spellings_of_a_path(folder: ImageFolder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, f"images/{name}")
    expected = folder.open(f"images/{name}")
    absolute = str(folder.root / "images" / name)
    monkeypatch.setenv("HOME", str(folder.root))
    scheme = "file:" + "//"
    for source in (
        f"./images/../images/{name}",
        absolute,
        f"~/images/{name}",
        f"{scheme}{absolute}",
        f"{scheme}images/{name}",
    ):
        assert folder.open(source) == expected


def test_a_url_of_a_file_may_be_escaped(folder: ImageFolder) -> None:
    put(folder, "images/with blank.png")
    scheme = "file:" + "//"
    assert folder.open(f"{scheme}images/with%20blank.png") == folder.open("images/with blank.png")
    assert "no such file" in error_of(folder, "images/with%20blank.png")


def test_the_folder_may_be_relative_and_a_link(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "images/a.png")
    monkeypatch.chdir(folder.root.parent)
    Path("link").symlink_to("data")
    expected = folder.open("images/a.png")
    for root in ("data", "link", "./data/../link"):
        assert ImageFolder(Path(root), allow_outside=False, kept=folder.kept).open("images/a.png") == expected


@pytest.mark.parametrize("source", ["../a.png", "images/../../a.png", "link.png", "linked/a.png", "{outside}"])
def test_pictures_outside_the_folder_are_refused(folder: ImageFolder, source: str) -> None:
    outside = folder.root.parent / "a.png"
    outside.write_bytes(encoded(noise(6, 4)))
    (folder.root / "link.png").symlink_to(outside)
    (folder.root / "linked").symlink_to(folder.root.parent)
    source = source.format(outside=outside)
    expected = (
        f"picture {source!r}: it leads to {outside.resolve()}, outside the folder {folder.root.resolve()}: "
        "set data.image.folder, or data.image.allow_outside: true where that is meant"
    )
    assert error_of(folder, source) == expected
    allowed = ImageFolder(folder.root, allow_outside=True, kept=folder.kept)
    assert allowed.open(source).path == str(outside.resolve())


def test_a_folder_with_the_same_beginning_is_outside(folder: ImageFolder) -> None:
    beside = folder.root.parent / "data-more"
    beside.mkdir()
    (beside / "a.png").write_bytes(encoded(noise(6, 4)))
    assert "outside the folder" in error_of(folder, "../data-more/a.png")


def test_what_is_not_there_is_not_told_apart_outside(folder: ImageFolder) -> None:
    assert "outside the folder" in error_of(folder, "../no such file")


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("images/no.png", "no such file; paths start from {root} (data.image.folder)"),
        ("images/a.png/b.png", "no such file; paths start from {root} (data.image.folder)"),
        ("images", "a folder, not a file"),
        ("loop.png", "a symbolic link that leads to itself"),
        ("a\0b.png", "no path: embedded null byte"),
        ("x" * 5000, "too long for a path; base64 text needs data:image/png;base64, in front of it"),
        ("~nobody-of-this-name/a.png", "no path: "),
        ("pipe", "no regular file"),
        ("empty.png", "an empty file"),
        ("text.png", "text: known kinds are JPEG, PNG, WebP, BMP, GIF and TIFF"),
        (" ", "an empty path"),
    ],
)
def test_what_is_no_picture_is_named(folder: ImageFolder, source: str, wrong: str) -> None:
    put(folder, "images/a.png")
    put(folder, "empty.png", b"")
    put(folder, "text.png", b"words")
    (folder.root / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder.root / "pipe")
    message = error_of(folder, source)
    assert wrong.format(root=folder.root.resolve()) in message
    assert message.startswith("picture ")
    assert len(message) < 600


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(folder: ImageFolder) -> None:
    put(folder, "a.png")
    (folder.root / "a.png").chmod(0)
    assert error_of(folder, "a.png") == "picture 'a.png': no permission to read it"


@pytest.mark.parametrize(("error", "kind"), [(PermissionError(13, "x"), RowError), (OSError(5, "I/O"), DataError)])
def test_errors_of_the_disk_drop_no_row(
    folder: ImageFolder, error: OSError, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may be gone on the next try stops the run; what is true of the row makes it a bad one."""
    put(folder, "a.png")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(files.os, "stat", fail)
    with pytest.raises(kind):
        folder.open("a.png")


def test_too_little_memory_drops_no_row(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "a.png")

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    found = folder.open("a.png")
    monkeypatch.setattr(pictures.Image, "open", fail)
    os.utime(folder.root / "a.png", ns=(0, 0))
    with pytest.raises(DataError) as caught:
        folder.open("a.png")
    assert caught.value.problems[0].what == "not enough memory to decode a picture"
    with pytest.raises(DataError, match="cannot decode a picture of 6 x 4: not enough memory"):
        decode(found)


def test_huge_files_are_refused_unread(folder: ImageFolder) -> None:
    with (folder.root / "huge.png").open("wb") as stream:
        stream.truncate(2**40)  # without any blocks
    assert error_of(folder, "huge.png").endswith("a huge file of 1,099,511,627,776 bytes: at most 268,435,456 are read")


def test_the_bound_of_pixels_is_the_folders(folder: ImageFolder) -> None:
    put(folder, "a.png")
    small = ImageFolder(folder.root, allow_outside=False, kept=folder.kept, max_decoded_pixels=23)
    folder.open("a.png")
    for source in ("a.png", encoded(noise(6, 4))):
        assert "it claims 6 x 4 = 24 pixels, at most 23 are" in error_of(small, source)


def test_a_picture_is_looked_at_once_until_it_changes(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look(data: bytes, **options: Any) -> pictures.Look:
        looks.append(len(data))
        return pictures.look_at(data, **options)

    monkeypatch.setattr(files, "look_at", look)
    put(folder, "a.png")
    first = folder.open("a.png")
    assert folder.open("./a.png") == first
    assert len(looks) == 1
    data = put(folder, "a.png", encoded(noise(9, 9)))
    assert folder.open("a.png").sha256 == hashlib.sha256(data).hexdigest()
    assert len(looks) == 2


def test_bytes_are_kept_under_their_hash(folder: ImageFolder) -> None:
    data = encoded(noise(6, 4), "JPEG")
    found, digest = folder.open(data), hashlib.sha256(data).hexdigest()
    path = folder.kept.resolve() / digest[:2] / f"{digest}.jpg"
    assert (found.path, found.sha256, found.size_bytes) == (str(path), digest, len(data))
    assert path.read_bytes() == data
    assert folder.open(data) == found
    assert [entry.name for entry in folder.kept.rglob("*") if entry.is_file()] == [path.name]
    assert decode(found).size == (6, 4)


@pytest.mark.parametrize("left", ["nothing", "half", "zeros", "another"])
def test_what_a_crash_left_is_written_again(folder: ImageFolder, left: str) -> None:
    data, another = encoded(noise(6, 4), "BMP"), encoded(noise(6, 4, seed=1), "BMP")
    assert len(data) == len(another)
    path = Path(folder.open(data).path)
    path.write_bytes({"nothing": b"", "half": data[:40], "zeros": bytes(len(data)), "another": another}[left])
    found = folder.open(data)
    assert Path(found.path).read_bytes() == data
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_bytes_that_are_no_picture_are_not_kept(folder: ImageFolder) -> None:
    for data in (b"", b"words", encoded(noise(6, 4))[:-30], png_claiming(60_000, 60_000)):
        assert error_of(folder, data).startswith(f"picture of {len(data):,} bytes in the row: ")
    assert not folder.kept.exists()


def test_a_folder_that_cannot_be_written(folder: ImageFolder) -> None:
    folder.kept.write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        folder.open(encoded(noise(6, 4)))
    assert caught.value.problems[0].what.startswith("cannot keep a picture: ")


def keep(folder: ImageFolder, data: bytes) -> ImageFile:
    return folder.open(data)


def test_processes_may_keep_the_same_picture_at_once(folder: ImageFolder) -> None:
    data = encoded(noise(200, 200))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(keep, [folder] * 32, [data] * 32))
    assert {file.sha256 for file in found} == {hashlib.sha256(data).hexdigest()}
    assert len([entry for entry in folder.kept.rglob("*") if entry.is_file()]) == 1


def test_a_folder_crosses_to_a_worker_process(folder: ImageFolder) -> None:
    put(folder, "a.png")
    assert pickle.loads(pickle.dumps(folder)).open("a.png") == folder.open("a.png")


def test_every_picture_of_a_conversation_is_opened(folder: ImageFolder) -> None:
    put(folder, "a.png")
    parts = (ImagePart("a.png"), "what is it?", ImagePart(encoded(noise(3, 2))))
    plain = Message("assistant", "noise")
    conversation = Conversation((Message("user", "what is it?", parts=parts, train=False), plain), ({"name": "f"},))
    opened = folder.open_all(conversation)
    assert isinstance(opened, Conversation)
    first, text, last = opened.messages[0].parts
    assert text == "what is it?"
    assert isinstance(first, ImagePart)
    assert isinstance(last, ImagePart)
    assert first == ImagePart("a.png", folder.open("a.png"))
    assert last.file is not None
    assert (last.file.width, last.file.height) == (3, 2)
    assert opened.messages[1] is plain
    assert (opened.tools, opened.messages[0].train) == (conversation.tools, False)


def test_what_has_no_pictures_is_as_it_was(folder: ImageFolder) -> None:
    for example in (Document("a"), Conversation((Message("user", "a"),))):
        assert folder.open_all(example) is example


@pytest.mark.parametrize("change", ["gone", "changed", "cut", "folder"])
def test_a_picture_that_changed_is_not_decoded(folder: ImageFolder, change: str) -> None:
    data = put(folder, "a.png")
    found, path = folder.open("a.png"), folder.root / "a.png"
    path.unlink()
    if change == "changed":
        path.write_bytes(encoded(noise(6, 4, seed=1)))
    elif change == "cut":
        path.write_bytes(data[:-20])
    elif change == "folder":
        path.mkdir()
    with pytest.raises(DataError) as caught:
        decode(found)
    problem = caught.value.problems[0]
    assert problem.where == found.path
    assert problem.what.startswith("cannot decode a picture of 6 x 4: ")
    assert problem.fix.startswith("put back the file that was there")


def test_a_picture_is_decoded_as_it_is_seen(folder: ImageFolder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    put(folder, "a.jpg", encoded(noise(6, 4), "JPEG", exif=exif.tobytes()))
    found = folder.open("a.jpg")
    assert (found.width, found.height) == decode(found).size == (4, 6)
