from hypothesis import given
from hypothesis import strategies as st

from server.security.namespaces import BARE, EVERYBODY, Namespace, split_key

NAMES = st.text(min_size=1, max_size=40)
IDS = st.text("ABCabc019._~-", min_size=1, max_size=20)


@given(NAMES, NAMES, IDS, IDS)
def test_two_owners_never_share_a_key(one, other, one_id, other_id):
    keys = Namespace.of(one).key(one_id), Namespace.of(other).key(other_id)

    assert (keys[0] == keys[1]) == ((one, one_id) == (other, other_id))
    assert BARE.key(one_id) not in keys


@given(NAMES, IDS)
def test_a_key_says_whose_it_is(owner, session_id):
    namespace = Namespace.of(owner)

    assert split_key(namespace.key(session_id)) == (owner, session_id)
    assert split_key(BARE.key(session_id)) == ("", session_id)
    assert namespace.shown(namespace.key(session_id)) == session_id


@given(st.lists(st.tuples(NAMES, IDS), unique=True, max_size=12), st.lists(IDS, unique=True, max_size=6))
def test_the_sessions_of_one_owner_lie_together(owned, bare):
    keys = sorted([Namespace.of(owner).key(i) for owner, i in owned] + bare)

    for namespace in [BARE, *(Namespace.of(owner) for owner, _ in owned)]:
        those_after = [key for key in keys if key > namespace.first("")]
        mine = [key for key in keys if namespace.holds(key)]
        assert those_after[: len(mine)] == mine


def test_a_page_goes_on_after_an_id():
    alice = Namespace.of("alice")

    assert alice.key("a") <= alice.first("a") < alice.key("b")
    assert BARE.first("a") == "a"
    assert EVERYBODY.first("") == ""
    assert EVERYBODY.first(alice.key("a")) == alice.key("a")


def test_everybodys_namespace_holds_every_key():
    assert EVERYBODY.holds(BARE.key("a"))
    assert EVERYBODY.holds(Namespace.of("alice").key("a"))


def test_a_request_without_an_id_has_no_key():
    assert Namespace.of("alice").request_key("") == ""
    assert Namespace.of("alice").request_key("r") != Namespace.of("bob").request_key("r")
