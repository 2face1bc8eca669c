"""What the tests of copies share."""

from tests.copies.storages import places  # noqa: F401 - a fixture
