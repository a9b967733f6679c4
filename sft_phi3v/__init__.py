"""Fine-tune Phi-3-Vision on your own pictures."""

import logging
import time

STARTED = time.perf_counter()  # of this process, or nearly: what takes long is imported after this

# bitsandbytes looks for an optional CPU kernel when it is imported and warns that it has none, on machines where this
# project does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
