"""The pictures and caches of the tests of training."""

from tests.training.conftest import make_cache as make_cache
from tests.training.conftest import pictures as pictures
