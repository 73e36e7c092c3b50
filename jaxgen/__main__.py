"""`python -m jaxgen` is the command `jaxgen`."""

from jaxgen.cli import main

main()
