"""Eight virtual CPU devices for tests that ask for a mesh; quick compiling; files in good order."""

import os

# Programs here are tiny and run once or twice: compiling them is most of the time. What the tests
# start inherits this; where it has a cache, all it compiled is kept. `make test-slow` and the files
# of OPTIMISED are compiled as users' runs are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Files that compare two programs to the last bit or so, which are rounded alike where optimised;
# and one of whole images, so that tolerances are also those of the code that users run.
OPTIMISED = ("test_optim.py", "test_embedded.py")

# Seconds that these files take, on two cores; the others take less.
LONG = {
    "test_resume.py": 600,
    "test_cli_seedselect.py": 400,
    "test_controlnet.py": 300,
    "test_controls.py": 300,
    "test_truth.py": 300,
    "test_gradient.py": 250,
    "test_generate.py": 200,
    "test_sharding.py": 200,
    "test_rebuild.py": 200,
    "test_precision.py": 150,
    "test_programs.py": 150,
    "test_cli.py": 100,
    "test_embedded.py": 100,
    "test_ship.py": 100,
}


@pytest.fixture(autouse=True, scope="module")
def optimised(request):
    """Compiles a file of OPTIMISED as users' runs are."""
    before = jax.config.values["jax_disable_most_optimizations"]
    if request.path.name not in OPTIMISED:
        yield
        return
    jax.clear_caches()  # what was compiled stays as it was
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def pytest_collection_modifyitems(items):
    """The longest files first, so that processes that share the files end together."""
    items.sort(key=lambda item: -LONG.get(item.path.name, 0))
