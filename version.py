"""The collector's version. Each has its paragraph in CHANGELOG.md."""

VERSION = "1.0"
