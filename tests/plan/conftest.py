"""The pictures and caches of the tests of training."""

from tests.training.conftest import images as images
from tests.training.conftest import make_cache as make_cache
