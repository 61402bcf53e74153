"""What all tests share."""

import signal

# A runner started in the background ignores Ctrl-C, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
