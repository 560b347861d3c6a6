"""
The OpenAPI description of our own public port, as it is published. It is written by hand, in `callbacks/openapi.yaml`;
that it says what the service does is for the tests to find out.
"""

from importlib.resources import files

MEDIA_TYPE = "application/yaml"  # RFC 9512


def openapi() -> bytes:
    """The document, in YAML."""
    return files("adapter").joinpath("callbacks/openapi.yaml").read_bytes()
