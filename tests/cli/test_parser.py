"""The command line's parser: most options can be given once, and a few repeatedly."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from sdkit.cli.parser import Parser
from sdkit.errors import ArgumentError
from sdkit.recipes.emoji.__main__ import _parser as emoji_parser


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="p")
    child = parser.add_subparsers().add_parser("c")
    child.add_argument("names", nargs="*")
    child.add_argument("--one", "-o", type=int)
    child.add_argument("--many", action="append")
    child.add_argument("--list", nargs="+")
    child.add_argument_group("more").add_argument("--on", action=argparse.BooleanOptionalAction)
    return parser


def test_options_given_once_and_repeatable_ones(parser: Parser) -> None:
    for _ in range(2):  # the second call must not see values of the first
        found = parser.parse_args(["c", "a", "--many", "x", "-o", "1", "--many", "y", "--no-on", "--list", "u", "v"])
        expected: dict[str, Any] = {"names": ["a"], "many": ["x", "y"], "one": 1, "on": False, "list": ["u", "v"]}
        assert vars(found) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--one 1 --one 2", "--one is given twice: give it once; see p c --help."),
        ("-o1 --one=1", "--one is given twice: give it once; see p c --help."),
        ("--on --no-on", "--on/--no-on is given twice: give it once; see p c --help."),
        (
            "--list a --list b",
            "--list is given twice: give it once, with all values after one --list; see p c --help.",
        ),
        ("--on --man", "unrecognized arguments: --man; see p --help."),  # no abbreviations
    ],
)
def test_an_option_given_twice_is_told(parser: Parser, words: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(["c", *words.split()])
    assert str(caught.value) == message


def test_the_recipes_command_has_it_too() -> None:
    with pytest.raises(ArgumentError, match="--out is given twice"):
        emoji_parser().parse_args(["vae", "-o", "a", "--out", "b"])
