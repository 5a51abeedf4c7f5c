"""The collector's version. Each version has its paragraph in CHANGELOG.md."""

VERSION = "1.0"
