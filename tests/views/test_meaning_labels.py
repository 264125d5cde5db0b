"""What a meaning is called: words at its maxima, and words of its contexts beyond chance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from polyseme.views.meanings import Meaning, are_spaced, distinctive_words, words_around
from polyseme.views.token_windows import TextWindow


def window(tokens: list[str], centre: int) -> TextWindow:
    return TextWindow(tokens, np.zeros(len(tokens), np.float32), centre)


@pytest.mark.parametrize(
    ("tokens", "centre", "word", "near"),
    [
        ([" in", " January", " ", "2", "0", "1", "3", ","], 1, "January", {"in", "2013", ","}),
        ([" in", " January", " ", "2", "0", "1", "3", ","], 4, "2013", {"in", "january", ","}),
        (["The", " battle", "ships", " sank"], 1, "battleships", {"the", "sank"}),
        (["The", " battle", "ships", " sank"], 2, "battleships", {"the", "sank"}),
        ([" (", "HM", "S", ")"], 1, "HMS", {"(", ")"}),
        (["a", "\n", "b"], 1, "a", {"b"}),
        ([" "], 0, "", set()),
        # WordPiece: no spaces, and ## before what goes on with a word.
        (["as", "##yn", "##c", "for", "loops", "."], 3, "for", {"async", "loops", "."}),
        (["as", "##yn", "##c", "for"], 1, "async", {"for"}),
        (["##c", "for"], 0, "c", {"for"}),
        (["the", "##", "mark"], 1, "##", {"the", "mark"}),
        ([" the", "##", " mark"], 1, "##", {"the", "mark"}),
        (["東", "京", "都"], 1, "京", {"東", "都"}),
    ],
)
def test_pieces_are_joined_to_words(
    tokens: list[str], centre: int, word: str, near: set[str]
) -> None:
    around, at = words_around(window(tokens, centre), spaced=are_spaced(tokens))
    assert at == word
    assert around == near


def test_a_word_that_sets_a_meaning_apart_is_named() -> None:
    near = [{"ship", "the"} if row < 15 else {"the", "of"} for row in range(40)]
    inside = np.arange(40) < 20
    words = distinctive_words(near, inside, {"the": 0.05, "of": 0.03, "ship": 0.0005}, set())
    assert words == ("ship",)


def test_a_word_of_the_whole_neuron_sets_no_meaning_apart() -> None:
    near = [{"ship"}] * 40
    assert distinctive_words(near, np.arange(40) < 20, {"ship": 0.0005}, set()) == ()


def test_a_frequent_word_or_a_handful_of_examples_says_nothing() -> None:
    rng = np.random.default_rng(0)
    shares = {f"w{n}": 0.01 for n in range(100)}
    named = 0
    for _ in range(50):
        near = [{f"w{n}" for n in rng.integers(0, 100, 20)} for _ in range(60)]
        named += bool(distinctive_words(near, np.arange(60) < 20, shares, set()))
    # At 0.01 over all words that are tried.
    assert named <= 2
    few = [{"rare"}] * 2 + [{"w1"}] * 30
    assert distinctive_words(few, np.arange(32) < 2, {"rare": 1e-6}, set()) == ()


def meaning(counts: dict[str, int], context: tuple[str, ...] = ()) -> Meaning:
    examples = pd.DataFrame({"example": range(5), "activation": np.ones(5)})
    return Meaning(0, examples, 0.5, 0, counts, context, {0: 5})


def test_labels_name_words_that_come_twice_and_then_the_context() -> None:
    assert meaning({"January": 8, "June": 6, "Xu": 1}).label == "January ×8, June ×6"
    assert meaning({"a": 1}, ("ship", "navy")).label == "near: ship, navy"
    assert meaning({"a": 3}, ("ship",)).label == "a ×3; near: ship"
    assert meaning({"a": 1}).label == ""
    assert "nothing distinctive" in repr(meaning({}))
