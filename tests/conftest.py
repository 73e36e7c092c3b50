"""Eight virtual CPU devices for every test that asks for a mesh; files in a good order."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

# Seconds that these files take, on two cores; the others take less.
LONG = {
    "test_resume.py": 600,
    "test_truth.py": 300,
    "test_generate.py": 250,
    "test_rebuild.py": 100,
}


def pytest_collection_modifyitems(items):
    """The longest files first, so that processes that share the files end together."""
    items.sort(key=lambda item: -LONG.get(item.path.name, 0))
