"""`python -m coreml_sd`."""

from coreml_sd import main

main()
