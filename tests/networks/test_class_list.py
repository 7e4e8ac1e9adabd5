"""Names of classes: their order, and how a name is found."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from sdkit.networks.class_list import ClassList


def test_numbers_come_by_value_then_names_in_alphabetical_order() -> None:
    names = ["b", "10", "A", "9", "", "a", "007", " ", "c d"]
    assert ClassList.of(names).names == ("007", "9", "10", "a", "b", "c d")  # "A" and "a" are one
    assert ClassList.of(["1" * 5000, "2"]).names == ("2", "1" * 5000)  # Python reads no number this long


@given(st.lists(st.sampled_from(["cat", "dog", "cat , orange", "T-shirt", "3", "20", "caf\u00e9"]), min_size=1))
def test_the_order_of_examples_and_the_spelling_of_tokens_change_nothing(names: list[str]) -> None:
    classes, shuffled = ClassList.of(names), [*names]
    random.Random(0).shuffle(shuffled)
    assert ClassList.of(shuffled).names == classes.names
    for i, name in enumerate(classes.names):
        by_tokens = " ".join(name.lower())
        assert [classes.number(one) for one in (name, f" {name.upper()} ", by_tokens)] == [i] * 3
    assert ClassList.of(" ".join(name.lower()) for name in names).number("T-shirt") == classes.number("t-shirt")


def test_one_spelling_of_a_class_is_its_name_in_any_order() -> None:
    names = ["Cat", "cat", " cat ", "dog"]
    assert {ClassList.of(order).names for order in itertools.permutations(names)} == {("cat", "dog")}


def test_sharp_s_is_told_from_two() -> None:
    classes = ClassList.of(["Masse", " Maße"])
    assert [classes.number(name) for name in ("masse", "Maße", "maße ")] == [0, 1, 1]


def test_names_that_are_alike_are_found_as_they_are_written() -> None:
    alike = ClassList(("Cat", "cat", "a b", "ab"))
    assert alike.alike
    assert [alike.number(name) for name in ("Cat", "cat", "A B", "AB", "a  b", "cow")] == [0, 1, 2, 3, 2, None]
    assert ClassList(("cafe\u0301",)).number("caf\u00e9") == 0  # one letter, or a letter and an accent


def test_identity_covers_names_and_order() -> None:
    assert len({ClassList(names).identity for names in [("a", "b"), ("b", "a"), ("ab",), ("a", "b", "")]}) == 4
