"""Makes a cache in a subprocess of the tests: `python cache_job.py DATA OUT [KEY=JSON ...]`."""

from __future__ import annotations

import json
import os
import sys

import sdkit
from sdkit.data import cache


def main() -> None:
    data, out, *options = sys.argv[1:]
    settings = {key: json.loads(value) for key, _, value in (option.partition("=") for option in options)}
    try:
        cache("emoji", data, out, **{"dtype": "fp32", **settings})
        print(os.environ.get("WORLD_SIZE", "1"))
    except sdkit.SdkitError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
