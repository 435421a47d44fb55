"""GenEval's rules on objects laid out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dydit_scale.evaluation.geneval import Detected, Judgement, check_line, judge, relations, summarise


def thing(name: str, x: float, y: float, *, score: float = 0.95, side: float = 10) -> Detected:
    """A square object with its middle at x and y."""
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    return Detected(name, score, box, np.ones((2, 2), bool))


def line(*include: dict[str, Any], tag: str = "two_object", exclude: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"tag": tag, "prompt": "", "include": [{"count": 1} | want for want in include], "exclude": list(exclude)}


def judged(found: Sequence[Detected], wanted: dict[str, Any], colours: Sequence[str] = ()) -> Judgement:
    return judge(found, wanted, lambda things, name: colours[: len(things)])


DOG, CAT = {"class": "dog"}, {"class": "cat"}


def test_every_named_object_must_be_there_and_others_may() -> None:
    dog, cat = thing("dog", 20, 20), thing("cat", 60, 20)
    assert judged([dog, cat, thing("car", 80, 80)], line(DOG, CAT)) == (True, "as described")
    assert judged([dog], line(DOG, CAT)) == (False, "expected 1 of cat, found 0")
    assert not judged([dog, thing("cat", 60, 20, score=0.3)], line(DOG, CAT)).correct  # not certain enough


def test_a_number_must_be_exact_and_surer() -> None:
    three = line({"class": "dog", "count": 3}, tag="counting", exclude=[{"class": "dog", "count": 4}])
    dogs = [thing("dog", 20 * n, 20) for n in range(4)]
    assert judged(dogs[:3], three).correct
    assert judged(dogs[:2], three).reason == "expected 3 of dog, found 2"
    assert judged(dogs, three).reason == "expected fewer than 4 of dog, found 4"
    assert judged([*dogs[:3], thing("dog", 90, 90, score=0.85)], three).correct


def test_colours_are_asked_of_the_surest() -> None:
    red = line({"class": "dog", "color": "red"}, tag="colors")
    found = [thing("dog", 20, 20, score=0.5), thing("dog", 60, 20, score=0.9)]
    asked: list[Sequence[Detected]] = []

    def colours_of(things: Sequence[Detected], name: str) -> list[str]:
        asked.append(things)
        return ["red"]

    assert judge(found, red, colours_of).correct
    assert asked == [[found[1]]]
    assert judged(found, red, ["blue"]).reason == "expected 1 red dog, found blue"


@pytest.mark.parametrize(
    "where, x, y", [("left of", 10, 50), ("right of", 90, 50), ("above", 50, 10), ("below", 50, 90)]
)
def test_positions(where: str, x: float, y: float) -> None:
    wanted = line(CAT, {**DOG, "position": [where, 0]}, tag="position")
    assert judged([thing("cat", 50, 50), thing("dog", x, y)], wanted).correct
    assert (
        judged([thing("cat", 50, 50), thing("dog", 100 - x, 100 - y)], wanted).reason
        == f"dog is not {where} its target"
    )
    assert "nothing that dog could be" in judged([thing("dog", x, y)], wanted).reason


def test_relations_leave_a_tenth_of_the_extents_out() -> None:
    here = thing("cat", 50, 50)
    assert relations(thing("dog", 51.9, 50), here) == set()  # a tenth of 10 + 10 is 2
    assert relations(thing("dog", 53.9, 50), here) == set()  # 1.9 of 3.9 is less than half
    assert relations(thing("dog", 54.1, 50), here) == {"right of"}
    assert relations(thing("dog", 20, 80), here) == {"left of", "below"}


def test_the_score_weighs_kinds_of_prompts_equally() -> None:
    shares = summarise(["colors", "colors", "colors", "counting"], [True, True, False, False])
    assert shares == pytest.approx({"overall": 1 / 3, "colors": 2 / 3, "counting": 0})


@pytest.mark.parametrize(
    "fault, told",
    [
        ({"include": []}, "expected GenEval metadata with tag, prompt and include"),
        ({"tag": None}, "expected GenEval metadata"),
        ({"tag": "count"}, "unknown tag 'count'; they are single_object"),
        ({"include": [{"count": 1}]}, "include 0: expected a class"),
        ({"include": [{"class": "dog", "count": 0}]}, "include 0: expected a count of 1 or more, got 0"),
        ({"include": [{"class": "dog", "count": 1, "color": "teal"}]}, "unknown color 'teal'; they are red, orange"),
        ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "expected position .* got .*near"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "place of an earlier one"),
        ({"include": [{"class": "dog", "count": 1, "position": "above"}]}, "got above"),
        ({"exclude": [{"class": "dog"}]}, "exclude 0: expected a count"),
    ],
)
def test_what_is_no_metadata_is_refused(fault: dict[str, Any], told: str) -> None:
    right = line(CAT, {**DOG, "position": ["above", 0]})
    check_line(right, "here")
    with pytest.raises(ValueError, match=f"^here: .*{told}"):
        check_line(right | fault, "here")
