"""Addresses of object stores."""

from saev import secrets
from saev.errors import StorageError


def check_endpoint(url: str) -> None:
    """Raise StorageError if a store's address contains a user name or a password.

    botocore takes the address from the environment or from a profile.

    Args:
        url: the address, or the URL of a request to it.
    """
    if secrets.holds_key(url.partition("?")[0]):
        raise StorageError(
            f"The endpoint {secrets.redact(url.partition('?')[0])} has a user or a password in it "
            "(*** here). Take them out of AWS_ENDPOINT_URL (or endpoint_url of the profile); keys "
            "go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or into a profile."
        )
