import logging

# PEFT imports bitsandbytes where it is installed, and that warns of an operator for inference which nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .comparison import main  # noqa: E402 the import is what warns

main()
