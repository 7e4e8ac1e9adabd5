"""Classes of images: from folders, metadata, tables, shards, and for the examples of a cache."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdkit.data.labels import Labels, folder_labels, labels_by_name, labels_of, read_labels
from sdkit.data.sources import open_examples
from sdkit.errors import ArgumentError, DataError

pytest.importorskip("datasets")

CLASSES = ("ant", "bee", "cat")


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same nine images in folders of classes, beside metadata, in a parquet file, and in a shard.

    Their class is i % 3, so that it is not in the order of the names.
    """
    import datasets

    folder = tmp_path_factory.mktemp("made")
    rows: dict[str, list[Any]] = {"image": [], "name": [], "digit": [], "kind": []}
    (folder / "flat").mkdir()
    with tarfile.open(folder / "shard.tar", "w") as shard, (folder / "flat" / "metadata.jsonl").open("w") as lines:
        for i in range(9):
            name, data = CLASSES[i % 3], picture(i)
            path = folder / "tree" / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            (folder / "flat" / f"{i}.png").write_bytes(data)
            (folder / "flat" / f"{i}.txt").write_text("a caption, which is no class")
            print(json.dumps({"file_name": f"{i}.png", "text": "it", "kind": name, "digit": 9 + i % 3}), file=lines)
            fields = json.dumps({"kind": name, "text": "it"}).encode()
            for suffix, content in (("png", data), ("json", fields)):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
            rows["image"].append({"bytes": data, "path": None})
            rows["name"].append(name)
            rows["digit"].append(9 + i % 3)
            rows["kind"].append(i % 3)
    features = {"image": datasets.Image(), "name": datasets.Value("string"), "digit": datasets.Value("int64")}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features({**features, "kind": datasets.ClassLabel(names=["cat", "ant", "bee"])})
    )
    table.to_parquet(folder / "table.parquet")
    return folder


def found(made: Path, name: str, column: str | None = None) -> Labels:
    return read_labels(open_examples(made / name), made / name, column=column)


def test_folders_are_classes_in_alphabetical_order(made: Path) -> None:
    labels = found(made, "tree")
    examples = open_examples(made / "tree")
    assert labels.classes == CLASSES
    assert [CLASSES[number] for number in labels.numbers] == [Path(name).parent.name for name in examples.names]


@pytest.mark.parametrize(
    ("name", "column"), [("flat", "kind"), ("shard.tar", "kind"), ("table.parquet", "name")]
)  # fmt: skip
def test_columns_are_read_from_every_kind_of_data(made: Path, name: str, column: str) -> None:
    labels = found(made, name, column)
    assert labels.classes == CLASSES
    assert labels.numbers.tolist() == [i % 3 for i in range(9)]
    assert labels.numbers.dtype == np.int64


def test_numbers_are_sorted_by_size(made: Path) -> None:
    for name in ("flat", "table.parquet"):
        labels = found(made, name, "digit")
        assert labels.classes == ("9", "10", "11")  # as texts, "10" would come first
        assert labels.numbers.tolist() == [i % 3 for i in range(9)]


def test_class_labels_have_their_names(made: Path) -> None:
    names = ["cat", "ant", "bee"]
    labels = found(made, "table.parquet", "kind")
    assert [labels.classes[number] for number in labels.numbers] == [names[i % 3] for i in range(9)]


def test_identity_covers_classes_and_numbers(made: Path) -> None:
    labels = found(made, "flat", "kind")
    moved = Labels(classes=labels.classes, numbers=np.roll(labels.numbers, 1))
    renamed = Labels(classes=("ant", "bee", "dog"), numbers=labels.numbers)
    assert len({labels.identity, moved.identity, renamed.identity}) == 3
    assert labels.identity == found(made, "shard.tar", "kind").identity


def test_numbers_of_a_model(made: Path) -> None:
    labels = found(made, "flat", "kind")
    again = labels.numbered_as(("cat", "dog", "bee", "ant"), "the classifier m")
    assert [again.classes[n] for n in again.numbers] == [labels.classes[n] for n in labels.numbers]
    with pytest.raises(DataError, match="the classifier m knows no class bee; leave these images out"):
        labels.numbered_as(("ant", "cat"), "the classifier m")


def test_examples_of_a_cache_are_found_by_name(made: Path) -> None:
    labels, names = found(made, "flat", "kind"), open_examples(made / "flat").names
    some = labels_by_name([names[7], names[0], names[7]], labels, names, "flat")
    assert some.numbers.tolist() == [1, 0, 1]
    assert some.classes == CLASSES
    with pytest.raises(DataError, match=r"flat has no image called x\.png \(1 of 2 are missing\)"):
        labels_by_name([names[0], "x.png"], labels, names, "flat")


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "column", "sentence"),
        [
            ("flat", None, "9 of 9 images in .* lie in no folder, such as 0.png, and have no class; put the images"),
            ("shard.tar", None, "9 of 9 images in .* lie in no folder"),
            ("table.parquet", None, "9 of 9 images in .* lie in no folder"),
            ("flat", "kid", "label_column: no line of a metadata.jsonl in .* has 'kid'; the keys there: "),
            ("tree", "kind", "the keys there: none"),
            ("shard.tar", "kid", "label_column: no .json in the shards of .* has 'kid'"),
            ("table.parquet", "kid", "label_column: .* has no column 'kid'; it has image, name, digit, kind"),
            ("table.parquet", "image", "label_column: column 'image' of .* holds images or the like"),
            ("flat", "text", "all images in .* are of the class 'it'; give at least two"),
        ],
    )
    def test_of_columns(self, made: Path, name: str, column: str | None, sentence: str) -> None:
        with pytest.raises(DataError, match=sentence):
            found(made, name, column)

    def test_an_image_without_a_class_takes_none_from_its_caption(self, made: Path, tmp_path: Path) -> None:
        for i in range(3):
            (tmp_path / f"{i}.png").write_bytes(picture(i))
            (tmp_path / f"{i}.txt").write_text("a caption")
        lines = [{"file_name": "0.png", "kind": "ant", "text": "it"}, {"file_name": "1.png", "kind": "bee"}]
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError, match=r"1 of 3 images in .* have no class, such as 2\.png; give each image one"):
            read_labels(open_examples(tmp_path), tmp_path, column="kind")

    def test_of_streams_and_values(self, made: Path) -> None:
        stream = open_examples(made / "table.parquet", streaming=True)
        with pytest.raises(ArgumentError, match="not read from a stream"):
            read_labels(stream, made / "table.parquet", column="name")
        with pytest.raises(ArgumentError, match="label_column must be a path or a name"):
            read_labels(open_examples(made / "flat"), made / "flat", column="")
        with pytest.raises(DataError, match="1 of 2 images in x have no class, such as b"):
            labels_of(["ant", ""], ["a", "b"], "x")
        with pytest.raises(DataError, match="all images in x are of the class 'cat'"):
            folder_labels(["cat/1.png", "a/cat/2.png"], "x")
