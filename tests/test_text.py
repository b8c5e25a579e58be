"""inference/text.py: characters spread over tokens, and stop strings spread over pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.text import StopStrings, TextStream
from model.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    text = TextStream(tokenizer)
    return [text.push(token) for token in ids] + [text.finish()]


@pytest.mark.parametrize(
    "text", ["你好，世界！", "𠮷野家 👨‍👩‍👧‍👦 naïve café", "def f(x):\n\treturn x**2  # 平方", "", "\ufffd是真的"]
)
def test_streamed_text_equals_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == text


def test_streamed_text_never_holds_half_a_character(tokenizer):
    ids = tokenizer.encode("鑫𠮷龘👩🏽‍🚀", add_special_tokens=False)
    assert len(ids) > 4, "some of these characters must be spread over several tokens"
    assert not any("\ufffd" in piece for piece in pieces_of(tokenizer, ids))


def test_a_character_comes_with_its_last_token(tokenizer):
    ids = tokenizer.encode("a龘b", add_special_tokens=False)
    text, so_far = TextStream(tokenizer), ""
    for n, token in enumerate(ids, start=1):
        so_far += text.push(token)
        assert so_far == tokenizer.decode(ids[:n]).rstrip("\ufffd")


@given(ids=st.lists(st.integers(0, 6399), max_size=40) | st.lists(st.integers(16, 271), max_size=40))
@settings(deadline=None, max_examples=200)
def test_the_pieces_of_any_tokens_are_their_decoding(tokenizer, ids):
    """Also of nonsense, as an untrained model talks: bytes that are no character, control tokens."""
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


# StopStrings


@given(
    text=st.text("abc你", max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=8),
    stops=st.lists(st.text("abc你", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_the_text_ends_before_the_first_stop_string_however_it_comes_in_pieces(text, cuts, stops):
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stream, out = StopStrings(tuple(stops)), ""
    for start, end in zip(borders, borders[1:], strict=False):
        if not stream.found:
            out += stream.push(text[start:end])
            # What is out is final; what is held back is no longer than a stop string's beginning.
            assert text.startswith(out)
            assert stream.found or end - len(out) < max(map(len, stops), default=1)
    out += stream.finish()
    # Of several, the one that is complete first counts.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stream.found == bool(ends)
    if not ends:
        assert out == text
    elif len(ends) == 1:
        assert out == text[: text.index(next(stop for stop in stops if stop in text))]


def test_an_end_that_may_be_a_stop_string_is_held_back():
    stream = StopStrings(("END",))
    assert [stream.push(piece) for piece in ("the E", "N", "emy E", "ND", "")][:4] == ["the ", "", "ENemy ", ""]
    assert stream.found
