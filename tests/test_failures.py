"""Which error a job raises when some of its results failed."""

import pytest

from saev.errors import ConfigError, CorruptDataError, SaevError, StorageError
from saev.failures import Failures
from saev.steps import last_word


def passing(text: str) -> StorageError:
    err = StorageError(text)
    err.passing = True
    return err


def note(failures: Failures[str], result: str, err: SaevError) -> None:
    with failures.of(result):
        raise err


def test_the_only_result_fails_at_once() -> None:
    with pytest.raises(CorruptDataError, match=r"^A$"):
        note(Failures(["a"], "SAEs"), "a", CorruptDataError("A"))
    with pytest.raises(ConfigError, match=r"^A$"):
        Failures([], "SAEs", [ConfigError("A")])


def test_one_of_several_keeps_its_error() -> None:
    failures = Failures(["a", "b"], "SAEs")
    assert failures.error() is None
    err = CorruptDataError("A")
    note(failures, "a", err)
    note(failures, "a", ConfigError("later"))
    assert failures.error() is err
    assert failures.left(["b", "a"]) == ["b"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_it_may_pass_if_one_of_them_may(order: tuple[int, int]) -> None:
    errors = [ConfigError("A is wrong."), passing("B is away.")]
    failures = Failures(["a", "b", "c"], "SAEs")
    for n in order:
        note(failures, "ab"[n], errors[n])
    both = failures.error()
    assert isinstance(both, StorageError)
    assert last_word.of(both).kind == "passing"
    assert str(both).startswith("2 of 3 SAEs failed. ")
    assert all(str(err) in str(both) for err in errors)


def test_all_of_them() -> None:
    """What is the same for all is said once."""
    failures = Failures(["a", "b"], "SAEs", [ConfigError("A")])
    note(failures, "a", ConfigError("A"))
    with pytest.raises(ConfigError, match=r"^A$"):
        note(failures, "b", ConfigError("A"))


def test_an_error_of_the_whole_work_is_raised() -> None:
    failures = Failures(["a", "b"], "SAEs")

    def lost() -> None:
        raise ConfigError("The claim is lost.")

    with pytest.raises(ConfigError, match="claim is lost"), failures.of("a", lost):
        raise StorageError("gone")
    assert failures.error() is None
