"""What the exit status of a run means; docs/resuming.md."""

# The model is trained and saved, or it was already.
DONE = 0
# The run could not go on: a loss that is not finite, a lost process, a full disk.
FAILED = 1
# The recipe, the flags or the data are wrong: nothing was trained.
WRONG_INPUT = 2
# Interrupted with a checkpoint: the same command goes on from there. EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75
# Stopped at once by a second Ctrl-C: 128 + SIGINT, as a shell reports it.
INTERRUPTED = 130
