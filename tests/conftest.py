"""Eight virtual CPU devices for every test that asks for a mesh; nothing else is changed."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
