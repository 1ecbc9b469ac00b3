"""The tests of saev.storage once more, on an S3 server that somebody else wrote."""

import inspect
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import s3fs
import test_storage
from servers import S3Server, compiled_s3  # noqa: F401 - a fixture
from test_storage_names import (  # noqa: F401 - tests; an object of a folder's name cannot be here
    test_a_folder_of_any_name_works_everywhere,
    test_a_folder_that_only_its_marker_makes_is_empty,
    test_an_object_of_the_prefixs_name_and_a_slash_hides_nothing,
    test_deleting_removes_that_name_and_not_what_it_matches,
)
from test_storage_s3 import (  # noqa: F401 - tests and their fixtures
    endpoint,
    no_s3fs,
    proxy,
    test_a_known_size_saves_the_request,
    test_a_replaced_object_is_an_error,
    test_any_key,
    test_forbidden_is_named,
    test_missing_objects_and_buckets_are_named,
    test_ranges_do_not_go_through_s3fs,
    test_transient_faults_are_tried_again,
    url,
)

from saev.steps import claims

globals().update(
    {
        name: test
        for name, test in vars(test_storage).items()
        if name.startswith("test_") and {"s3", "root"} & set(inspect.signature(test).parameters)
    }
)


@pytest.fixture(scope="module")
def s3(compiled_s3: S3Server) -> Iterator[str]:  # noqa: F811
    """The bucket's URL; takes the place of the fixture that starts moto."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in compiled_s3.env.items():
            patch.setenv(key, value)
        s3fs.S3FileSystem.clear_instance_cache()  # instances keep the endpoint that they began with
        yield compiled_s3.bucket
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def root(s3: str) -> str:
    """An empty folder in the bucket."""
    return f"{s3}/{uuid.uuid4().hex}"


def test_steps_that_renew_one_claim_at_the_same_moment(s3: str) -> None:
    """The server refuses the slower ones before the object of the fastest can be read."""

    def step(folder: str) -> None:
        with claims.held(folder, "run"):
            pass

    with ThreadPoolExecutor(6) as pool:
        for _ in range(30):
            folder = f"{s3}/claims/{uuid.uuid4().hex}"
            assert claims.take(folder, "run", 1.0)
            list(pool.map(step, [folder] * 6))
            held = claims.current(folder)
            assert held is not None
            assert (held.owner, held.number) == ("run", 7)
