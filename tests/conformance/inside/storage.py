"""Looks at the storage, and makes and deletes what is there for the checks.

python -c THIS URL VERB [ARGUMENT]. What it finds is one line of JSON, the last one.
"""

import io
import json
import sys

from saev import storage


def picture(number: int) -> bytes:
    """A small PNG that no other number has."""
    from PIL import Image

    image = Image.new("RGB", (64, 64), (number * 7 % 256, number * 13 % 256, number * 29 % 256))
    for i in range(64):
        image.putpixel((i, (i * number + number) % 64), (255, 255 - i, number % 256))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    url, verb, *more = sys.argv[1:]
    found: object = None
    if verb == "pictures":  # FIRST COUNT: below two classes, numbers FIRST …
        first, count = int(more[0]), int(more[1])
        for number in range(first, first + count):
            place = storage.join(url, f"class-{number % 2}", f"{number:05}.png")
            storage.write_bytes(place, picture(number))
    elif verb == "write":
        storage.write_text(url, more[0])
    elif verb == "read":
        found = storage.read_text(url)
    elif verb == "list":
        found = [[o.key, o.size] for o in sorted(storage.walk(url, missing_ok=True))]
    elif verb == "delete":
        storage.clean_up(url, recursive=True)
    else:
        raise SystemExit(f"no such verb: {verb}")
    print(json.dumps(found))


main()
