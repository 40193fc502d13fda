"""The join string: one copy and paste, and a plain word for every way to damage it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope.join import InvalidJoinString, JoinString
from scope.model import PublicKey, Secret

BYTES = st.binary(min_size=32, max_size=32)
STRING = JoinString(
    "https://registry.example:8443", "home", "t7k2", Secret(b"s" * 32), b"p" * 32, PublicKey(b"k" * 32)
)
TEXT = STRING.format()


@given(
    st.sampled_from(("https://192.0.2.1:8443", "https://[2001:db8::1]:443", "https://a.example")),
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True),
    BYTES,
    st.none() | BYTES,
    BYTES,
    st.sampled_from(("", "wg0", "Wg.home=1+2-x_y")),
)
def test_what_is_read_is_what_was_written(
    url: str, mesh: str, secret: bytes, pin: bytes | None, key: bytes, interface: str
) -> None:
    string = JoinString(url, mesh, "token-1", Secret(secret), pin, PublicKey(key), interface)
    assert JoinString.parse(f"  {string.format()}\n") == string


def test_the_secret_stands_after_the_hash_and_in_no_repr() -> None:
    before, after = TEXT.split("#")
    secret = after.split(".")[1]
    assert before == "https://registry.example:8443/home"
    assert secret not in before
    assert secret not in repr(STRING)
    assert repr(b"s" * 32) not in repr(STRING)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            TEXT.partition("#")[0],
            "the part after # is missing: the shell may have cut it; put the whole string in single",
        ),
        (TEXT.partition("#")[0] + "#", "the part after # is missing"),
        (TEXT.rpartition(".")[0], "the registry key after # missing"),
        (
            TEXT.partition(".example")[0] + ".example/home#t1.abc",
            "the certificate pin and the registry key after # missing",
        ),
        (TEXT + ".more", "too much after #"),
        (TEXT[:-1], "the registry key after # is damaged"),
        (TEXT.replace("#t7k2.", "#t7k2.x"), "the secret after # is damaged"),
        (TEXT.replace("t7k2", "../t"), "the token id after # is damaged|too much"),
        (TEXT.replace("https", "http"), "starts with https://"),
        (TEXT.replace("/home", ""), "the mesh is missing after the host"),
        (TEXT.replace("/home", "/Home"), "not a DNS label"),
        (TEXT.replace("/home", "/home/wg0/x"), "no name of an interface"),
        (TEXT.replace("/home", "/home/0123456789abcdef"), "no name of an interface"),
        (TEXT.replace("/home", "/Home/wg0"), "not a DNS label"),
        (TEXT.replace("8443", "84430"), "the address before # is damaged"),
        (TEXT.replace("registry.example:8443", ""), "the host before # is missing"),
        (TEXT.replace("registry", "me:pw@registry"), "the host before # is missing or damaged"),
        ("", "starts with https://"),
        ("x" * 10_000, "at most"),
    ],
)
def test_a_damaged_string_is_refused_with_what_is_missing(text: str, says: str) -> None:
    with pytest.raises(InvalidJoinString, match=says) as caught:
        JoinString.parse(text)
    assert TEXT.split(".")[-3] not in str(caught.value)


@given(
    st.text(max_size=60)
    | st.integers(0, len(TEXT)).flatmap(lambda n: st.text(max_size=3).map(lambda t: TEXT[:n] + t))
)
def test_any_text_is_refused_or_read_and_never_crashes(text: str) -> None:
    try:
        string = JoinString.parse(text)
    except InvalidJoinString:
        return
    assert JoinString.parse(string.format()) == string


def test_a_string_without_a_pin_asks_for_a_public_ca() -> None:
    without = JoinString("https://a.example", "home", "t1", Secret(bytes(32)), None, PublicKey(bytes(32)))
    assert without.format().split(".")[-2] == "-"
    assert JoinString.parse(without.format()).pin is None
